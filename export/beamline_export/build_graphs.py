"""Spec and weights to ONNX graphs, node by node (contracts: graphs.py)."""

import numpy as np
import onnx

from beamline_export.graph_writer import GraphWriter, WeightsFile
from beamline_export.layers import Layers, Rectangle
from beamline_export.precision import WeightStore
from beamline_export.spec import Checkpoint, TransformerSpec
from beamline_server.graphs import DECODER_STEP, ENCODER, ElementType, GraphSpec, bundle_graphs, decoder_pieces

_ATTENTION_RECTANGLE = Rectangle("row_of", "back")


def build_graphs(
    checkpoint: Checkpoint, store: WeightStore, precision: str, weights: WeightsFile
) -> dict[str, onnx.ModelProto]:
    """All graphs of a bundle of this precision, by the names of their files."""
    pieces = decoder_pieces(checkpoint.spec.graph_sizes)
    graphs = {}
    for name, contract in contracts(checkpoint.spec, precision, store.cache).items():
        layers = Layers(GraphWriter(weights), checkpoint, store)
        if name == ENCODER:
            _encoder(layers, contract)
        elif name == DECODER_STEP:
            _decoder_step(layers)
        else:
            _give(layers.g, _decoder_part(layers, pieces.index(name)))
        graphs[name] = layers.g.model(name.removesuffix(".onnx"), contract)
    return graphs


def contracts(spec: TransformerSpec, precision: str, cache: ElementType) -> dict[str, GraphSpec]:
    """What the graphs of a bundle of this precision promise, by the names of their files."""
    return bundle_graphs(precision, cache, spec.graph_sizes)


def _encoder(layers: Layers, contract: GraphSpec) -> None:
    """The encoder, and the cross-attention keys and values of every decoder layer."""
    g, spec = layers.g, layers.spec
    x = layers.embed("source", "ids", "positions")
    for i in range(spec.encoder_layers):
        name = f"encoder.{i}"
        y = layers.before(x, f"{name}.self_attention_norm")
        query, key, value = layers.split(layers.query_key_value(y, f"{name}.self_attention"), 3)
        rectangles = (g.one("Gather", key, "row_of"), g.one("Gather", value, "row_of"))
        # No mask: source_length hides the padding of the rectangle.
        masks = [layers.encoder_bias(i), "", "", "source_length"]
        y = layers.attention(query, rectangles, masks, _ATTENTION_RECTANGLE, spec.encoder_heads)
        x = layers.after(x, layers.output(y, f"{name}.self_attention"), f"{name}.self_attention_norm")
        x = layers.feed_forward(x, name)
    if spec.encoder_final_norm:
        x = layers.norm(x, "encoder.final_norm")
    for packed, output in zip(layers.cross_keys_values(x), contract.outputs, strict=True):
        g.output(g.one("Gather", packed, "row_of"), output)


def _decoder_step(layers: Layers) -> None:
    """One decoder step: all parts with their attentions between them, and the choice of candidates.

    Always takes a past, of length 0 at the start.
    """
    g = layers.g
    masks = _masks(layers)
    values = _decoder_part(layers, 0)
    for i in range(layers.spec.decoder_layers):
        attended = _self_attention(layers, i, values["query_key_value"], masks[i])
        values = _decoder_part(layers, 2 * i + 1, attended, values["residual"])
        attended = _cross_attention(layers, i, values["query"])
        values = _decoder_part(layers, 2 * i + 2, attended, values["residual"])
    logprob = g.one("LogSoftmax", values["logits"], axis=-1)
    top_logprob, top_token = g.op("TopK", [logprob, "candidates"], outputs=2, axis=-1)
    _give(g, {"top_logprob": top_logprob, "top_token": top_token, "logprob": logprob})


def _masks(layers: Layers) -> list[str]:
    """What is added to the scores of self-attention in each layer, (S, 1 or H, Q, P)."""
    g, spec, half = layers.g, layers.spec, layers.store.cache == "float16"
    if spec.relative_positions is None:
        return ["ancestors" if half else _additive_mask(g, g.constant(0.0, np.float32))] * spec.decoder_layers
    made = [g.one("Add", b, "ancestors") if half else _additive_mask(g, b) for b in layers.decoder_biases()]
    return made if spec.relative_positions.per_layer else made * spec.decoder_layers


def _give(g: GraphWriter, values: dict[str, str]) -> None:
    for output, value in values.items():
        g.output(value, output)


def _self_attention(layers: Layers, i: int, query_key_value: str, mask: str) -> str:
    query, key, value = layers.split(query_key_value, 3)
    pools = (layers.write(f"self_k_{i}", key), layers.write(f"self_v_{i}", value))
    return layers.attention(query, pools, [mask], _ATTENTION_RECTANGLE, layers.spec.decoder_heads)


def _cross_attention(layers: Layers, i: int, query: str) -> str:
    memory, masks = (f"cross_k_{i}", f"cross_v_{i}"), ["", "", "", "source_length"]
    return layers.attention(query, memory, masks, _ATTENTION_RECTANGLE, layers.spec.decoder_heads)


def _decoder_part(
    layers: Layers, number: int, attended: str = "attended", residual: str = "residual_in"
) -> dict[str, str]:
    """What the decoder computes row by row between two attentions, before the first or after the last.

    Args:
        layers: Where the nodes go.
        number: 0 before the first attention; 2 i + 1 after the self-attention of layer i; 2 i + 2 after its
            cross-attention. Without an encoder, i + 1 after the self-attention of layer i.
        attended: What the attention before gives, (N, D).
        residual: What the part before gives on, (N, D).

    Returns:
        Values by the names that a piece's outputs have.
    """
    if number == 0:
        return _to_self_attention(layers, 0, layers.embed("target", "ids", "positions"))
    if layers.spec.decoder_only:
        return _decoder_layer(layers, number - 1, attended, residual)
    i, after_cross = divmod(number - 1, 2)
    attention = f"decoder.{i}.{'cross' if after_cross else 'self'}_attention"
    x = layers.after(residual, layers.output(attended, attention), f"{attention}_norm")
    if not after_cross:
        return _to_cross_attention(layers, i, x)
    return _to_next_layer(layers, i, layers.feed_forward(x, f"decoder.{i}"))


def _decoder_layer(layers: Layers, i: int, attended: str, residual: str) -> dict[str, str]:
    """What a decoder without an encoder computes after the attention of layer i."""
    name = f"decoder.{i}"
    y = layers.output(attended, f"{name}.self_attention")
    if layers.spec.parallel_residual:
        both = layers.g.one("Add", y, layers.fed_forward(residual, name))
        return _to_next_layer(layers, i, layers.g.one("Add", residual, both))
    x = layers.after(residual, y, f"{name}.self_attention_norm")
    return _to_next_layer(layers, i, layers.feed_forward(x, name))


def _to_next_layer(layers: Layers, i: int, x: str) -> dict[str, str]:
    """From the end of layer i to the next attention, or to the scores of all tokens."""
    last = i + 1 == layers.spec.decoder_layers
    return {"logits": _logits(layers, x)} if last else _to_self_attention(layers, i + 1, x)


def _to_self_attention(layers: Layers, i: int, x: str) -> dict[str, str]:
    name = f"decoder.{i}.self_attention"
    return {"residual": x, "query_key_value": layers.query_key_value(layers.before(x, f"{name}_norm"), name)}


def _to_cross_attention(layers: Layers, i: int, x: str) -> dict[str, str]:
    name = f"decoder.{i}.cross_attention"
    return {"residual": x, "query": layers.query(layers.before(x, f"{name}_norm"), name)}


def _logits(layers: Layers, x: str) -> str:
    """Scores of all tokens after the last layer."""
    return layers.logits(layers.norm(x, "decoder.final_norm") if layers.spec.decoder_final_norm else x)


def _additive_mask(g: GraphWriter, attended: str) -> str:
    """What is added to attention scores by `ancestors`: `attended` for these.

    A boolean mask would be converted in every layer. Finite, so that the rectangle's places where nobody stands give no
    NaN; far below any score, so that what is masked has a weight of exactly zero.
    """
    return g.one("Where", "ancestors", attended, g.constant(-1e30, np.float32))
