"""How weights are stored and multiplied at each precision: the only place that knows one precision from another."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from beamline_export.blocks import BLOCK, Blocks, quantize_blocks
from beamline_export.graph_writer import GraphWriter
from beamline_export.spec import Array, ExportError
from beamline_export.stored_weights import probe
from beamline_server.graphs import ElementType, row_parts

_LEAST_MAXIMUM = 1e-9
"""Keeps the scale of an all-zero column positive."""

_PART = 1 << 20
"""Numbers of a weight that are quantized at a time."""

_MIDDLE = 128
"""The step that stands for zero where values have both signs."""
_INT8_ACTIVATIONS = 4
"""How MatMulNBits multiplies: `accuracy_level`, by which it takes its input in 8-bit steps of each block of a row."""


class WeightStore(ABC):
    """Turns fp32 weights into initializers and products of one precision."""

    cache: ElementType = "float32"
    """Element type of activations and of the key and value caches."""

    def __init__(self) -> None:
        self.probes: dict[str, Array] = {}
        """What `stored_weights.probe` makes of the quantized weights of products, by their names."""

    @abstractmethod
    def linear(
        self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None, *, rectify: bool = False
    ) -> str:
        """Multiply x (N, in), through a ReLU first if so said, by weight (out, in) transposed; add bias -> (N, out)."""

    def linear_in_fp32(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `linear`, of x in fp32, with a result in fp32: for what the type of activations may not hold."""
        return self.linear(g, x, name, weight, bias)

    @abstractmethod
    def embedding(self, g: GraphWriter, ids: str, name: str, table: Array) -> str:
        """Rows of table (V, D) -> (N, D)."""

    @abstractmethod
    def head(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """Logits in fp32, (N, V), of x (N, D) and weight (V, D); the bias may hold -inf."""

    def write(self, g: GraphWriter, pool: str, rows: str, width: int) -> str:  # noqa: ARG002 - fp16 needs it
        """Write rows (N, width) into the slots of a pool, in place; the pool as (S, P, width)."""
        written = g.one("ScatterND", pool, "slot", rows)
        g.output(written, f"{pool}_out")
        return written

    def vector(self, g: GraphWriter, name: str, values: Array) -> str:
        """A bias or a normalization weight, in the type of activations."""
        return g.weight(name, lambda: values.astype(self.cache))

    def table(self, g: GraphWriter, name: str, values: Array) -> str:
        """A position table, (positions, D), in the type of activations."""
        return self.vector(g, name, values)


class Fp32Store(WeightStore):
    """Plain fp32."""

    def linear(
        self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None, *, rectify: bool = False
    ) -> str:
        """As `WeightStore.linear`."""
        x = g.one("Relu", x) if rectify else x
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

    def linear(
        self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None, *, rectify: bool = False
    ) -> str:
        """As `WeightStore.linear`."""
        x = g.one("Relu", x) if rectify else x
        product = g.one("MatMul", x, g.weight(name, lambda: _half(name, weight.T)))
        return product if bias is None else g.one("Add", product, self.vector(g, f"{name}.bias", bias))

    def linear_in_fp32(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.linear_in_fp32`."""
        # As in `head`, the cast of a constant is folded.
        product = g.one("MatMul", x, g.one("Cast", g.weight(name, lambda: _half(name, weight.T)), to=1))
        return product if bias is None else g.one("Add", product, g.weight(f"{name}.bias", lambda: bias))

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
        written = g.one("ScatterND", pool, places, parts)
        g.output(written, f"{pool}_out")
        return g.one("Reshape", written, g.constant([0, 0, width], np.int64))

    def vector(self, g: GraphWriter, name: str, values: Array) -> str:
        """As `WeightStore.vector`."""
        return g.weight(name, lambda: _half(name, values))


def _half(name: str, array: Array) -> NDArray[np.float16]:
    if np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(f"{name} holds values beyond fp16's range; export it as fp32 or int8")
    return array.astype(np.float16)


@dataclass(frozen=True, slots=True)
class _Factor:
    """What a product multiplies by: a weight (out, in) by its name, and the int8 matrix (in, out) made of it."""

    name: str
    weight: Array
    bias: Array | None
    matrix: str
    rectify: bool = False

    def columns(self, g: GraphWriter) -> str:
        return g.weight(f"{self.name}.scale", lambda: column_scales(self.weight))

    def addend(self, g: GraphWriter) -> str:
        bias = self.bias
        assert bias is not None
        return g.weight(f"{self.name}.bias", lambda: bias)


class Int8Store(WeightStore):
    """Signed weights per column, unsigned activations per row.

    One scale per row keeps a sentence's answer independent of its neighbours; a scale for the whole batch, as
    DynamicQuantizeMatMul takes, does not.
    """

    def linear(
        self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None, *, rectify: bool = False
    ) -> str:
        """As `WeightStore.linear`."""
        self.note(name, weight)
        matrix = g.weight(name, lambda: quantize_columns(weight).T)
        return self.product(g, x, _Factor(name, weight, bias, matrix, rectify))

    def embedding(self, g: GraphWriter, ids: str, name: str, table: Array) -> str:
        """As `WeightStore.embedding`."""
        rows = g.one("Gather", g.weight(name, lambda: quantize_columns(table)), ids)
        scale = g.one("Gather", g.weight(f"{name}.scale", lambda: column_scales(table)), ids)
        column = g.one("Unsqueeze", scale, g.constant([1], np.int64))
        return g.one("Mul", g.one("Cast", rows, to=1), column)

    def head(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.head`."""
        self.note(name, weight)
        # The transposition of a constant is folded when the session loads.
        matrix = g.one("Transpose", g.weight(name, lambda: quantize_columns(weight)), perm=[1, 0])
        return self.product(g, x, _Factor(name, weight, bias, matrix))

    def note(self, name: str, weight: Array) -> None:
        """Remember what a weight has to be once it is stored."""
        if name not in self.probes:
            self.probes[name] = probe(weight)

    def table(self, g: GraphWriter, name: str, values: Array) -> str:
        """As `WeightStore.table`: half the bytes, widened once when the session loads."""
        return g.one("Cast", g.weight(name, lambda: _half(name, values)), to=1)

    def product(self, g: GraphWriter, x: str, by: _Factor) -> str:
        """Multiply x (N, in) by a quantized weight and add its bias -> (N, out)."""
        # All products of the same x share its quantized rows.
        quantized, scale, zero = g.once(f"quantized {x}", lambda: quantize_rows(g, x, rectify=by.rectify))
        # A scale per row, (N, 1), is what onnxruntime 1.31's kernel takes and multiplies after the product; its own
        # bias input would be scaled along, hence the Add.
        product = g.one("com.microsoft:MatMulIntegerToFloat", quantized, by.matrix, scale, by.columns(g), zero)
        return product if by.bias is None else g.one("Add", product, by.addend(g))


def column_scales(weight: Array) -> Array:
    """What one int8 step of each output of weight (out, in) stands for, (out)."""
    scales = np.empty(len(weight), np.float32)
    for part in _parts(weight):
        scales[part] = np.maximum(np.abs(weight[part]).max(axis=1), _LEAST_MAXIMUM) / 127
    return scales


def quantize_columns(weight: Array) -> NDArray[np.int8]:
    """Weight (out, in) in steps of `column_scales`."""
    scales, steps = column_scales(weight)[:, None], np.empty(weight.shape, np.int8)
    for part in _parts(weight):
        steps[part] = np.clip(np.rint(weight[part] / scales[part]), -127, 127)
    return steps


def _parts(weight: Array) -> Iterator[slice]:
    """Some outputs after the other: what is computed on the way is of their size, and not of the weight's."""
    count = max(1, _PART // max(1, weight.shape[1]))
    return (slice(i, i + count) for i in range(0, len(weight), count))


def quantize_rows(g: GraphWriter, x: str, *, rectify: bool = False) -> tuple[str, str, str]:
    """Append nodes that give x (N, in) in unsigned steps of each row's own size.

    A ReLU costs nothing: with zero at step 0, whatever is negative saturates there, and the rest gets all 256 steps.

    Returns:
        x as uint8 (N, in), what a step of each row stands for (N, 1), and which step is zero (a scalar).
    """
    zero = 0 if rectify else _MIDDLE
    magnitude = x if rectify else g.one("Abs", x)
    largest = g.one("ReduceMax", magnitude, g.constant([-1], np.int64), keepdims=0)
    if rectify:
        largest = g.one("Max", largest, g.constant(0.0, np.float32))
    # A row of zeros has the scale zero: whatever steps it is given then, its products are zeros.
    scale = g.one("Mul", largest, g.constant(1 / (255 - zero), np.float32))
    # Along axis 0 the kernel quantizes row by row: no division node before it, which would touch all of x once more.
    quantized = g.one("QuantizeLinear", x, scale, *(() if rectify else (_per_row(g, x, zero),)), axis=0)
    return quantized, g.one("Unsqueeze", scale, g.constant([1], np.int64)), g.constant(zero, np.uint8)


def _per_row(g: GraphWriter, x: str, zero: int) -> str:
    """The same zero point for every row, (N); made once, since all of a graph's products have the same rows."""

    def make() -> tuple[str, ...]:
        value = numpy_helper.from_array(np.array([zero], np.uint8))
        return (g.one("ConstantOfShape", g.one("Shape", x, end=1), value=value),)

    return g.once(f"zero points {zero}", make)[0]


class CalibratedInt8Store(Int8Store):
    """As `Int8Store`, with activations in steps of one size, fixed per product when the model is exported.

    Nothing has to be measured per row, and scale and bias go into the product's own kernel. What lies beyond the range
    that calibration saw saturates; an answer still depends on nothing but its own sentence.

    Args:
        ranges: The largest magnitude that calibration saw in the input of each product, by the product's name.
    """

    def __init__(self, ranges: Mapping[str, float]) -> None:
        super().__init__()
        self._ranges = ranges

    def product(self, g: GraphWriter, x: str, by: _Factor) -> str:
        """As `Int8Store.product`."""
        middle = 0 if by.rectify else _MIDDLE
        zero = g.constant(middle, np.uint8)
        scale = g.constant(max(self._ranges[by.name], _LEAST_MAXIMUM) / (255 - middle), np.float32)
        (quantized,) = g.once(f"quantized {x} {scale}", lambda: (g.one("QuantizeLinear", x, scale, zero),))
        addend = () if by.bias is None else ("", by.addend(g))
        return g.one("com.microsoft:MatMulIntegerToFloat", quantized, by.matrix, scale, by.columns(g), zero, *addend)


class Int4Store(Int8Store):
    """Products with weights of 4 bits, in blocks; embeddings and the head, most often one table, as in `Int8Store`.

    The kernel takes activations in 8-bit steps of each block of a row, so that a row depends on no other. Its last bits
    depend on whether a row is a lone one; engines give it an even number of rows (`engine/ort/cpu.py`).
    """

    def linear(
        self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None, *, rectify: bool = False
    ) -> str:
        """As `WeightStore.linear`."""
        self.note(name, weight)
        x = g.one("Relu", x) if rectify else x
        outputs, inputs = weight.shape
        blocks = _Once(weight)
        product = g.one(
            "com.microsoft:MatMulNBits",
            x,
            g.weight(name, lambda: blocks.made.steps),
            g.weight(f"{name}.scale", lambda: blocks.made.scales),
            g.weight(f"{name}.zero", lambda: blocks.made.zeros),
            K=inputs,
            N=outputs,
            bits=4,
            block_size=BLOCK,
            accuracy_level=_INT8_ACTIVATIONS,
        )
        return product if bias is None else g.one("Add", product, g.weight(f"{name}.bias", lambda: bias))


class _Once:
    """A weight, and its blocks, which are made when they are first asked for."""

    def __init__(self, weight: Array) -> None:
        self._weight = weight

    @cached_property
    def made(self) -> Blocks:
        return quantize_blocks(self._weight)


class PartlyFp32Store(WeightStore):
    """As another store, but for weights that stay in fp32.

    Args:
        inner: For the others; its activations are fp32.
        patterns: As of a shell, `decoder.*.ffn.*` for one: names of weights that match one of them stay.
    """

    def __init__(self, inner: WeightStore, patterns: Sequence[str]) -> None:
        assert inner.cache == self.cache, "activations are of one type"
        super().__init__()
        self.probes = inner.probes
        self._inner, self._plain, self._patterns = inner, Fp32Store(), patterns
        self._others: set[str] = set()
        self.kept: set[str] = set()
        """Those that have stayed so far."""

    def check(self) -> None:
        """Raise ExportError if a pattern has matched nothing."""
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in self.kept):
                raise ExportError(f"--keep-fp32 {pattern!r} matches no weight; there are {self._names()}")

    def linear(
        self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None, *, rectify: bool = False
    ) -> str:
        """As `WeightStore.linear`."""
        return self._of(name).linear(g, x, name, weight, bias, rectify=rectify)

    def embedding(self, g: GraphWriter, ids: str, name: str, table: Array) -> str:
        """As `WeightStore.embedding`."""
        return self._of(name).embedding(g, ids, name, table)

    def head(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.head`."""
        return self._of(name).head(g, x, name, weight, bias)

    def table(self, g: GraphWriter, name: str, values: Array) -> str:
        """As `WeightStore.table`."""
        return self._of(name).table(g, name, values)

    def _of(self, name: str) -> WeightStore:
        kept = any(fnmatchcase(name, pattern) for pattern in self._patterns)
        (self.kept if kept else self._others).add(name)
        return self._plain if kept else self._inner

    def _names(self) -> str:
        """All names, those of the layers once."""
        forms = {re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in self._others | self.kept}
        return ", ".join(sorted(forms))


STORES: dict[str, type[WeightStore]] = {"fp32": Fp32Store, "fp16": Fp16Store, "int8": Int8Store, "int4": Int4Store}
