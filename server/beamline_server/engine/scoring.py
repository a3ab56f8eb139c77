"""Length penalties: what divides the sum of a hypothesis' log-probabilities."""

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


_MAGNITUDE = 30
"""Divisors stay within 10^±30, so that no finite sum overflows fp32 when it is divided."""


def bounded_exponent(exponent: float, longest: int) -> float:
    """The length penalty, or the nearest one whose divisors fp32 can divide by for up to `longest` tokens.

    Further out all scores would be zero or infinite, and no order would be left among them.
    """
    most = _MAGNITUDE / math.log10(max(longest, 2))
    return min(max(exponent, -most), most)


def length_divisor(length: NDArray[np.int64], exponent: NDArray[np.float64], gnmt: NDArray[np.bool_]) -> FloatArray:
    """Divisors of the summed log-probabilities, one per sentence.

    n^p (Hugging Face `generate`), or ((5 + n) / 6)^p where `gnmt` is set (Wu et al. 2016, eq. 14).

    Args:
        length: Generated tokens, end-of-sequence included, (S,).
        exponent: The length penalty, (S,).
        gnmt: Which sentences use the GNMT kind, (S,).
    """
    base = np.where(gnmt, (5.0 + length) / 6.0, length.astype(np.float64))
    # Divided in fp32, as Hugging Face divides: the same operands give the same bits.
    return np.power(base, exponent).astype(np.float32)
