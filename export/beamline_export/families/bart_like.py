"""What Marian and BART share in Hugging Face's implementation: layer names, embeddings, config fields."""

import math
from dataclasses import dataclass
from typing import Any

from beamline_export.checkpoint import MOST_LAYERS, MOST_POSITIONS, Fields
from beamline_export.families.activations import ACTIVATIONS
from beamline_export.renamer import Renamer
from beamline_export.spec import NormPlacement, TransformerSpec

_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Ties:
    """Which embedding tables are one.

    Attributes:
        head: Whether the head is the target embedding; where it is not, transformers ties nothing.
        sides: Whether source and target have one embedding.
        told: Whether the config says that the head is.
    """

    head: bool
    sides: bool
    told: bool = True


def read_spec(fields: Fields, architecture: str, target_vocabulary: int | None, **more: Any) -> TransformerSpec:
    """The spec, but for what `more` says; the target vocabulary is by default the source's."""
    d_model, vocabulary = fields.integer("d_model"), fields.integer("vocab_size", least=2)
    positions = fields.integer("max_position_embeddings", most=MOST_POSITIONS)
    # Whatever generation_config.json says: transformers make the embedding with it.
    if (pad := fields.optional_id("pad_token_id")) is not None and pad >= vocabulary and not fields.problems:
        fields.problems.append(
            f"pad_token_id {pad} is outside the source vocabulary of {vocabulary} (0 to {vocabulary - 1}); "
            "correct or remove it"
        )
    return TransformerSpec(
        architecture=architecture,
        d_model=d_model,
        encoder_layers=fields.integer("encoder_layers", most=MOST_LAYERS),
        decoder_layers=fields.integer("decoder_layers", most=MOST_LAYERS),
        encoder_heads=fields.integer("encoder_attention_heads"),
        decoder_heads=fields.integer("decoder_attention_heads"),
        encoder_ffn=fields.integer("encoder_ffn_dim"),
        decoder_ffn=fields.integer("decoder_ffn_dim"),
        norm_placement=NormPlacement.POST,
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu"),
        source_vocabulary=vocabulary,
        target_vocabulary=vocabulary if target_vocabulary is None else target_vocabulary,
        max_source_positions=positions,
        max_target_positions=positions,
        embedding_scale=math.sqrt(d_model) if fields.flag("scale_embedding", False) else 1.0,
        **more,
    )


def take_embeddings(names: Renamer, ties: Ties, model: str = "model.") -> None:
    """Source and target embedding and the head, as transformers loads them; names of the model begin with `model`.

    A table that the file has is used as it is, whatever the config ties; one that it lacks is the first of those that
    it is tied to.
    """
    shared = f"{model}shared.weight"
    source, target = (f"{model}{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
    tables = {"source_embedding": source, "target_embedding": target, "head.weight": _HEAD}
    tied: tuple[str, ...] = ()
    if ties.head:
        # What a tied table is where the file lacks it: the first of these that the file has.
        tied = (shared, _HEAD, target, source) if ties.sides else (_HEAD, target)
    for canonical, name in tables.items():
        names.take(canonical, name, *(other for other in tied if name in tied and other != name))
    names.share_equal(*tables)
    if ties.head and ties.told:
        names.tell_untied(
            "tie_word_embeddings is true", *(tables if ties.sides else ("target_embedding", "head.weight"))
        )
    if ties.head and ties.sides and not tables.keys() & names.weights.keys():
        names.names |= dict.fromkeys(tables, shared)
    elif tables.keys() <= names.weights.keys():
        names.leave_out(shared)  # which transformers loads and does not use


def take_layers(names: Renamer, spec: TransformerSpec) -> None:
    """The layers of both stacks."""
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    for side, layers in (("encoder", spec.encoder_layers), ("decoder", spec.decoder_layers)):
        attentions = {"self_attention": "self_attn"}
        if side == "decoder":
            attentions["cross_attention"] = "encoder_attn"
        for i in range(layers):
            here, there = f"{side}.{i}", f"model.{side}.layers.{i}"
            for attention, name in attentions.items():
                for projection, its_name in projections.items():
                    names.module(f"{here}.{attention}.{projection}", f"{there}.{name}.{its_name}")
                names.module(f"{here}.{attention}_norm", f"{there}.{name}_layer_norm")
            names.module(f"{here}.ffn.up", f"{there}.fc1")
            names.module(f"{here}.ffn.down", f"{there}.fc2")
            names.module(f"{here}.ffn_norm", f"{there}.final_layer_norm")
