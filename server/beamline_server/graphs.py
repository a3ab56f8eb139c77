"""The graph contract as data: names, types and symbolic axes of what goes in and comes out.

`bundle_graphs` says which graphs there are, and in which files. The decoder is one graph where attention is a node of
it (CUDA), and where the engine computes attention itself (CPU), the pieces between the attentions: each computes row by
row, and takes what the attention before it gave, and the residual of the piece before. A model without an encoder is a
decoder in pieces, each layer of which has self-attention alone.

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


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """What the graphs of a model are made by.

    Attributes:
        layers: Of the decoder.
        width: D, of the model's rows.
        vocabulary: Of the target.
        attention: Width of queries, keys and values, all heads together; None if it is D.
        key_value: Width of keys and values where heads of queries share them; None if it is that of queries.
        encoder: Whether there is one, whose output every layer of the decoder attends to.
        rotary: Whether queries and keys are turned by the position of their row.
        relative: Whether self-attention knows the distance of what it attends to.
    """

    layers: int
    width: int
    vocabulary: int
    attention: int | None = None
    key_value: int | None = None
    encoder: bool = True
    rotary: bool = False
    relative: bool = False

    @property
    def query(self) -> int:
        """Width of queries, and of what attention gives."""
        return self.attention or self.width

    @property
    def query_key_value(self) -> int:
        """Width of queries, keys and values of self-attention side by side."""
        return self.query + 2 * (self.key_value or self.query)

    @property
    def last_piece(self) -> int:
        """Number of the piece after the last attention: as many as there are attentions."""
        return (2 if self.encoder else 1) * self.layers

    def before_cross(self, piece: int) -> bool:
        """Whether the attention after this piece is cross-attention."""
        return self.encoder and piece % 2 == 1


def decoder_pieces(sizes: GraphSizes) -> list[str]:
    """Names of the graphs that a decoder step is cut into at its attentions, in their order."""
    return [f"decoder_piece_{number}.onnx" for number in range(sizes.last_piece + 1)]


def graph_files(precision: str, sizes: GraphSizes) -> list[str]:
    """Names of the graphs of a bundle: the decoder is a whole step where CUDA runs it, pieces where the CPU does."""
    pieces = decoder_pieces(sizes)
    if not sizes.encoder:  # no graph for CUDA is one
        return pieces
    whole, pieces = [ENCODER, DECODER_STEP], [ENCODER, *pieces]
    return {"fp16": whole, "int8": pieces, "int4": pieces, "fp32": [*whole, *pieces[1:]]}[precision]


def bundle_graphs(precision: str, cache: ElementType, sizes: GraphSizes) -> dict[str, GraphSpec]:
    """The contracts of all graphs of a bundle, by the names of their files; keys and values are of type `cache`."""
    contracts = {
        ENCODER: encoder_graph(sizes.layers, sizes.query, cache),
        DECODER_STEP: decoder_step_graph(sizes.layers, sizes.query, sizes.vocabulary, cache, relative=sizes.relative),
    }
    for number, name in enumerate(decoder_pieces(sizes)):
        contracts[name] = decoder_piece_graph(number, sizes)
    return {name: contracts[name] for name in graph_files(precision, sizes)}


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


def decoder_step_graph(
    layers: int, width: int, vocabulary: int, cache: ElementType, *, relative: bool = False
) -> GraphSpec:
    """One token for every live row. `candidates` is C, one number; of `logprob`, nothing is copied unless it is bound.

    Graphs of relative positions take the position of each slot's token, too: slots are not in their order.

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
    if relative:
        inputs["slot_positions"] = TensorSpec("int64", ("S", "P"))
    for i in range(layers):
        inputs |= {f"self_k_{i}": pool, f"self_v_{i}": pool, f"cross_k_{i}": rectangle, f"cross_v_{i}": rectangle}
    pools = {f"self_{kind}_{i}_out": pool for i in range(layers) for kind in ("k", "v")}
    outputs = {
        "top_logprob": TensorSpec("float32", ("N", "C")),
        "top_token": TensorSpec("int64", ("N", "C")),
        "logprob": TensorSpec("float32", ("N", vocabulary)),
    }
    return GraphSpec(inputs, {**outputs, **pools})


def decoder_piece_graph(number: int, sizes: GraphSizes) -> GraphSpec:
    """What one decoder piece computes of every live row; the first takes tokens, the last gives scores of all tokens.

    `attended` is what the attention before the piece gave, `residual_in` the `residual` of the piece before.
    `query_key_value` are queries, keys and values of the next self-attention side by side, `query` the queries of the
    next cross-attention.
    """
    ids, rows = TensorSpec("int64", ("N",)), TensorSpec("float32", ("N", sizes.width))
    queries = TensorSpec("float32", ("N", sizes.query))
    inputs = {"ids": ids, "positions": ids} if number == 0 else {"attended": queries, "residual_in": rows}
    if number == sizes.last_piece:
        return GraphSpec(inputs, {"logits": TensorSpec("float32", ("N", sizes.vocabulary))})
    if sizes.before_cross(number):
        return GraphSpec(inputs, {"residual": rows, "query": queries})
    if sizes.rotary:
        inputs["positions"] = ids
    return GraphSpec(inputs, {"residual": rows, "query_key_value": TensorSpec("float32", ("N", sizes.query_key_value))})


def row_parts(width: int) -> tuple[int, int]:
    """How a row of a pool is cut where it is moved in parts: number of parts, elements of one."""
    part = gcd(width, LARGEST_PART)
    return width // part, part
