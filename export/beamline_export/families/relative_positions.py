"""Relative positions by buckets (Raffel et al. 2020, §2.1): near distances one by one, far ones in growing ranges."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beamline_export.checkpoint import Fields
from beamline_export.spec import Array

_LEAST_BUCKETS = 4
"""A side of the encoder has half of them, and half of these are for distances of their own: one at least."""
_MOST_BUCKETS = 1 << 12


@dataclass(frozen=True, slots=True)
class Buckets:
    """How distances share numbers.

    Attributes:
        count: Buckets of a table.
        max_distance: From here on all distances share the last one.
    """

    count: int
    max_distance: int

    def looking_back(self, reach: int) -> NDArray[np.int64]:
        """The bucket of each distance from 0 to `reach` where only what came before is attended to, (reach + 1,)."""
        return _bucket(np.arange(reach + 1), self.count, self.max_distance)

    def both_ways(self, reach: int) -> NDArray[np.int64]:
        """The bucket of each offset from -`reach` to `reach`: behind a token it is in the second half of them."""
        offset, half = np.arange(-reach, reach + 1), self.count // 2
        return np.where(offset > 0, half, 0) + _bucket(np.abs(offset), half, self.max_distance)


def read_buckets(fields: Fields) -> Buckets:
    """The buckets that a config asks for."""
    count = fields.integer("relative_attention_num_buckets", 32, least=_LEAST_BUCKETS, most=_MOST_BUCKETS)
    # Below, the ranges would shrink with the distance.
    return Buckets(count, fields.integer("relative_attention_max_distance", 128, least=count // 2 + 1))


def bias_by_offset(table: Array, buckets: NDArray[np.int64]) -> Array:
    """A table (buckets, heads) -> what each offset adds to the scores of a head, (heads, offsets)."""
    return np.ascontiguousarray(table[buckets].T)


def _bucket(distance: NDArray[np.int64], count: int, max_distance: int) -> NDArray[np.int64]:
    """The bucket of distances from 0 on, by PyTorch's own logarithm: at the borders of ranges its last bit decides."""
    import torch

    exact = count // 2
    # What is nearer has no logarithm to be asked for.
    ratio = torch.from_numpy(np.maximum(distance, exact)).float() / exact
    steps = torch.log(ratio) / math.log(max_distance / exact) * (count - exact)
    far: NDArray[np.int64] = (exact + steps.to(torch.long)).clamp(max=count - 1).numpy()
    return np.where(distance < exact, distance, far)
