"""A vector of 16 floats as a value in compiled loops, with what attention needs of it.

Loops over numbers are only turned into vector instructions where the order of a sum may change, and then not well
(docs/performance.md): so they are written out here, for any processor, which has its own vectors of 4, 8 or 16.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils as _cgutils
from numba.core import types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

LANES = 16
_get_or_insert_function: Any = _cgutils.get_or_insert_function
_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)


def operation(generator: Callable[..., Any]) -> Any:
    """Make an operation for compiled loops of a function that is given types and returns the code to generate."""
    return intrinsic(generator)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Vector16")


_make: Any = _VectorType
_vector = _make()


@register_model(_VectorType)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        base: Any = super()
        base.__init__(manager, kind, _VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [ir.Constant(_FLOAT, float(np.float32(value)))] * LANES)


def _mask(lanes: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(lanes)), list(lanes))


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, number, _INT(0)), undefined, _mask([0] * lanes))


def _each(builder: Any, name: str, *operands: Any) -> Any:
    """An operation of LLVM's, lane by lane."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(operands))
    return builder.call(_get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), operands)


def _halves(builder: Any, vector: Any, lanes: int) -> tuple[Any, Any]:
    undefined = ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)
    masks = (_mask(range(lanes // 2)), _mask(range(lanes // 2, lanes)))
    low, high = (builder.shuffle_vector(vector, undefined, mask) for mask in masks)
    return low, high


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger ones; b where one of them is no number."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _pointer(context: Any, builder: Any, kind: Any, place: Sequence[Any], to: Any) -> Any:
    array, offset = place
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), to.as_pointer())


def _unaligned(instruction: Any) -> Any:
    instruction.align = 4
    return instruction


@operation
def zero(typing: Any) -> Any:
    """16 zeros."""
    return _vector(), lambda context, builder, signature, arguments: _constant(0.0)


@operation
def splat(typing: Any, number: Any) -> Any:
    """16 times the same number."""
    return _vector(types.float32), lambda context, builder, signature, arguments: _spread(builder, arguments[0], LANES)


@operation
def load(typing: Any, array: Any, offset: Any) -> Any:
    """16 neighbours in a flat array of floats."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _unaligned(builder.load(_pointer(context, builder, signature.args[0], arguments, _VECTOR)))

    return _vector(array, types.int64), generate


@operation
def store(typing: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write a vector to 16 neighbours in a flat array of floats."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _pointer(context, builder, signature.args[0], arguments[:2], _VECTOR)
        _unaligned(builder.store(arguments[2], where))
        return context.get_dummy_value()

    return types.void(array, types.int64, _vector), generate


@operation
def add(typing: Any, a: Any, b: Any) -> Any:
    """Sum of a and b."""
    return _vector(_vector, _vector), lambda context, builder, signature, arguments: builder.fadd(*arguments)


@operation
def multiply(typing: Any, a: Any, b: Any) -> Any:
    """Product of a and b."""
    return _vector(_vector, _vector), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@operation
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """A * b + c, rounded once where the processor can."""
    return (
        _vector(_vector, _vector, _vector),
        lambda context, builder, signature, arguments: _each(builder, "fmuladd", *arguments),
    )


@operation
def larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of a and b, lane by lane."""
    return _vector(_vector, _vector), lambda context, builder, signature, arguments: _larger(builder, *arguments)


@operation
def total(typing: Any, a: Any) -> Any:
    """The sum of a vector's numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, lanes = arguments[0], LANES
        while lanes > 1:
            vector, lanes = builder.fadd(*_halves(builder, vector, lanes)), lanes // 2
        return builder.extract_element(vector, _INT(0))

    return types.float32(_vector), generate


@operation
def largest(typing: Any, a: Any) -> Any:
    """The largest of a vector's numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, lanes = arguments[0], LANES
        while lanes > 1:
            vector, lanes = _larger(builder, *_halves(builder, vector, lanes)), lanes // 2
        return builder.extract_element(vector, _INT(0))

    return types.float32(_vector), generate


@operation
def store_totals(typing: Any, array: Any, offset: Any, a: Any, b: Any, c: Any, d: Any, factor: Any) -> Any:
    """Write the sums of four vectors, times a factor, to four neighbours in a flat array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, *vectors, factor = arguments
        quarters = [builder.fadd(*_halves(builder, v, LANES)) for v in vectors]
        quarters = [builder.fadd(*_halves(builder, v, LANES // 2)) for v in quarters]

        def pairs(p: Any, q: Any) -> Any:
            """Sums of neighbours."""
            parts = (builder.shuffle_vector(p, q, _mask(lanes)) for lanes in ((0, 2, 4, 6), (1, 3, 5, 7)))
            return builder.fadd(*parts)

        sums = builder.fmul(pairs(pairs(*quarters[:2]), pairs(*quarters[2:])), _spread(builder, factor, 4))
        where = _pointer(context, builder, signature.args[0], (array, offset), ir.VectorType(_FLOAT, 4))
        _unaligned(builder.store(sums, where))
        return context.get_dummy_value()

    return types.void(array, types.int64, _vector, _vector, _vector, _vector, types.float32), generate


@operation
def exponential(typing: Any, a: Any) -> Any:
    """e^x of numbers up to 0; below -87 as for -87. What is no number stays none.

    Cephes' polynomial for floats (expf): 1e-7 of relative error.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integers = ir.VectorType(_INT, LANES)
        x = _larger(builder, _constant(-87.0), arguments[0])
        # e^x = 2^n e^r with a whole n and r within ln(2) / 2; ln(2) in two parts, so that r is exact.
        n = _each(builder, "floor", _each(builder, "fmuladd", x, _constant(1.44269504088896341), _constant(0.5)))
        r = _each(builder, "fmuladd", n, _constant(-0.693359375), x)
        r = _each(builder, "fmuladd", n, _constant(2.12194440e-4), r)
        p = _constant(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = _each(builder, "fmuladd", p, r, _constant(c))
        p = builder.fadd(_each(builder, "fmuladd", p, builder.fmul(r, r), r), _constant(1.0))
        bias, places = (ir.Constant(integers, [value] * LANES) for value in (127, 23))
        power = builder.shl(builder.add(builder.fptosi(n, integers), bias), places)
        return builder.fmul(p, builder.bitcast(power, _VECTOR))

    return _vector(_vector), generate


@operation
def call(typing: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    """Call a function in C, given by its address, with three pointers; returns a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(64)
        kind = ir.FunctionType(pointer, [pointer] * 3).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate
