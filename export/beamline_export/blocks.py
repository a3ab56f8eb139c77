"""Weights of 4 bits: blocks of neighbours in a row, each with a scale and a zero point of its own.

The layout is that of onnxruntime's MatMulNBits: a row is cut into blocks of `BLOCK` numbers, the last filled up with
zeros; a number is one of 16 steps, two to a byte, the first in the lower half.

Axes: O outputs of a weight, I inputs, B blocks of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beamline_export.spec import Array

BLOCK = 32
_LAST_STEP = 15
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Parts of a block's range that its steps may cover: what lies beyond saturates, and all else is finer."""
_NUMBERS_AT_ONCE = 1 << 22
"""How much of a weight is worked on at a time, which bounds the memory of it."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight in blocks: a number is its step, less the block's zero, times the block's scale.

    Attributes:
        steps: Two to a byte, (O, B, BLOCK / 2).
        scales: (O, B).
        zeros: Two to a byte, (O, B / 2), half a byte behind an odd number of blocks.
    """

    steps: NDArray[np.uint8]
    scales: Array
    zeros: NDArray[np.uint8]

    def weight(self, inputs: int) -> Array:
        """The weight that these stand for, (O, inputs)."""
        outputs, count = self.scales.shape
        steps = _unpacked(self.steps).astype(np.float32)
        zeros = _unpacked(self.zeros)[:, :count, None].astype(np.float32)
        numbers: Array = ((steps - zeros) * self.scales[..., None]).reshape(outputs, -1)[:, :inputs]
        return numbers


def quantize_blocks(weight: Array) -> Blocks:
    """A weight (O, I) in blocks, each over that part of its range where the sum of squared errors is least."""
    outputs, inputs = weight.shape
    count = -(-inputs // BLOCK)
    steps = np.empty((outputs, count, BLOCK // 2), np.uint8)
    scales, zeros = np.empty((outputs, count), np.float32), np.zeros((outputs, count + count % 2), np.uint8)
    for rows in _slices(outputs, count * BLOCK):
        part = weight[rows]
        filled = np.pad(part, ((0, 0), (0, count * BLOCK - inputs))).reshape(len(part), count, BLOCK)
        found, scales[rows], zeros[rows, :count] = _best(filled)
        steps[rows] = _packed(found)
    return Blocks(steps, scales, _packed(zeros))


def _slices(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _NUMBERS_AT_ONCE // width)
    return (slice(first, first + step) for first in range(0, rows, step))


def _best(blocks: Array) -> tuple[NDArray[np.uint8], Array, NDArray[np.uint8]]:
    """Of blocks (O, B, BLOCK): steps (O, B, BLOCK), scales (O, B), zeros (O, B)."""
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    steps, scale, zero, error = _quantized(blocks, low, high, _RANGES[0])
    for part in _RANGES[1:]:
        other_steps, other_scale, other_zero, other_error = _quantized(blocks, low, high, part)
        better = other_error < error
        steps[better] = other_steps[better]
        scale, zero = np.where(better, other_scale, scale), np.where(better, other_zero, zero)
        error = np.minimum(error, other_error)
    return steps.astype(np.uint8), scale, zero.astype(np.uint8)


def _quantized(blocks: Array, low: Array, high: Array, part: float) -> tuple[Array, Array, Array, Array]:
    """Steps over a part of each block's range about its middle; scales, zeros, and sums of squared errors."""
    scale = ((high - low) * np.float32(part / _LAST_STEP)).astype(np.float32)
    # Whatever scale a block of zeros is given, its numbers are all at the step of zero. So are those so small that
    # their scale is none.
    scale[scale < np.finfo(np.float32).tiny] = 1
    zero = np.clip(np.rint(_LAST_STEP / 2 - (low + high) / 2 / scale), 0, _LAST_STEP)
    steps = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, _LAST_STEP)
    error = np.square((steps - zero[..., None]) * scale[..., None] - blocks).sum(-1)
    return steps, scale, zero, error


def _packed(steps: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two to a byte along the last axis, whose length is even."""
    return (steps[..., ::2] | steps[..., 1::2] << 4).astype(np.uint8)


def _unpacked(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([packed & _LAST_STEP, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
