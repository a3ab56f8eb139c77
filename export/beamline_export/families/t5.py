"""T5 and its kin (Hugging Face `T5ForConditionalGeneration`, `MT5…`, `UMT5…`): pre-norm, relative positions, no biases.

T5 1.1, Flan-T5, mT5, UMT5 and ByT5 are variants: the activation of the feed-forward layers, whether these are gated,
whether every layer has relative positions of its own, and the scale of what the head reads.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beamline_export.checkpoint import MOST_LAYERS, MOST_POSITIONS, Fields, read_json, read_optional_json
from beamline_export.checkpoint import read_state_dict as read_tensors
from beamline_export.families.activations import ACTIVATIONS
from beamline_export.families.bart_like_weights import HEAD, Tables, Ties, take_embeddings
from beamline_export.families.hugging_face import put_together
from beamline_export.families.relative_positions import Buckets, bias_by_offset, read_buckets
from beamline_export.generation import read_generation
from beamline_export.known_settings import CONFIG, T5_ALIASES, contradictions, without_effect
from beamline_export.reference import HuggingFaceReference, Reference
from beamline_export.renamer import Renamer
from beamline_export.spec import (
    Activation,
    Array,
    Checkpoint,
    ExportError,
    Norm,
    NormPlacement,
    RelativePositions,
    TransformerSpec,
)
from beamline_export.t5_tokenizers import BYTE_CLASS, read_t5_tokenizer
from beamline_export.tokenizer_config import CONFIG_FILE, tokenizer_class

_POSITIONS, _POSITIONS_OF_BYTES = 512, 1024
"""Tokens of a text where config.json says nothing: what models were trained with. Distances know no limit."""
_SHARED, _SOURCE, _TARGET = "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
_TABLES = Tables(tied=(_SHARED, HEAD, _TARGET, _SOURCE), shared=_SHARED, source=_SOURCE, target=_TARGET)
_CROSS_BIAS = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
"""In the first checkpoints; no model reads it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs between the classes in transformers.

    Attributes:
        name: Of the config's `model_type`.
        model_class: The class in transformers.
        feed_forward: What `feed_forward_proj` is by default.
        per_layer: Whether each layer has relative positions of its own.
        scaled: Whether the decoder's output is multiplied by d_model^-0.5 for the head; None: config.json says it.
        tokenizer_class: Its tokenizer's class, where the checkpoint names none.
    """

    name: str
    model_class: str
    feed_forward: str
    per_layer: bool
    scaled: bool | None
    tokenizer_class: str

    def read(self, folder: Path) -> Checkpoint:
        """Read a folder.

        Raises:
            ExportError: config, weights or tokenizer are missing or contradict each other.
        """
        config = read_json(folder / "config.json")
        fields = Fields(config, "config.json")
        buckets = read_buckets(fields)
        class_ = _tokenizer_class(folder, config) or self.tokenizer_class
        spec = self._spec(fields, buckets, of_bytes=class_.removesuffix("Fast") == BYTE_CLASS)
        tied = fields.flag("tie_word_embeddings", True)
        scaled = fields.flag("scale_decoder_outputs", tied) if self.scaled is None else self.scaled
        fields.must_be("is_encoder_decoder", True)
        fields.must_be("is_decoder", False)
        fields.problems += contradictions(config, T5_ALIASES)
        fields.check()
        generation = read_generation(
            config, read_optional_json(folder / "generation_config.json"), max_positions=spec.max_target_positions
        )
        tokenizer = read_t5_tokenizer(folder, generation.tokens, self.name, class_)
        # transformers tie the tables whatever the config says; what the file has is used as it is.
        names = _rename(spec, buckets, Ties(head=True, sides=True, stated=tied), read_tensors(folder), config["d_kv"])
        if scaled and "decoder.final_norm.weight" in names.weights:
            # Nothing but the head reads what this norm gives.
            names.weights["decoder.final_norm.weight"] = _times(
                names.weights["decoder.final_norm.weight"], spec.d_model**-0.5
            )
        ignored = without_effect(config, CONFIG[self.name], name_unknown=False)
        return put_together(spec, names, generation, tokenizer, ignored, _limits(config, spec))

    def reference(self, folder: Path, checkpoint: Checkpoint) -> Reference:
        """The model as transformers runs it."""
        return HuggingFaceReference(self.model_class, folder, checkpoint.removed_tokens)

    def _spec(self, fields: Fields, buckets: Buckets, *, of_bytes: bool) -> TransformerSpec:
        usual = _POSITIONS_OF_BYTES if of_bytes else _POSITIONS
        heads, positions = fields.integer("num_heads"), fields.integer("n_positions", usual, most=MOST_POSITIONS)
        activation, gated = _feed_forward(fields, self.feed_forward)
        vocabulary, layers = fields.integer("vocab_size", least=2), fields.integer("num_layers", most=MOST_LAYERS)
        ffn, reach = fields.integer("d_ff"), min(buckets.max_distance, positions - 1)
        return TransformerSpec(
            architecture=self.name,
            d_model=fields.integer("d_model"),
            encoder_layers=layers,
            decoder_layers=fields.integer("num_decoder_layers", layers, most=MOST_LAYERS),
            encoder_heads=heads,
            decoder_heads=heads,
            encoder_ffn=ffn,
            decoder_ffn=ffn,
            norm_placement=NormPlacement.PRE,
            activation=activation,
            source_vocabulary=vocabulary,
            target_vocabulary=vocabulary,
            max_source_positions=positions,
            max_target_positions=positions,
            encoder_final_norm=True,
            decoder_final_norm=True,
            norm_epsilon=fields.number("layer_norm_epsilon", 1e-6, least=0.0),
            norm=Norm.RMS,
            gated=gated,
            attention_width=heads * fields.integer("d_kv"),
            relative_positions=RelativePositions(reach, reach, self.per_layer),
            # As transformers, which keep the last product of these layers in fp32.
            fp32_residual=True,
        )


def _tokenizer_class(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The class of its tokenizer that a checkpoint names."""
    beside = read_optional_json(folder / CONFIG_FILE) or {}
    return tokenizer_class(beside, CONFIG_FILE) or tokenizer_class(config, "config.json")


def _feed_forward(fields: Fields, default: str) -> tuple[Activation, bool]:
    """The activation of the feed-forward layers, and whether they are gated: "relu", or "gated-gelu"."""
    # The gated GELU is the approximate one, whatever it is called.
    gated = {f"gated-{name}": (activation, True) for name, activation in ACTIVATIONS.items()}
    gated["gated-gelu"] = (Activation.GELU_TANH, True)
    plain = {name: (activation, False) for name, activation in ACTIVATIONS.items()}
    activation, is_gated = fields.choice("feed_forward_proj", {**plain, **gated}, default)
    # What transformers derive, and write beside it; a file where it says something else is read by that.
    fields.must_be("is_gated_act", is_gated)
    said = fields.raw("dense_act_fn")
    if said is not None and fields.choice("dense_act_fn", ACTIVATIONS) is not activation and not fields.problems:
        fields.problems.append(
            f"dense_act_fn {said!r} and feed_forward_proj {fields.raw('feed_forward_proj')!r} are two activations; "
            "remove dense_act_fn, or correct it"
        )
    return activation, is_gated


def _limits(config: Mapping[str, Any], spec: TransformerSpec) -> list[str]:
    if config.get("n_positions") is not None:
        return []
    return [
        f"config.json names no n_positions, and relative positions have no limit of their own: texts of up to "
        f"{spec.max_source_positions} tokens are taken and generated; add n_positions for other ones"
    ]


def _rename(spec: TransformerSpec, buckets: Buckets, ties: Ties, state: Mapping[str, Array], head_size: int) -> Renamer:
    names = Renamer(state)
    names.ignore(_CROSS_BIAS)
    take_embeddings(names, ties, _TABLES)
    names.weights["head.bias"] = np.zeros(spec.target_vocabulary, np.float32)
    for side, layers in (("encoder", spec.encoder_layers), ("decoder", spec.decoder_layers)):
        attentions = ["SelfAttention"] if side == "encoder" else ["SelfAttention", "EncDecAttention"]
        for i in range(layers):
            there = f"{side}.block.{i}.layer"
            for number, its_name in enumerate(attentions):
                here = f"{side}.{i}.{'cross' if number else 'self'}_attention"
                names.take(f"{here}_norm.weight", f"{there}.{number}.layer_norm.weight")
                for projection in ("query", "key", "value", "output"):
                    names.weight_alone(f"{here}.{projection}", f"{there}.{number}.{its_name}.{projection[0]}")
                # Attention here divides scores by the root of a head's size, T5's does not.
                if (query := names.weights.get(f"{here}.query.weight")) is not None:
                    names.weights[f"{here}.query.weight"] = _times(query, math.sqrt(head_size))
            last = f"{there}.{len(attentions)}"
            names.take(f"{side}.{i}.ffn_norm.weight", f"{last}.layer_norm.weight")
            parts = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if spec.gated else {"up": "wi", "down": "wo"}
            for part, its_name in parts.items():
                names.weight_alone(f"{side}.{i}.ffn.{part}", f"{last}.DenseReluDense.{its_name}")
        names.take(f"{side}.final_norm.weight", f"{side}.final_layer_norm.weight")
    _take_relative_positions(names, spec, buckets)
    return names


def _times(weight: Array, factor: float) -> Array:
    scaled: Array = weight * np.float32(factor)
    return scaled


def _take_relative_positions(names: Renamer, spec: TransformerSpec, buckets: Buckets) -> None:
    relative = spec.relative_positions
    assert relative is not None
    sides: tuple[tuple[str, int, int, Callable[[], Any]], ...] = (
        ("encoder", spec.encoder_layers, spec.encoder_heads, lambda: buckets.both_ways(relative.encoder_reach)),
        ("decoder", spec.decoder_layers, spec.decoder_heads, lambda: buckets.looking_back(relative.decoder_reach)),
    )
    for side, layers, heads, bucket in sides:
        canonical, tables = f"{side}.relative_bias", []
        for i in range(relative.layers(layers)):
            own = f"{canonical}.{i}"
            names.take(own, f"{side}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight")
            name, table = names.names.pop(own), names.weights.pop(own, None)
            if table is None:
                names.names[canonical] = name
                break
            if table.shape != (buckets.count, heads):
                raise ExportError(
                    f"the checkpoint does not fit its config: {name} has shape {list(table.shape)}, the config says "
                    f"{[buckets.count, heads]}"
                )
            names.names.setdefault(canonical, name)
            tables.append(table)
        else:
            names.weights[canonical] = np.stack([bias_by_offset(table, bucket()) for table in tables])


_VARIANTS = (
    Variant("t5", "T5ForConditionalGeneration", "relu", per_layer=False, scaled=None, tokenizer_class="T5Tokenizer"),
    Variant(
        "mt5", "MT5ForConditionalGeneration", "gated-gelu", per_layer=False, scaled=False, tokenizer_class="T5Tokenizer"
    ),
    Variant(
        "umt5",
        "UMT5ForConditionalGeneration",
        "gated-gelu",
        per_layer=True,
        scaled=True,
        tokenizer_class="TokenizersBackend",
    ),
)
VARIANTS: Mapping[str, Variant] = {variant.name: variant for variant in _VARIANTS}
