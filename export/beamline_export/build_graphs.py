"""Spec and weights to ONNX graphs, node by node (contracts: graphs.py)."""

import onnx

from beamline_export.graph_writer import GraphWriter, WeightsFile
from beamline_export.graphs import ElementType, decoder_step_graph, encoder_graph, kv_arrange_graph
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
    x = layers.embed("target", "ids", "positions")
    for i in range(spec.decoder_layers):
        name = f"decoder.{i}"
        y = layers.before(x, f"{name}.self_attention_norm")
        query, key, value = layers.query_key_value(y, f"{name}.self_attention")
        pools = (layers.write(f"self_k_{i}", key), layers.write(f"self_v_{i}", value))
        y = layers.attention(query, pools, ["ancestors"], _ATTENTION_RECTANGLE, spec.decoder_heads)
        x = layers.after(x, layers.output(y, f"{name}.self_attention"), f"{name}.self_attention_norm")
        query = layers.query(layers.before(x, f"{name}.cross_attention_norm"), f"{name}.cross_attention")
        memory = (f"cross_k_{i}", f"cross_v_{i}")
        y = layers.attention(query, memory, ["", "", "", "source_length"], _ATTENTION_RECTANGLE, spec.decoder_heads)
        x = layers.after(x, layers.output(y, f"{name}.cross_attention"), f"{name}.cross_attention_norm")
        x = layers.feed_forward(x, name)
    if spec.decoder_final_norm:
        x = layers.norm(x, "decoder.final_norm")
    logprob = g.one("LogSoftmax", layers.logits(x), axis=-1)
    g.named_pair("TopK", [logprob, "candidates"], ("top_logprob", "top_token"), axis=-1)
    return g.model("decoder_step", decoder_step_graph(spec.decoder_layers, spec.d_model, store.cache))


def build_kv_arrange(width: int, cache: ElementType, weights: WeightsFile) -> onnx.ModelProto:
    """Moves cache rows on a device that the host cannot write to."""
    g = GraphWriter(weights)
    kept, added = g.one("Pad", "kept", "pad_kept"), g.one("Pad", "added", "pad_added")
    g.named("Gather", [g.one("Concat", kept, added, axis=0), "take"], "arranged")
    return g.model("kv_arrange", kv_arrange_graph(width, cache))
