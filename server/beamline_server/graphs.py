"""The graph contract as data: names, types and symbolic axes of what goes in and comes out.

`bundle_graphs` says which graphs there are, and in which files. The decoder is one graph where attention is a node of
it (CUDA), and where the engine computes attention itself (CPU), the pieces between the attentions: each computes row by
row, and takes what the attention before it gave, and the residual of the piece before.

Axes: S sentences, N rows, Q query length of the attention rectangle, P slots of the self-attention pool, R source
length of the cross-attention rectangle, D width, C candidates per row. Queries, keys and values may be of another width
than the model's rows.

A row is one live hypothesis (decoder) or one source token (encoder); rows of all sentences are packed. `row_of` says
which row stands at each place of the attention rectangle, `back` which place each row came from, so that matrix
products see no padding. The decoder step writes each row's key and value into `slot` (sentence, slot) of its
sentence's pool; `ancestors` says which slots each beam descends from. The pools are outputs only in name: bind them to
the buffers of the inputs and nothing is copied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Literal

Axis = str | int
ElementType = Literal["float32", "float16", "int64", "bool"]
LARGEST_PART = 8
ENCODER = "encoder.onnx"
DECODER_STEP = "decoder_step.onnx"

Precision = Literal["fp32", "fp16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Element type and axes of one graph input or output."""

    element_type: ElementType
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Inputs and outputs of one graph, in order."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


def decoder_pieces(layers: int) -> list[str]:
    """Names of the graphs that a decoder step of so many layers is cut into at its attentions, in their order."""
    return [f"decoder_piece_{number}.onnx" for number in range(2 * layers + 1)]


def decoder_graphs(precision: str, layers: int, *, relative: bool = False) -> list[str]:
    """Names of the decoder's graphs in a bundle: the whole step where CUDA runs it, the pieces where the CPU does.

    With relative positions there is no whole step.
    """
    whole, pieces = [] if relative else [DECODER_STEP], decoder_pieces(layers)
    return {"fp16": whole, "int8": pieces, "int4": pieces, "fp32": [*whole, *pieces]}[precision]


def bundle_graphs(  # noqa: PLR0913 - what graphs differ by
    precision: str,
    cache: ElementType,
    *,
    layers: int,
    width: int,
    vocabulary: int,
    attention: int | None = None,
    relative: bool = False,
) -> dict[str, GraphSpec]:
    """The contracts of all graphs of a bundle, by the names of their files; keys and values are of type `cache`.

    `attention` is the width of queries, keys and values, by default `width`; `relative` as `decoder_graphs`.
    """
    wide = attention or width
    contracts = {
        ENCODER: encoder_graph(layers, wide, cache),
        DECODER_STEP: decoder_step_graph(layers, wide, vocabulary, cache),
    }
    for number, name in enumerate(decoder_pieces(layers)):
        contracts[name] = decoder_piece_graph(number, layers, width, vocabulary, wide)
    return {name: contracts[name] for name in (ENCODER, *decoder_graphs(precision, layers, relative=relative))}


def encoder_graph(layers: int, width: int, cache: ElementType) -> GraphSpec:
    """Source ids to the cross-attention keys and values of every decoder layer."""
    ids = TensorSpec("int64", ("N",))
    rectangle = TensorSpec(cache, ("S", "R", width))
    return GraphSpec(
        inputs={
            "ids": ids,
            "positions": ids,
            "row_of": TensorSpec("int64", ("S", "R")),
            "back": ids,
            "source_length": TensorSpec("int64", ("S",)),
        },
        outputs={f"cross_{kind}_{i}": rectangle for i in range(layers) for kind in ("k", "v")},
    )


def decoder_step_graph(layers: int, width: int, vocabulary: int, cache: ElementType) -> GraphSpec:
    """One token for every live row. `candidates` is C, one number; of `logprob`, nothing is copied unless it is bound.

    fp16 graphs are made for CUDA: `ancestors`, which is boolean elsewhere, is additive (0 or a large negative number),
    which the kernels take without a conversion per layer, and pools have their rows in parts, whose numbers are added
    to the last number of `slot`, a zero.
    """
    ids = TensorSpec("int64", ("N",))
    half = cache == "float16"
    pool = TensorSpec(cache, ("S", "P", *row_parts(width)) if half else ("S", "P", width))
    rectangle = TensorSpec(cache, ("S", "R", width))
    mask: ElementType = "float16" if half else "bool"
    inputs = {
        "ids": ids,
        "positions": ids,
        "slot": TensorSpec("int64", ("N", 1, 3) if half else ("N", 2)),
        "row_of": TensorSpec("int64", ("S", "Q")),
        "back": ids,
        "ancestors": TensorSpec(mask, ("S", 1, "Q", "P")),
        "source_length": TensorSpec("int64", ("S",)),
        "candidates": TensorSpec("int64", (1,)),
    }
    for i in range(layers):
        inputs |= {f"self_k_{i}": pool, f"self_v_{i}": pool, f"cross_k_{i}": rectangle, f"cross_v_{i}": rectangle}
    pools = {f"self_{kind}_{i}_out": pool for i in range(layers) for kind in ("k", "v")}
    outputs = {
        "top_logprob": TensorSpec("float32", ("N", "C")),
        "top_token": TensorSpec("int64", ("N", "C")),
        "logprob": TensorSpec("float32", ("N", vocabulary)),
    }
    return GraphSpec(inputs, {**outputs, **pools})


def decoder_piece_graph(
    number: int, layers: int, width: int, vocabulary: int, attention: int | None = None
) -> GraphSpec:
    """What one decoder piece computes of every live row; the first takes tokens, the last gives scores of all tokens.

    `attended` is what the attention before the piece gave, `residual_in` the `residual` of the piece before.
    `query_key_value` are queries, keys and values of the next self-attention side by side, `query` the queries of the
    next cross-attention; these, and what attention gives, are `attention` wide, by default as rows are.
    """
    rows, attended = TensorSpec("float32", ("N", width)), TensorSpec("float32", ("N", attention or width))
    ids = TensorSpec("int64", ("N",))
    inputs = {"ids": ids, "positions": ids} if number == 0 else {"attended": attended, "residual_in": rows}
    if number == 2 * layers:
        return GraphSpec(inputs, {"logits": TensorSpec("float32", ("N", vocabulary))})
    if number % 2:
        return GraphSpec(inputs, {"residual": rows, "query": attended})
    return GraphSpec(
        inputs, {"residual": rows, "query_key_value": TensorSpec("float32", ("N", 3 * (attention or width)))}
    )


def row_parts(width: int) -> tuple[int, int]:
    """How a row of a pool is cut where it is moved in parts: number of parts, elements of one."""
    part = gcd(width, LARGEST_PART)
    return width // part, part
