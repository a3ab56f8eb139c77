"""Formulas of sinusoidal position tables."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from beamline_export.spec import Array

Formula = Callable[[NDArray[np.int64], int], Array]
"""Positions (P) and width D -> table (P, D)."""
Table = Callable[[int, int], Array]
"""Number of positions P and width D -> table (P, D)."""


def interleaved_positions(positions: int, width: int) -> Array:
    """The paper's table, (positions, width): sine at even, cosine at odd features (Vaswani et al. 2017, §3.5)."""
    return _interleaved(np.arange(positions), width)


def sinusoidal_positions(positions: int, width: int) -> Array:
    """MarianMT's table, (positions, width): all sines first, then all cosines, of the paper's frequencies."""
    return _halves(np.arange(positions), width)


def stretched_positions(positions: int, width: int, first: int = 0) -> Array:
    """The table of Tensor2Tensor, fairseq and Marian itself, (positions, width): sines first, then cosines.

    The frequencies reach 1/10000 in the last feature of each half; row 0 is position `first`. Rounded as these
    toolkits do, and transformers: all in fp32.
    """
    half = width // 2
    step = np.float32(np.log(10000) / max(half - 1, 1))
    frequency = np.exp(np.arange(half, dtype=np.float32) * -step)
    angle = np.arange(first, first + positions, dtype=np.float32)[:, None] * frequency[None]
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return np.pad(table, ((0, 0), (0, width - 2 * half)))


def _interleaved(positions: NDArray[np.int64], width: int) -> Array:
    angle = _angles(positions, width)
    table = np.zeros((len(positions), width), np.float32)
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle)[:, : width // 2]
    return table


def _cosines_at_even(positions: NDArray[np.int64], width: int) -> Array:
    angle = _angles(positions, width)
    table = np.zeros((len(positions), width), np.float32)
    table[:, 0::2] = np.cos(angle)
    table[:, 1::2] = np.sin(angle)[:, : width // 2]
    return table


def _halves(positions: NDArray[np.int64], width: int) -> Array:
    angle = _angles(positions, width)
    return np.concatenate([np.sin(angle), np.cos(angle)[:, : width // 2]], axis=1).astype(np.float32)


def _halves_to_the_end(positions: NDArray[np.int64], width: int) -> Array:
    half = width // 2
    frequency = np.float64(10000.0) ** (-np.arange(half) / max(half - 1, 1))
    angle = positions[:, None] * frequency[None]
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
    return np.pad(table, ((0, 0), (0, width - 2 * half)))


def _angles(positions: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """Position times frequency, (P, D / 2), rounded up."""
    frequency: NDArray[np.float64] = np.power(10000.0, -np.arange(0, width, 2) / width)
    return positions[:, None].astype(np.float64) * frequency[None]


FORMULAS: Mapping[str, Formula] = {
    "sine at even and cosine at odd features": _interleaved,
    "cosine at even and sine at odd features": _cosines_at_even,
    "all sines first, then all cosines, as Marian has it": _halves,
    "all sines first, then all cosines, as Tensor2Tensor and fairseq have it": _halves_to_the_end,
}
"""What tables are told apart by."""
