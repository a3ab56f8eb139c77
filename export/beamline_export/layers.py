"""The Transformer's parts as graph nodes, for packed rows; shared by the encoder and the decoder step."""

from dataclasses import dataclass

import numpy as np
import onnx

from beamline_export.graph_writer import GraphWriter
from beamline_export.precision import WeightStore
from beamline_export.spec import Activation, Array, Checkpoint, Norm, NormPlacement, PaddingInTarget


@dataclass(frozen=True, slots=True)
class Rectangle:
    """The way from packed rows (N, D) to an attention rectangle (S, Q, D) and back: names of graph inputs."""

    row_of: str
    back: str


class Layers:
    """Appends the parts of one model to one graph."""

    def __init__(self, g: GraphWriter, checkpoint: Checkpoint, store: WeightStore) -> None:
        self.g = g
        self.spec = checkpoint.spec
        self.store = store
        self._wide = self.spec.fp32_residual and store.cache == "float16"
        """Whether the residual is of another type than what sub-layers compute in."""
        self._weights = checkpoint.weights
        self._removed_tokens = checkpoint.removed_tokens

    def weights(self, name: str) -> Array:
        """A canonical weight."""
        return self._weights[name]

    def embed(self, side: str, ids: str, positions: str) -> str:
        """Token embeddings, plus those of positions where there are such, (N, D); `side` is source or target."""
        name = f"{side}_embedding"
        # A tied table has one name in all graphs, whichever role it plays.
        x = self.store.embedding(self.g, ids, self.shared_name(name), self.weights(name))
        if self.spec.embedding_scale != 1.0:
            x = self.g.one("Mul", x, self.g.constant(self.spec.embedding_scale, np.dtype(self.store.cache).type))
        if self.spec.relative_positions is not None or self.spec.rotary is not None:
            return self._widened(x)
        position = self._position(side, ids, positions)
        norm = "encoder.embedding_norm" if side == "source" else "decoder.embedding_norm"
        if not self.spec.embedding_norm:
            return self._widened(self.g.one("Add", x, position))
        if side == "target" and self.spec.target_norm_before_positions:
            return self.g.one("Add", self.norm(x, norm), position)
        return self.norm(self.g.one("Add", x, position), norm)

    def _position(self, side: str, ids: str, positions: str) -> str:
        """Position embeddings, (N, D)."""
        table = self.store.table(self.g, self.shared_name(f"{side}_positions"), self.weights(f"{side}_positions"))
        padding = self.spec.unnumbered_padding
        if padding is None:
            return self.g.one("Gather", table, positions)
        is_padding = self.g.one("Equal", ids, self.g.constant(padding.token, np.int64))
        if side == "source":
            positions = self._count(self.g.one("Not", is_padding))
        elif padding.in_target is PaddingInTarget.WITH_PREVIOUS:
            # Never before the first: what a target begins with is no padding.
            before = self.g.one("Cast", is_padding, to=onnx.TensorProto.INT64)
            return self.g.one("Gather", table, self.g.one("Sub", positions, before))
        zero = self.g.constant(0.0, np.dtype(self.store.cache).type)
        column = self.g.one("Unsqueeze", is_padding, self.g.constant([1], np.int64))
        return self.g.one("Where", column, zero, self.g.one("Gather", table, positions))

    def _count(self, numbered: str) -> str:
        """Positions in the sources of packed tokens, (N,), if these alone are numbered; others' are of no meaning."""
        one = self.g.constant(1, np.int64)
        rectangle = self.g.one("Gather", self.g.one("Cast", numbered, to=onnx.TensorProto.INT64), "row_of")
        last = self.g.one("Sub", self.g.one("CumSum", rectangle, one), one)
        flat = self.g.one("Reshape", last, self.g.constant([-1], np.int64))
        # Before the first number there is -1.
        return self.g.one("Max", self.g.one("Gather", flat, "back"), self.g.constant(0, np.int64))

    def shared_name(self, name: str) -> str:
        """The first canonical name of the same array: tied weights are one weight."""
        array = self._weights[name]
        return next(other for other, candidate in self._weights.items() if candidate is array)

    def norm(self, x: str, name: str) -> str:
        """Normalization over D, of the residual; in the type of activations."""
        rms = self.spec.norm is Norm.RMS
        factors = [self._norm_vector(f"{name}.{part}") for part in ("weight", *(() if rms else ("bias",)))]
        kind = "RMSNormalization" if rms else "LayerNormalization"
        y = self.g.one(kind, x, *factors, axis=-1, epsilon=self.spec.norm_epsilon)
        return self.g.one("Cast", y, to=onnx.TensorProto.FLOAT16) if self._wide else y

    def _norm_vector(self, name: str) -> str:
        values = self.weights(name)
        return self.g.weight(name, lambda: values) if self._wide else self.store.vector(self.g, name, values)

    def _widened(self, x: str) -> str:
        """As the residual is."""
        return self.g.one("Cast", x, to=onnx.TensorProto.FLOAT) if self._wide else x

    def before(self, x: str, norm: str) -> str:
        """What a sub-layer reads."""
        return self.norm(x, norm) if self.spec.norm_placement is NormPlacement.PRE else x

    def after(self, x: str, y: str, norm: str) -> str:
        """The residual sum of a sub-layer's input and output."""
        total = self.g.one("Add", x, y)
        return self.norm(total, norm) if self.spec.norm_placement is NormPlacement.POST else total

    def query_key_value(self, x: str, name: str) -> str:
        """Queries, keys and values of self-attention side by side, (N, A + 2 B), by one product.

        A is the width of queries, B that of keys and values.
        """
        query, key, value = (self.weights(f"{name}.{p}.weight") for p in ("query", "key", "value"))
        # See `output`: keys and values go without their biases, but for keys that are turned after it.
        of_key = self.weights(f"{name}.key.bias") if self.spec.rotary is not None else np.zeros(len(key), np.float32)
        bias = np.concatenate([self.weights(f"{name}.query.bias"), of_key, np.zeros(len(value), np.float32)])
        return self._turned(self._linear(x, f"{name}.qkv", np.concatenate([query, key, value]), bias))

    def _turned(self, query_key_value: str) -> str:
        """Queries and keys turned by the positions of their rows, where a model has such positions."""
        rotary = self.spec.rotary
        if rotary is None:
            return query_key_value
        g, heads = self.g, self.spec.decoder_heads
        widths = g.constant([self.spec.attention + self.spec.key_value, self.spec.key_value], np.int64)
        turning, value = g.op("Split", [query_key_value, widths], outputs=2, axis=-1)
        tables = [
            self.store.table(g, name, self.weights(name))
            for name in ("rotary_cosine_positions", "rotary_sine_positions")
        ]
        # As N sequences of a token: the operator wants sequences, none longer than its tables.
        sequence = g.constant([1], np.int64)
        turned = g.one(
            "RotaryEmbedding",
            g.one("Unsqueeze", turning, sequence),
            *tables,
            g.one("Unsqueeze", "positions", sequence),
            num_heads=heads + (self.spec.key_value_heads or heads),
            rotary_embedding_dim=rotary.width,
        )
        return g.one("Concat", g.one("Squeeze", turned, sequence), value, axis=-1)

    def split(self, x: str, count: int) -> list[str]:
        """Cut (N, count A) into parts of (N, A) each."""
        return self.g.op("Split", [x], outputs=count, axis=-1, num_outputs=count)

    def query(self, x: str, name: str) -> str:
        """Queries of cross-attention, (N, A)."""
        return self._affine(x, f"{name}.query")

    def cross_keys_values(self, memory: str) -> list[str]:
        """Cross-attention keys and values of all decoder layers, each (N, A), by one product: k_0, v_0, k_1, …."""
        layers = range(self.spec.decoder_layers)
        names = [f"decoder.{i}.cross_attention.{p}.weight" for i in layers for p in ("key", "value")]
        product = self._linear(memory, "cross_kv", np.concatenate([self.weights(n) for n in names]), None)
        return self.split(product, len(names))

    def write(self, pool: str, rows: str) -> str:
        """Write rows (N, A) into their slots of a pool, in place; the pool as (S, P, A)."""
        return self.store.write(self.g, pool, rows, self.spec.attention)

    def encoder_bias(self, layer: int) -> str:
        """What relative positions add to the scores of an encoder layer, (1, H, R, R); nothing ("") if there are none.

        Whatever a rectangle's row holds, its places are the positions of a source.
        """
        relative = self.spec.relative_positions
        if relative is None:
            return ""
        table, reach = self.weights("encoder.relative_bias"), relative.encoder_reach
        number = min(layer, len(table) - 1)

        def offsets() -> tuple[str, ...]:
            """How far a key is behind the least one that has a number of its own, (R, R)."""
            # Counted on the device: a graph that looks at the shape for it cannot be captured there.
            first = self.g.constant([0], np.int64), self.g.constant([1], np.int64)
            row = self.g.one("Squeeze", self.g.one("Slice", "row_of", *first), self.g.constant([0], np.int64))
            ones = self.g.one("Add", self.g.one("Sub", row, row), self.g.constant(1, np.int64))
            place = self.g.one("CumSum", ones, self.g.constant(0, np.int64))
            query = self.g.one("Unsqueeze", place, self.g.constant([1], np.int64))
            behind = self.g.one("Add", self.g.one("Sub", place, query), self.g.constant(reach, np.int64))
            return (self._within(behind, 2 * reach),)

        def bias() -> tuple[str, ...]:
            numbers = self.store.vector(self.g, f"encoder.{number}.relative_bias", table[number][None])
            return (self.g.one("Gather", numbers, *self.g.once("offsets", offsets), axis=2),)

        return self.g.once(f"relative bias {number}", bias)[0]

    def decoder_biases(self) -> list[str]:
        """What distances add to the scores of self-attention in a step, (S, H, Q, P): for all layers, or for each.

        The slots of a rectangle are not in the order of positions.
        """
        table = self.weights("decoder.relative_bias")
        of_row = self.g.one("Unsqueeze", self.g.one("Gather", "positions", "row_of"), self.g.constant([2], np.int64))
        of_slot = self.g.one("Unsqueeze", "slot_positions", self.g.constant([1], np.int64))
        # What nobody attends to may have any distance.
        distance = self._within(self.g.one("Sub", of_row, of_slot), table.shape[2] - 1)
        biases = []
        for number, numbers in enumerate(table):
            weight = self.store.vector(self.g, f"decoder.{number}.relative_bias", numbers)
            biases.append(self.g.one("Transpose", self.g.one("Gather", weight, distance, axis=1), perm=[1, 0, 2, 3]))
        return biases

    def _within(self, numbers: str, most: int) -> str:
        """Whole numbers as they are from 0 to `most`, beyond as these."""
        least = self.g.one("Max", numbers, self.g.constant(0, np.int64))
        return self.g.one("Min", least, self.g.constant(most, np.int64))

    def attention(
        self, query: str, key_value: tuple[str, str], masks: list[str], rectangle: Rectangle, heads: int
    ) -> str:
        """Multi-head scaled dot-product attention of packed queries over rectangles of keys and values."""
        q = self.g.one("Gather", query, rectangle.row_of)
        y = self.g.one("Attention", q, *key_value, *masks, q_num_heads=heads, kv_num_heads=heads)
        flat = self.g.one("Reshape", y, self.g.constant([-1, self.spec.attention], np.int64))
        return self.g.one("Gather", flat, rectangle.back)

    def output(self, y: str, name: str) -> str:
        """Output projection of attention.

        The key bias adds the same number to all scores of a query, which softmax cancels: it is dropped, unless
        positions turn it. Attention weights sum to one, so the value bias passes through unchanged: it is folded into
        this projection's bias.
        """
        weight, value = self.weights(f"{name}.output.weight"), self.weights(f"{name}.value.bias")
        bias = self.weights(f"{name}.output.bias") + weight @ self._for_each_query(value)
        return self._widened(self._linear(y, f"{name}.output", weight, bias.astype(np.float32)))

    def _for_each_query(self, bias: Array) -> Array:
        """The bias of keys or values, (B,), for the heads of queries that share theirs, (A,)."""
        size = self.spec.attention // self.spec.decoder_heads
        by_head = bias.reshape(-1, size)
        return np.repeat(by_head, self.spec.attention // len(bias), axis=0).reshape(-1)

    def feed_forward(self, x: str, name: str) -> str:
        """Position-wise feed-forward sub-layer, residual and norm included."""
        return self.after(x, self.fed_forward(x, name), f"{name}.ffn_norm")

    def fed_forward(self, x: str, name: str) -> str:
        """What a feed-forward layer computes, its norm before it included."""
        before = self.before(x, f"{name}.ffn_norm")
        y = self._affine(before, f"{name}.ffn.up")
        if self.spec.gated:
            gate = self._activate(self._affine(before, f"{name}.ffn.gate"))
            y = self._down(self.g.one("Mul", self._widened(gate), self._widened(y)), name)
        elif self.spec.activation is Activation.RELU:
            # int8 has it for nothing, in the quantization that comes next.
            y = self._down(self._widened(y), name, rectify=True)
        else:
            y = self._down(self._widened(self._activate(y)), name)
        return y

    def _down(self, y: str, name: str, *, rectify: bool = False) -> str:
        """The last product of a feed-forward layer, as the residual is."""
        name = f"{name}.ffn.down"
        if not self._wide:
            return self._affine(y, name, rectify=rectify)
        y = self.g.one("Relu", y) if rectify else y
        weight, bias = self.weights(f"{name}.weight"), self.weights(f"{name}.bias")
        return self.store.linear_in_fp32(self.g, y, name, weight, _unless_zero(bias))

    def logits(self, x: str) -> str:
        """Scores of the target vocabulary, (N, V), fp32."""
        bias = self.weights("head.bias")
        if self._removed_tokens:
            bias = bias.copy()
            bias[list(self._removed_tokens)] = -np.inf
        return self.store.head(
            self.g, x, self.shared_name("head.weight"), self.weights("head.weight"), _unless_zero(bias)
        )

    def _affine(self, x: str, name: str, *, rectify: bool = False) -> str:
        weight, bias = self.weights(f"{name}.weight"), self.weights(f"{name}.bias")
        return self.store.linear(self.g, x, name, weight, _unless_zero(bias), rectify=rectify)

    def _linear(self, x: str, name: str, weight: Array, bias: Array | None) -> str:
        return self.store.linear(self.g, x, name, weight, None if bias is None else _unless_zero(bias))

    def _activate(self, x: str) -> str:
        match self.spec.activation:
            case Activation.RELU:
                return self.g.one("Relu", x)
            case Activation.GELU:
                return self.g.one("Gelu", x)
            case Activation.GELU_TANH:
                return self.g.one("Gelu", x, approximate="tanh")
            case Activation.SILU:
                return self.g.one("Mul", x, self.g.one("Sigmoid", x))


def _unless_zero(bias: Array) -> Array | None:
    """A bias that is all zero is none: a checkpoint without biases costs no additions."""
    return bias if bias.any() else None
