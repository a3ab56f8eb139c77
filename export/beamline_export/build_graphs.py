"""Spec and weights to ONNX graphs, node by node (contracts: graphs.py)."""

import numpy as np
import onnx

from beamline_export.graph_writer import GraphWriter, WeightsFile
from beamline_export.graphs import decoder_step_graph, encoder_graph
from beamline_export.layers import Layers, Rectangle
from beamline_export.precision import WeightStore
from beamline_export.spec import Checkpoint

_ATTENTION_RECTANGLE = Rectangle("row_of", "back")


def build_encoder(checkpoint: Checkpoint, store: WeightStore, weights: WeightsFile) -> onnx.ModelProto:
    """The encoder, and the cross-attention keys and values of every decoder layer."""
    g = GraphWriter(weights)
    layers = Layers(g, checkpoint, store)
    spec = checkpoint.spec
    x = layers.embed("source", "ids", "positions")
    for i in range(spec.encoder_layers):
        name = f"encoder.{i}"
        y = layers.before(x, f"{name}.self_attention_norm")
        query, key, value = layers.query_key_value(y, f"{name}.self_attention")
        rectangles = (g.one("Gather", key, "row_of"), g.one("Gather", value, "row_of"))
        # No mask: source_length hides the padding of the rectangle.
        y = layers.attention(query, rectangles, ["", "", "", "source_length"], _ATTENTION_RECTANGLE, spec.encoder_heads)
        x = layers.after(x, layers.output(y, f"{name}.self_attention"), f"{name}.self_attention_norm")
        x = layers.feed_forward(x, name)
    if spec.encoder_final_norm:
        x = layers.norm(x, "encoder.final_norm")
    contract = encoder_graph(spec.decoder_layers, spec.d_model, store.cache)
    for packed, output in zip(layers.cross_keys_values(x), contract.outputs, strict=True):
        g.named("Gather", [packed, "row_of"], output)
    return g.model("encoder", contract)


def build_decoder_step(checkpoint: Checkpoint, store: WeightStore, weights: WeightsFile) -> onnx.ModelProto:
    """One decoder step: always takes a past, of length 0 at the start."""
    g = GraphWriter(weights)
    layers = Layers(g, checkpoint, store)
    spec = checkpoint.spec
    mask = _additive_mask(g) if store.cache == "float32" else "ancestors"
    x = layers.embed("target", "ids", "positions")
    for i in range(spec.decoder_layers):
        name = f"decoder.{i}"
        y = layers.before(x, f"{name}.self_attention_norm")
        query, key, value = layers.query_key_value(y, f"{name}.self_attention")
        pools = (layers.write(f"self_k_{i}", key), layers.write(f"self_v_{i}", value))
        y = layers.attention(query, pools, [mask], _ATTENTION_RECTANGLE, spec.decoder_heads)
        x = layers.after(x, layers.output(y, f"{name}.self_attention"), f"{name}.self_attention_norm")
        query = layers.query(layers.before(x, f"{name}.cross_attention_norm"), f"{name}.cross_attention")
        memory = (f"cross_k_{i}", f"cross_v_{i}")
        y = layers.attention(query, memory, ["", "", "", "source_length"], _ATTENTION_RECTANGLE, spec.decoder_heads)
        x = layers.after(x, layers.output(y, f"{name}.cross_attention"), f"{name}.cross_attention_norm")
        x = layers.feed_forward(x, name)
    if spec.decoder_final_norm:
        x = layers.norm(x, "decoder.final_norm")
    logprob = g.named("LogSoftmax", [layers.logits(x)], "logprob", axis=-1)
    block = block_size(spec.target_vocabulary) if store.cache == "float32" else None
    if block is None:
        g.named_pair("TopK", [logprob, "candidates"], ("top_logprob", "top_token"), axis=-1)
    else:
        top_by_blocks(g, logprob, spec.target_vocabulary, block)
    return g.model(
        "decoder_step", decoder_step_graph(spec.decoder_layers, spec.d_model, spec.target_vocabulary, store.cache)
    )


def _additive_mask(g: GraphWriter) -> str:
    """What `ancestors` adds to attention scores. The CPU's kernel would convert a boolean mask in every layer.

    Finite, so that the rectangle's places where nobody stands give no NaN; far below any score, so that what is masked
    has a weight of exactly zero.
    """
    return g.one("Where", "ancestors", g.constant(0.0, np.float32), g.constant(-1e30, np.float32))


def block_size(vocabulary: int) -> int | None:
    """Tokens per block for `top_by_blocks`: the divisor of the vocabulary nearest to the best size, None if too far.

    Selecting costs a row about 2.8 ns per block, for its largest, and 0.75 ns per token of the ten or so best blocks
    (measured with onnxruntime 1.31); their sum is least at sqrt(0.37 V).
    """
    best = (0.37 * vocabulary) ** 0.5
    divisors = [n for n in range(int(best / 3), int(best * 3) + 1) if n > 1 and vocabulary % n == 0]
    return min(divisors, key=lambda n: n / best + best / n, default=None)


def top_by_blocks(g: GraphWriter, logprob: str, vocabulary: int, block: int) -> None:
    """The C best of each row, (N, V), exactly: they lie in the C blocks with the largest maxima.

    Two small selections and a maximum per block cost half of one selection from the whole row. Of equal numbers the
    one in the better block comes first, then the lower token; so the first of C candidates are the same for any C.
    """
    count = vocabulary // block
    size = g.constant([block], np.int64)
    blocks = g.one("Reshape", logprob, g.constant([-1, count, block], np.int64))
    largest = g.one("ReduceMax", blocks, g.constant([-1], np.int64), keepdims=0)
    _, best = g.op("TopK", [largest, g.one("Clip", "candidates", "", g.constant(count, np.int64))], outputs=2, axis=-1)
    taken = g.one("GatherND", blocks, g.one("Unsqueeze", best, g.constant([-1], np.int64)), batch_dims=1)
    row = g.one("Reshape", taken, g.constant([0, -1], np.int64))
    place = "place"
    g.named_pair("TopK", [row, "candidates"], ("top_logprob", place), axis=-1)
    which = g.one("GatherElements", best, g.one("Div", place, size), axis=1)
    within = g.one("Mod", place, size)
    g.named("Add", [g.one("Mul", which, size), within], "top_token")
