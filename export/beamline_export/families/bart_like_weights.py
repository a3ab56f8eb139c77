"""Names of the weights of BART and its relatives in Hugging Face's implementation."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from beamline_export.families.positions import Table
from beamline_export.renamer import Renamer
from beamline_export.spec import Array, ExportError, TransformerSpec

SHARED = "model.shared.weight"
SOURCE = "model.encoder.embed_tokens.weight"
TARGET = "model.decoder.embed_tokens.weight"
HEAD = "lm_head.weight"
_PARTS = ("shared.", "encoder.", "decoder.")


@dataclass(frozen=True, slots=True)
class Ties:
    """Which embedding tables are one.

    Attributes:
        head: Whether the head is the target embedding; where it is not, transformers ties nothing.
        sides: Whether source and target have one embedding.
        stated: Whether the config says that the head is.
    """

    head: bool
    sides: bool
    stated: bool = True


@dataclass(frozen=True, slots=True)
class Tables:
    """Names of the embeddings.

    Attributes:
        head: That of the head.
        tied: Those of all that may be one: transformers take the first that a file has for those that it lacks.
        shared: That of the table that is saved beside those that it is.
        source: That of the encoder.
        target: That of the decoder.
    """

    head: str = HEAD
    tied: tuple[str, ...] = (SHARED, HEAD, TARGET, SOURCE)
    shared: str = SHARED
    source: str = SOURCE
    target: str = TARGET


def rename(
    spec: TransformerSpec,
    ties: Ties,
    state: Mapping[str, Array],
    *,
    tables: Tables,
    head_bias: bool,
    positions: int | Table,
) -> Renamer:
    """The weights of a state dict by their canonical names.

    Args:
        spec: The architecture.
        ties: Which embeddings are one.
        state: The checkpoint's tensors; one that was saved as a bare model, without its head, is the same.
        tables: Names of the embeddings.
        head_bias: Whether the model has a `final_logits_bias`.
        positions: The row of position 0 in a learned table, or what computes a table that the file lacks.
    """
    if state and all(name.startswith(_PARTS) for name in state):
        state = {f"model.{name}": array for name, array in state.items()}
    names = Renamer(state)
    take_embeddings(names, ties, tables)
    if head_bias:
        names.take("head.bias", "final_logits_bias")
    # transformers leave it out where it is zero.
    bias = names.weights.get("head.bias", np.zeros(spec.target_vocabulary, np.float32))
    names.weights["head.bias"] = bias.reshape(-1)
    names.ignore(r"model\.(encoder|decoder)\.version")
    if isinstance(positions, int):
        _take_learned_positions(names, positions)
    else:
        _take_or_compute_positions(names, spec, positions)
    for side in ("encoder", "decoder"):
        if spec.embedding_norm:
            names.module(f"{side}.embedding_norm", f"model.{side}.layernorm_embedding")
        if spec.encoder_final_norm:
            names.module(f"{side}.final_norm", f"model.{side}.layer_norm")
    _take_layers(names, spec)
    return names


def _take_learned_positions(names: Renamer, offset: int) -> None:
    for side, positions in (("encoder", "source_positions"), ("decoder", "target_positions")):
        names.take(positions, f"model.{side}.embed_positions.weight")
        if names.weights.get(positions, np.float32(0)).ndim:
            names.weights[positions] = names.weights[positions][offset:]


def _take_or_compute_positions(names: Renamer, spec: TransformerSpec, table: Table) -> None:
    """Some checkpoints carry the tables, which transformers then read; for the others they compute them.

    Buffers called `weights` (M2M100) are what transformers compute anew.
    """
    names.ignore(r"model\.(encoder|decoder)\.embed_positions\.(weights|_float_tensor)")
    padding = spec.unnumbered_padding
    first = 0 if padding is None else padding.token + 1
    for side, positions in (("encoder", "source_positions"), ("decoder", "target_positions")):
        if names.has(name := f"model.{side}.embed_positions.weight"):
            names.take(positions, name)
            if first and names.weights[positions].ndim:
                names.weights[positions] = _after_padding(names.weights[positions], first, name)
    names.share_equal("source_positions", "target_positions")
    names.compute_positions(spec.max_source_positions, spec.d_model, lambda n, width: table(first + n, width)[first:])


def _after_padding(table: Array, first: int, name: str) -> Array:
    """The rows of a file's table from that of position 0 on."""
    if table[first - 1 : first].any():
        raise ExportError(
            f"{name}: row {first - 1}, of padding, is not zero, which is not supported; remove the table from the file "
            "(it is computed then), or save the model again"
        )
    return table[first:]


def take_embeddings(names: Renamer, ties: Ties, tables: Tables) -> None:
    """Source and target embedding and the head, as transformers loads them.

    A table that the file has is used as it is, whatever the config ties; one that it lacks is the first of those that
    it is tied to.
    """
    named = {"source_embedding": tables.source, "target_embedding": tables.target, "head.weight": tables.head}
    tied = tables.tied if ties.sides else (tables.head, tables.target)
    tied = tied if ties.head else ()
    for canonical, name in named.items():
        names.take(canonical, name, *(other for other in tied if name in tied and other != name))
    names.share_equal(*named)
    if ties.head and ties.stated:
        names.tell_untied(
            "tie_word_embeddings is true", *(named if ties.sides else ("target_embedding", "head.weight"))
        )
    if ties.head and ties.sides and not named.keys() & names.weights.keys():
        names.names |= dict.fromkeys(named, tied[0])
    elif named.keys() <= names.weights.keys():
        names.leave_out(tables.shared)  # which transformers loads and does not use


def _take_layers(names: Renamer, spec: TransformerSpec) -> None:
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
