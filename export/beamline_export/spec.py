"""One description of a Transformer with a decoder, whatever checkpoint it came from.

A family file turns a checkpoint into a `Checkpoint`: a `TransformerSpec` (everything that varies between families, as
a value) and weights under the canonical names that `required_weights` lists. Everything after that knows no family.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, StrEnum

import numpy as np
from numpy.typing import NDArray

from beamline_server.graphs import GraphSizes
from beamline_server.languages import Languages

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


class PaddingInTarget(StrEnum):
    """What position a padding token in a target has, in models that do not number padding."""

    NOWHERE = "nowhere"
    WITH_PREVIOUS = "with_previous"


@dataclass(frozen=True, slots=True)
class UnnumberedPadding:
    """The token that a model does not number (fairseq's `make_positions`).

    In a source it has no position (zeros), and the tokens after it are numbered as if it was not there. In a target,
    which is computed token by token, those after it are numbered as ever.

    Attributes:
        token: Its id.
        in_target: What it has there: no position, or that of the token before it.
    """

    token: int
    in_target: PaddingInTarget


class Norm(Enum):
    """What a normalization takes out of a row: its mean and its deviation, or its root mean square alone (no bias)."""

    LAYER = "layer"
    RMS = "rms"


@dataclass(frozen=True, slots=True)
class RelativePositions:
    """Positions that self-attention alone knows, by distance: numbers that are added to scores, per head.

    Attributes:
        encoder_reach: Distances up to this one have numbers of their own in the encoder, on both sides; greater ones
            have those of the last.
        decoder_reach: The same in the decoder, which looks back alone.
        per_layer: Whether each layer has its own numbers; if not, a stack has one table.
    """

    encoder_reach: int
    decoder_reach: int
    per_layer: bool

    def layers(self, layers: int) -> int:
        """Tables of a stack of so many layers."""
        return layers if self.per_layer else 1


@dataclass(frozen=True, slots=True)
class RotaryPositions:
    """Positions that turn queries and keys (Su et al. 2021): tables of cosines and sines are among the weights.

    Number i of the first half of what is turned and number i of the second half are the two coordinates of a point.

    Attributes:
        width: Numbers of a head that are turned, the first ones; even.
    """

    width: int


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """Everything that varies between Transformers that generate.

    A model without an encoder has no encoder layers; of its source's fields only `max_source_positions` has a meaning:
    the longest prompt.

    Positions are tables among the weights (sinusoidal or learned, offsets already applied: row 0 is position 0), so
    that no family's formula enters the graphs. `embedding_scale` multiplies token embeddings.
    `target_norm_before_positions` is about the embedding norm of the decoder. `attention_width` is that of queries,
    keys and values, all heads together, where it is not `d_model`. A gated feed-forward layer multiplies what it
    computes by the activation of a second product of the same input. `fp32_residual` says of pre-norm models that the
    sums of sub-layers, and what feed-forward layers add to them, grow beyond fp16: its graphs have them in fp32. With
    `parallel_residual`, both sub-layers of a layer read what comes into it, and both add to that. `key_value_heads` are
    those of keys and values where several heads of queries share each, `rotary` are positions that turn queries and
    keys.
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
    target_norm_before_positions: bool = False
    unnumbered_padding: UnnumberedPadding | None = None
    encoder_final_norm: bool = False
    decoder_final_norm: bool = False
    norm_epsilon: float = 1e-5
    norm: Norm = Norm.LAYER
    gated: bool = False
    attention_width: int | None = None
    relative_positions: RelativePositions | None = None
    fp32_residual: bool = False
    parallel_residual: bool = False
    key_value_heads: int | None = None
    rotary: RotaryPositions | None = None

    @property
    def attention(self) -> int:
        """The width of queries, and of what attention gives."""
        return self.attention_width or self.d_model

    @property
    def key_value(self) -> int:
        """The width of keys and values of the decoder's self-attention."""
        return self.attention // self.decoder_heads * (self.key_value_heads or self.decoder_heads)

    @property
    def decoder_only(self) -> bool:
        """Whether there is no encoder."""
        return self.encoder_layers == 0

    @property
    def graph_sizes(self) -> GraphSizes:
        """What its graphs are made by."""
        return GraphSizes(
            self.decoder_layers,
            self.d_model,
            self.target_vocabulary,
            attention=self.attention_width,
            key_value=None if self.key_value_heads is None else self.key_value,
            encoder=not self.decoder_only,
            rotary=self.rotary is not None,
            relative=self.relative_positions is not None,
        )

    def told(self) -> dict[str, object]:
        """All fields as plain values, for people; what only some families have is left out elsewhere."""
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(self).items()}
        usual = {"norm": Norm.LAYER.value, "gated": False, "attention_width": None, "relative_positions": None}
        usual |= {"parallel_residual": False, "key_value_heads": None, "rotary": None, "fp32_residual": False}
        return {name: value for name, value in plain.items() if name not in usual or value != usual[name]}

    def problems(self) -> Iterator[str]:
        """What makes the description impossible."""
        sides = [] if self.decoder_only else [("encoder", self.encoder_heads)]
        for side, heads in (*sides, ("decoder", self.decoder_heads)):
            if heads < 1 or self.attention % heads:
                width = "d_model" if self.attention_width is None else "attention_width"
                yield f"{side}_heads {heads} does not divide {width} {self.attention}"
        if self.decoder_heads % (shared := self.key_value_heads or 1):
            yield f"key_value_heads {shared} does not divide decoder_heads {self.decoder_heads}"
        encoder = () if self.decoder_only else ("encoder_layers", "encoder_ffn")
        for name in (*encoder, "decoder_layers", "decoder_ffn"):
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
        languages: Those that requests can name; None if the model has none.
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
    languages: Languages | None = None
    tokenizer_contents: Mapping[str, bytes] = field(default_factory=dict)


def _linear(name: str, out_features: int, in_features: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out_features, in_features)
    yield f"{name}.bias", (out_features,)


def _norm(spec: TransformerSpec, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (spec.d_model,)
    if spec.norm is Norm.LAYER:
        yield f"{name}.bias", (spec.d_model,)


def _layer(
    spec: TransformerSpec, name: str, ffn: int, attentions: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, wide = spec.d_model, spec.attention
    for attention in attentions:
        yield from _linear(f"{name}.{attention}.query", wide, width)
        for projection in ("key", "value"):
            yield from _linear(f"{name}.{attention}.{projection}", spec.key_value, width)
        yield from _linear(f"{name}.{attention}.output", width, wide)
        yield from _norm(spec, f"{name}.{attention}_norm")
    yield from _linear(f"{name}.ffn.up", ffn, width)
    if spec.gated:
        yield from _linear(f"{name}.ffn.gate", ffn, width)
    yield from _linear(f"{name}.ffn.down", width, ffn)
    yield from _norm(spec, f"{name}.ffn_norm")


def _positions(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Tables of absolute positions, of what turns queries and keys, or of what distances add to scores.

    The last go from the farthest before a token to the farthest behind it in the encoder, in the decoder from 0 on.
    """
    if (rotary := spec.rotary) is not None:
        turned = (spec.max_target_positions, rotary.width // 2)
        return {"rotary_cosine_positions": turned, "rotary_sine_positions": turned}
    if (relative := spec.relative_positions) is None:
        source = {} if spec.decoder_only else {"source_positions": (spec.max_source_positions, spec.d_model)}
        return {**source, "target_positions": (spec.max_target_positions, spec.d_model)}
    layers = relative.layers(spec.encoder_layers), relative.layers(spec.decoder_layers)
    return {
        "encoder.relative_bias": (layers[0], spec.encoder_heads, 2 * relative.encoder_reach + 1),
        "decoder.relative_bias": (layers[1], spec.decoder_heads, relative.decoder_reach + 1),
    }


def required_weights(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight that a model of this spec has."""
    width = spec.d_model
    shapes: dict[str, tuple[int, ...]] = {
        **({} if spec.decoder_only else {"source_embedding": (spec.source_vocabulary, width)}),
        "target_embedding": (spec.target_vocabulary, width),
        **_positions(spec),
        "head.weight": (spec.target_vocabulary, width),
        "head.bias": (spec.target_vocabulary,),
    }
    sides = [] if spec.decoder_only else [("encoder", spec.encoder_final_norm)]
    for side, final_norm in (*sides, ("decoder", spec.decoder_final_norm)):
        if spec.embedding_norm:
            shapes.update(_norm(spec, f"{side}.embedding_norm"))
        if final_norm:
            shapes.update(_norm(spec, f"{side}.final_norm"))
    for i in range(spec.encoder_layers):
        shapes.update(_layer(spec, f"encoder.{i}", spec.encoder_ffn, ("self_attention",)))
    for i in range(spec.decoder_layers):
        attentions = ("self_attention",) if spec.decoder_only else ("self_attention", "cross_attention")
        shapes.update(_layer(spec, f"decoder.{i}", spec.decoder_ffn, attentions))
    return shapes


def check_weights(checkpoint: Checkpoint, advance: Callable[[int], object] = lambda _: None) -> None:
    """Compare a checkpoint's weights with what its spec needs.

    Args:
        checkpoint: As it was read.
        advance: Is told of each weight that is read through, by its bytes.

    Raises:
        ExportError: names the weights that are foreign, missing, of another shape or not finite.
    """
    names = [
        *_names("not part of the model", _foreign(checkpoint), _MOST_FOREIGN),
        *_names("missing", _missing(checkpoint), _MOST_SHOWN),
    ]
    problems = [*checkpoint.spec.problems(), *names, *_shortened(list(_wrong_values(checkpoint, advance)), _MOST_SHOWN)]
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


def _wrong_values(checkpoint: Checkpoint, advance: Callable[[int], object]) -> Iterator[str]:
    for name, shape in required_weights(checkpoint.spec).items():
        shown, weight = checkpoint.weight_names.get(name, name), checkpoint.weights.get(name)
        if weight is not None and weight.shape != shape:
            yield f"{shown} has shape {list(weight.shape)}, the config says {list(shape)}"
        elif weight is not None and not np.isfinite(weight).all():
            yield f"{shown} holds values that are not finite"
        advance(0 if weight is None else weight.nbytes)


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
