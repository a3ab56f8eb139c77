"""One description of an encoder-decoder Transformer, whatever checkpoint it came from.

A family file turns a checkpoint into a `Checkpoint`: a `TransformerSpec` (everything that varies between families, as
a value) and weights under the canonical names that `required_weights` lists. Everything after that knows no family.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# Of a kind, in a message. Who translates names wants to see what there is.
_MOST_FOREIGN, _MOST_SHOWN = 24, 6


class ExportError(Exception):
    """The checkpoint cannot be exported; the text says why and what to do."""


class NormPlacement(Enum):
    """Where layer normalization stands: after each residual sum (the paper), or before each sub-layer."""

    POST = "post"
    PRE = "pre"


class Activation(Enum):
    """Activation of the feed-forward layers."""

    RELU = "relu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """Everything that varies between encoder-decoder Transformers.

    Positions are tables among the weights (sinusoidal or learned, offsets already applied: row 0 is position 0), so
    that no family's formula enters the graphs. `embedding_scale` multiplies token embeddings.
    """

    architecture: str
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_ffn: int
    decoder_ffn: int
    norm_placement: NormPlacement
    activation: Activation
    source_vocabulary: int
    target_vocabulary: int
    max_source_positions: int
    max_target_positions: int
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    encoder_final_norm: bool = False
    decoder_final_norm: bool = False
    norm_epsilon: float = 1e-5

    def problems(self) -> Iterator[str]:
        """What makes the description impossible."""
        for side, heads in (("encoder_heads", self.encoder_heads), ("decoder_heads", self.decoder_heads)):
            if heads < 1 or self.d_model % heads:
                yield f"{side} {heads} does not divide d_model {self.d_model}"
        for name in ("encoder_layers", "decoder_layers", "encoder_ffn", "decoder_ffn"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be at least 1"
        for name in ("max_source_positions", "max_target_positions"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be at least 1"


@dataclass(frozen=True, slots=True)
class SpecialTokenIds:
    """Ids with a meaning to the search; `source_*` are what a tokenizer adds to text."""

    decoder_start: int
    eos: tuple[int, ...]
    source_eos: int | None = None
    source_bos: int | None = None
    pad: int | None = None
    forced_bos: int | None = None
    forced_eos: int | None = None
    banned: tuple[int, ...] = ()
    banned_at_start: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a family file reads out of a checkpoint.

    Attributes:
        spec: The architecture.
        weights: Canonical name -> array, linear layers as PyTorch stores them (out, in). Two names may share one
            array object; it is then stored once.
        special_tokens: Ids with a meaning.
        generation: Search defaults by the names of the bundle's `GenerationDefaults`.
        tokenizer_kind: As in the bundle's `TokenizerEntry`.
        tokenizer_files: Name in the bundle -> name in the checkpoint folder.
        tokenizer_contents: Name in the bundle -> content of what the folder holds in another form only.
        removed_tokens: Ids that are taken out before the softmax, so that what they had goes to all others: what
            Hugging Face's `renormalize_logits` makes of banned tokens.
        weight_names: Canonical name -> name in the checkpoint, for messages.
        foreign: Name of a tensor in the checkpoint that is no part of the model -> its shape, and what it seems to be.
        advice: What to do about names that do not fit.
        tokenizer_settings: Further fields of the bundle's `TokenizerEntry`.
        notices: What the user should know about the checkpoint, a line each.
    """

    spec: TransformerSpec
    weights: Mapping[str, Array]
    special_tokens: SpecialTokenIds
    generation: Mapping[str, object]
    tokenizer_kind: str
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)
    removed_tokens: tuple[int, ...] = ()
    weight_names: Mapping[str, str] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)
    advice: str = ""
    tokenizer_settings: Mapping[str, object] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    tokenizer_contents: Mapping[str, bytes] = field(default_factory=dict)


def _linear(name: str, out_features: int, in_features: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out_features, in_features)
    yield f"{name}.bias", (out_features,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _layer(name: str, width: int, ffn: int, attentions: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for attention in attentions:
        for projection in ("query", "key", "value", "output"):
            yield from _linear(f"{name}.{attention}.{projection}", width, width)
        yield from _norm(f"{name}.{attention}_norm", width)
    yield from _linear(f"{name}.ffn.up", ffn, width)
    yield from _linear(f"{name}.ffn.down", width, ffn)
    yield from _norm(f"{name}.ffn_norm", width)


def required_weights(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight that a model of this spec has."""
    width = spec.d_model
    shapes: dict[str, tuple[int, ...]] = {
        "source_embedding": (spec.source_vocabulary, width),
        "target_embedding": (spec.target_vocabulary, width),
        "source_positions": (spec.max_source_positions, width),
        "target_positions": (spec.max_target_positions, width),
        "head.weight": (spec.target_vocabulary, width),
        "head.bias": (spec.target_vocabulary,),
    }
    for side, final_norm in (("encoder", spec.encoder_final_norm), ("decoder", spec.decoder_final_norm)):
        if spec.embedding_norm:
            shapes.update(_norm(f"{side}.embedding_norm", width))
        if final_norm:
            shapes.update(_norm(f"{side}.final_norm", width))
    for i in range(spec.encoder_layers):
        shapes.update(_layer(f"encoder.{i}", width, spec.encoder_ffn, ("self_attention",)))
    for i in range(spec.decoder_layers):
        shapes.update(_layer(f"decoder.{i}", width, spec.decoder_ffn, ("self_attention", "cross_attention")))
    return shapes


def check_weights(checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's weights with what its spec needs.

    Raises:
        ExportError: names the weights that are foreign, missing, of another shape or not finite.
    """
    names = [
        *_names("not part of the model", _foreign(checkpoint), _MOST_FOREIGN),
        *_names("missing", _missing(checkpoint), _MOST_SHOWN),
    ]
    problems = [*checkpoint.spec.problems(), *names, *_shortened(list(_wrong_values(checkpoint)), _MOST_SHOWN)]
    if names and checkpoint.advice:
        problems.append(checkpoint.advice)
    if problems:
        raise ExportError(f"the checkpoint does not fit its config: {'; '.join(problems)}")


def _foreign(checkpoint: Checkpoint) -> list[str]:
    return [f"{name} {what}" for name, what in checkpoint.foreign.items()]


def _missing(checkpoint: Checkpoint) -> list[str]:
    names = checkpoint.weight_names
    missing = [name for name in required_weights(checkpoint.spec) if name not in checkpoint.weights]
    # Tables that are computed have no name in the file, and lack only where something else does.
    return [names[name] for name in missing if name in names] or missing


def _wrong_values(checkpoint: Checkpoint) -> Iterator[str]:
    for name, shape in required_weights(checkpoint.spec).items():
        shown, weight = checkpoint.weight_names.get(name, name), checkpoint.weights.get(name)
        if weight is not None and weight.shape != shape:
            yield f"{shown} has shape {list(weight.shape)}, the config says {list(shape)}"
        elif weight is not None and not np.isfinite(weight).all():
            yield f"{shown} holds values that are not finite"


def _names(problem: str, names: list[str], most: int) -> Iterator[str]:
    """One line with all names; those that differ in the number of a layer alone are one, and come last."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", name), set()).add(name)
    ordered = sorted(groups.items(), key=lambda group: len(group[1]) > 1)
    shown = [min(own) if len(own) == 1 else f"{form} ({len(own)} times)" for form, own in ordered]
    if shown:
        yield f"{problem}: {', '.join(_shortened(shown, most))}"


def _shortened(items: list[str], most: int) -> list[str]:
    return items if len(items) <= most else [*items[:most], f"and {len(items) - most} more"]
