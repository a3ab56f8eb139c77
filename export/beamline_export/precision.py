"""How weights are stored and multiplied at each precision: the only place that knows one precision from another."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from beamline_export.graph_writer import GraphWriter
from beamline_export.graphs import ElementType, row_parts
from beamline_export.spec import Array, ExportError

_LEAST_ROW_MAXIMUM = 1e-9
"""Keeps the scale of an all-zero row finite."""


class WeightStore(ABC):
    """Turns fp32 weights into initializers and products of one precision."""

    cache: ElementType = "float32"
    """Element type of activations and of the key and value caches."""

    @abstractmethod
    def linear(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """Multiply x (N, in) by weight (out, in) transposed and add bias (out) -> (N, out)."""

    @abstractmethod
    def embedding(self, g: GraphWriter, ids: str, name: str, table: Array) -> str:
        """Rows of table (V, D) -> (N, D)."""

    @abstractmethod
    def head(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """Logits in fp32, (N, V), of x (N, D) and weight (V, D); the bias may hold -inf."""

    def write(self, g: GraphWriter, pool: str, rows: str, width: int) -> str:  # noqa: ARG002 - fp16 needs it
        """Write rows (N, width) into the slots of a pool, in place; the pool as (S, P, width)."""
        return g.named("ScatterND", [pool, "slot", rows], f"{pool}_out")

    def vector(self, g: GraphWriter, name: str, values: Array) -> str:
        """A bias or a normalization weight, in the type of activations."""
        return g.weight(name, lambda: values.astype(self.cache))

    def table(self, g: GraphWriter, name: str, values: Array) -> str:
        """A position table, (positions, D), in the type of activations."""
        return self.vector(g, name, values)


class Fp32Store(WeightStore):
    """Plain fp32."""

    def linear(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.linear`."""
        matrix = g.weight(name, lambda: weight.T)
        if bias is None:
            return g.one("MatMul", x, matrix)
        return g.one("Gemm", x, matrix, self.vector(g, f"{name}.bias", bias))

    def embedding(self, g: GraphWriter, ids: str, name: str, table: Array) -> str:
        """As `WeightStore.embedding`."""
        return g.one("Gather", g.weight(name, lambda: table), ids)

    def head(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.head`; transB lets a tied embedding serve as it lies in the file."""
        addend = [] if bias is None else [self.vector(g, f"{name}.bias", bias)]
        return g.one("Gemm", x, g.weight(name, lambda: weight), *addend, transB=1)


class Fp16Store(WeightStore):
    """fp16 weights and activations for CUDA; logits in fp32, where fp16 would be too coarse to rank candidates."""

    cache: ElementType = "float16"

    def linear(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.linear`."""
        product = g.one("MatMul", x, g.weight(name, lambda: _half(name, weight.T)))
        return product if bias is None else g.one("Add", product, self.vector(g, f"{name}.bias", bias))

    def embedding(self, g: GraphWriter, ids: str, name: str, table: Array) -> str:
        """As `WeightStore.embedding`."""
        return g.one("Gather", g.weight(name, lambda: _half(name, table)), ids)

    def head(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.head`."""
        # Both casts of constants are folded when the session loads: one fp32 copy in memory, none in the file.
        matrix = g.weight(name, lambda: _half(name, weight))
        matrix = g.one("Transpose", g.one("Cast", matrix, to=1), perm=[1, 0])
        product = g.one("MatMul", g.one("Cast", x, to=1), matrix)
        return product if bias is None else g.one("Add", product, g.weight(f"{name}.bias", lambda: bias))

    def write(self, g: GraphWriter, pool: str, rows: str, width: int) -> str:
        """As `WeightStore.write`, part by part: see `row_parts`."""
        count, part = row_parts(width)

        def numbers() -> NDArray[np.int64]:
            return np.stack([np.zeros(count), np.zeros(count), np.arange(count)], axis=1).astype(np.int64)[None]

        (places,) = g.once("slot parts", lambda: (g.one("Add", "slot", g.weight("row_part_numbers", numbers)),))
        parts = g.one("Reshape", rows, g.constant([-1, count, part], np.int64))
        written = g.named("ScatterND", [pool, places, parts], f"{pool}_out")
        return g.one("Reshape", written, g.constant([0, 0, width], np.int64))

    def vector(self, g: GraphWriter, name: str, values: Array) -> str:
        """As `WeightStore.vector`."""
        return g.weight(name, lambda: _half(name, values))


def _half(name: str, array: Array) -> NDArray[np.float16]:
    if np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(f"{name} holds values beyond fp16's range; export it as fp32 or int8")
    return array.astype(np.float16)


class Int8Store(WeightStore):
    """Signed weights per column, unsigned activations per row.

    One scale per row keeps a sentence's answer independent of its neighbours; a scale for the whole batch, as
    DynamicQuantizeMatMul takes, does not.
    """

    def linear(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.linear`."""
        return _product(g, x, g.weight(name, lambda: quantize_columns(weight).T), name, weight, bias)

    def embedding(self, g: GraphWriter, ids: str, name: str, table: Array) -> str:
        """As `WeightStore.embedding`."""
        rows = g.one("Gather", g.weight(name, lambda: quantize_columns(table)), ids)
        scale = g.one("Gather", g.weight(f"{name}.scale", lambda: column_scales(table)), ids)
        column = g.one("Unsqueeze", scale, g.constant([1], np.int64))
        return g.one("Mul", g.one("Cast", rows, to=1), column)

    def head(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.head`."""
        # The transposition of a constant is folded when the session loads.
        matrix = g.one("Transpose", g.weight(name, lambda: quantize_columns(weight)), perm=[1, 0])
        return _product(g, x, matrix, name, weight, bias)

    def table(self, g: GraphWriter, name: str, values: Array) -> str:
        """As `WeightStore.table`: half the bytes, widened once when the session loads."""
        return g.one("Cast", g.weight(name, lambda: _half(name, values)), to=1)


def column_scales(weight: Array) -> Array:
    """What one int8 step of each output of weight (out, in) stands for, (out)."""
    scales: Array = (np.maximum(np.abs(weight).max(axis=1), _LEAST_ROW_MAXIMUM) / 127).astype(np.float32)
    return scales


def quantize_columns(weight: Array) -> NDArray[np.int8]:
    """Weight (out, in) in steps of `column_scales`."""
    steps: NDArray[np.int8] = np.clip(np.rint(weight / column_scales(weight)[:, None]), -127, 127).astype(np.int8)
    return steps


def quantize_rows(g: GraphWriter, x: str) -> tuple[str, str]:
    """Append nodes that give x (N, in) as uint8 around 128, and its scale per row (N, 1)."""
    largest = g.one("ReduceMax", g.one("Abs", x), g.constant([-1], np.int64), keepdims=1)
    largest = g.one("Max", largest, g.constant(_LEAST_ROW_MAXIMUM, np.float32))
    unit = g.constant(1 / 127, np.float32)
    quantized = g.one("QuantizeLinear", g.one("Div", x, largest), unit, g.constant(128, np.uint8))
    return quantized, g.one("Mul", largest, unit)


def _product(g: GraphWriter, x: str, matrix: str, name: str, weight: Array, bias: Array | None) -> str:
    # All products of the same x share its quantized rows.
    quantized, scale = g.once(f"quantized {x}", lambda: quantize_rows(g, x))
    columns = g.weight(f"{name}.scale", lambda: column_scales(weight))
    # A scale per row, (N, 1), is what onnxruntime 1.31's kernel takes and multiplies after the product; its own bias
    # input would be scaled along, hence the Add.
    product = g.one("com.microsoft:MatMulIntegerToFloat", quantized, matrix, scale, columns, g.constant(128, np.uint8))
    return product if bias is None else g.one("Add", product, g.weight(f"{name}.bias", lambda: bias))


STORES: dict[str, type[WeightStore]] = {"fp32": Fp32Store, "fp16": Fp16Store, "int8": Int8Store}
