"""What the tensors of an encoder-decoder Transformer in plain PyTorch are called, by who wrote the module."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from beamline_export.renamer import Renamer
from beamline_export.spec import Array, TransformerSpec

SOURCE_POSITIONS, TARGET_POSITIONS = "src_positions.weight", "tgt_positions.weight"
SHARED_POSITIONS = "positions.weight"
LEARNED_POSITIONS = {SOURCE_POSITIONS, TARGET_POSITIONS, SHARED_POSITIONS}
"""Tables of learned positions, in any layout."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of tensors, and what of a model the layout decides.

    Attributes:
        source_embedding: Name of the source embedding.
        target_embedding: Name of the target embedding.
        generator: Name of the linear layer that gives the logits.
        take_stacks: Takes all layers and final norms.
        fixed: Keys of config.json that can have one value alone.
        norm_epsilon: What layer norms add, if config.json does not say.
        unbiased_norms: Whether layer norms divide by the unbiased standard deviation, to which epsilon is then added.
    """

    source_embedding: str
    target_embedding: str
    generator: str
    take_stacks: Callable[[Renamer, TransformerSpec], None]
    fixed: Mapping[str, object] = field(default_factory=dict)
    norm_epsilon: float = 1e-5
    unbiased_norms: bool = False


def _take_torch_stacks(names: Renamer, spec: TransformerSpec) -> None:
    """The stacks of a `torch.nn.Transformer`."""
    for side, i in _layers(spec):
        _take_torch_layer(names, side, i)
    for side in _final_norms(spec):
        names.module(f"{side}.final_norm", f"transformer.{side}.norm")


def _take_torch_layer(names: Renamer, side: str, i: int) -> None:
    here, there = f"{side}.{i}", f"transformer.{side}.layers.{i}"
    attentions = {"self_attention": ("self_attn", "norm1")}
    if side == "decoder":
        attentions["cross_attention"] = ("multihead_attn", "norm2")
    for attention, (name, norm) in attentions.items():
        names.thirds([f"{here}.{attention}.{p}" for p in ("query", "key", "value")], f"{there}.{name}.in_proj_")
        names.module(f"{here}.{attention}.output", f"{there}.{name}.out_proj")
        names.module(f"{here}.{attention}_norm", f"{there}.{norm}")
    names.module(f"{here}.ffn.up", f"{there}.linear1")
    names.module(f"{here}.ffn.down", f"{there}.linear2")
    names.module(f"{here}.ffn_norm", f"{there}.{'norm3' if side == 'decoder' else 'norm2'}")


def _take_annotated_stacks(names: Renamer, spec: TransformerSpec) -> None:
    """The stacks of the Annotated Transformer."""
    for side, i in _layers(spec):
        here, there = f"{side}.{i}", f"{side}.layers.{i}"
        attentions = {"self_attention": "self_attn"} | ({"cross_attention": "src_attn"} if side == "decoder" else {})
        for attention, name in attentions.items():
            for number, projection in enumerate(("query", "key", "value", "output")):
                names.module(f"{here}.{attention}.{projection}", f"{there}.{name}.linears.{number}")
        names.module(f"{here}.ffn.up", f"{there}.feed_forward.w_1")
        names.module(f"{here}.ffn.down", f"{there}.feed_forward.w_2")
        for number, part in enumerate((*attentions, "ffn")):
            _take_unbiased_norm(names, f"{here}.{part}_norm", f"{there}.sublayer.{number}.norm")
    for side in _final_norms(spec):
        _take_unbiased_norm(names, f"{side}.final_norm", f"{side}.norm")


def _take_unbiased_norm(names: Renamer, canonical: str, name: str) -> None:
    """A norm that divides by the unbiased deviation: as one that divides by the other, with a smaller gain."""
    names.take(f"{canonical}.weight", f"{name}.a_2")
    names.take(f"{canonical}.bias", f"{name}.b_2")
    gain = names.weights.get(f"{canonical}.weight")
    if gain is not None:
        names.weights[f"{canonical}.weight"] = _folded_gain(gain)


def _folded_gain(gain: Array) -> Array:
    width = gain.size
    result: Array = (gain * np.sqrt((width - 1) / width)).astype(np.float32)
    return result


def folded_epsilon(epsilon: float, width: int) -> float:
    """What stands under the root for an epsilon that is added to an unbiased deviation.

    Exact where the deviation is far above epsilon, and where it is zero: a row of equal numbers becomes the bias.
    """
    return epsilon**2 * (width - 1) / width


def _layers(spec: TransformerSpec) -> Iterator[tuple[str, int]]:
    yield from (("encoder", i) for i in range(spec.encoder_layers))
    yield from (("decoder", i) for i in range(spec.decoder_layers))


def _final_norms(spec: TransformerSpec) -> Iterator[str]:
    if spec.encoder_final_norm:
        yield "encoder"
    if spec.decoder_final_norm:
        yield "decoder"


LAYOUTS = {
    "beamline": Layout("src_embed.weight", "tgt_embed.weight", "generator", _take_torch_stacks),
    "pytorch_tutorial": Layout(
        "src_tok_emb.embedding.weight", "tgt_tok_emb.embedding.weight", "generator", _take_torch_stacks
    ),
    "annotated_transformer": Layout(
        "src_embed.0.lut.weight",
        "tgt_embed.0.lut.weight",
        "generator.proj",
        _take_annotated_stacks,
        {"norm_first": True, "final_norm": True},
        norm_epsilon=1e-6,
        unbiased_norms=True,
    ),
}
"""By the name that config.json calls them."""
