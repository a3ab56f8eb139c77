"""How sure the ratio of two runs' figures is: a block bootstrap over their windows.

Neighbouring requests wait in the same queue, so they are no independent draws: drawing single ones again would promise
too much. Drawn again are blocks of consecutive windows, not overlapping (E. Carlstein, "The use of subseries values for
estimating the variance of a general statistic", Annals of Statistics 14, 1986; H. Künsch, Annals of Statistics 17,
1989, on why blocks), whose length grows as the cube root of the number of windows. The interval is that of percentiles
(B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13), expanded for few blocks
(T. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015).

Letters: w windows, b blocks, v different values, r resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from beamline_client.load.histograms import decoded, new_histogram
from beamline_client.load.report import Window

CONFIDENCE = 0.95
FEWEST_BLOCKS = 5
_BLOCK_LENGTH = 1.5
"""Windows of a block, by the cube root of their number: the intervals of runs whose windows have a correlation of 0.6
from one to the next hold the truth in 9 of 10 cases, those of independent ones in 19 of 20, 20 to 120 windows."""
_LARGEST_BATCH = 4_000_000  # numbers at a time: 32 MB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A run, cut into blocks of consecutive windows."""

    values_ms: Floats
    """Different latencies, ascending, shape [v]; at least one."""
    counts: Floats
    """Answers that took at most so long, shape [b, v]; the last column is all of them."""
    answered: Floats
    """Answers that came, shape [b]."""
    seconds: Floats
    """How long the blocks are, shape [b]."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one draw of blocks amounts to, for each of r draws; not finite where a draw has no answers."""

    p50_ms: Floats
    """Shape [r], like the others."""
    p99_ms: Floats
    answered_per_s: Floats


def cut(windows: Sequence[Window]) -> Blocks:
    """Cuts windows, `FEWEST_BLOCKS` at least and some of them with answers, into blocks of about the same length."""
    found = [_recorded(window) for window in windows]
    every = np.unique(np.concatenate([indices for indices, _ in found]))
    counts = np.zeros((len(windows), len(every)))
    for row, (indices, recorded) in zip(counts, found, strict=True):
        row[np.searchsorted(every, indices)] = recorded
    layout = new_histogram()
    values_us = [layout.get_highest_equivalent_value(layout.get_value_from_index(index)) for index in every.tolist()]
    # Not fewer blocks than the least: in a short run there has to be something to draw from.
    length = min(math.ceil(_BLOCK_LENGTH * math.cbrt(len(windows))), len(windows) // FEWEST_BLOCKS)
    starts = np.linspace(0, len(windows), len(windows) // length, endpoint=False).astype(np.intp)

    def per_block(values: Floats) -> Floats:
        return np.add.reduceat(values, starts, axis=0)

    return Blocks(
        values_ms=np.array(values_us, np.float64) / 1000,
        counts=per_block(np.cumsum(counts, axis=1)),
        answered=per_block(np.array([window.answered for window in windows], np.float64)),
        seconds=per_block(np.array([window.seconds for window in windows], np.float64)),
    )


def _recorded(window: Window) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint64]]:
    """Which counters of a window's histogram are not zero, and what they say; shapes [v of this window]."""
    if window.histogram is None:
        return np.zeros(0, np.intp), np.zeros(0, np.uint64)
    histogram = decoded(window.histogram)  # the array below is its memory
    counters = np.ctypeslib.as_array(histogram.counts)
    indices = np.flatnonzero(counters)
    return indices, counters[indices].astype(np.uint64)


def measured(blocks: Blocks) -> Figures:
    """The figures of the run itself, each block once; r is 1."""
    return _figures(blocks, np.ones((1, len(blocks.seconds))))


def drawn_again(blocks: Blocks, resamples: int, random: np.random.Generator) -> Figures:
    """The figures of as many blocks, drawn with replacement, so many times."""
    number = len(blocks.seconds)
    weights = random.multinomial(number, np.full(number, 1 / number), size=resamples)
    return _figures(blocks, weights.astype(np.float64))


def _figures(blocks: Blocks, weights: Floats) -> Figures:
    batch = max(1, _LARGEST_BATCH // len(blocks.values_ms))
    parts = [weights[start : start + batch] @ blocks.counts for start in range(0, len(weights), batch)]
    return Figures(
        p50_ms=np.concatenate([_percentile_ms(blocks.values_ms, part, 50) for part in parts]),
        p99_ms=np.concatenate([_percentile_ms(blocks.values_ms, part, 99) for part in parts]),
        answered_per_s=(weights @ blocks.answered) / (weights @ blocks.seconds),
    )


def _percentile_ms(values_ms: Floats, counts: Floats, percentile: float) -> Floats:
    """The percentiles, by the rule of `histograms`, of r histograms with cumulated counts of shape [r, v]."""
    total = counts[:, -1]
    rank = np.maximum(np.ceil(np.nextafter(percentile, 0) * total / 100), 1)
    found = values_ms[(counts >= rank[:, None]).argmax(axis=1)]
    return np.where(total > 0, found, np.nan)


def interval(before: Floats, after: Floats, blocks: tuple[int, int]) -> tuple[float, float]:
    """The 95 % confidence interval of the ratio after / before.

    Args:
        before: A figure of the run before, drawn again, shape [r].
        after: That of the run after, shape [r].
        blocks: How many blocks each of the two runs has.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = after / before
    ratios = ratios[np.isfinite(ratios)]
    tail = expanded_tail(blocks)
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return float(low), float(high)


def expanded_tail(blocks: tuple[int, int]) -> float:
    """The share to cut off at each end: less than 2.5 % as blocks are fewer.

    Draws from b blocks vary less than the blocks by (b - 1) / b, and their spread is itself but estimated, which is
    what Student's t is for (Hesterberg 2015, section 5.3).
    """
    fewer, freedom = min(blocks), sum(blocks) - 2
    return NormalDist().cdf(-math.sqrt(fewer / (fewer - 1)) * _t_quantile(1 - (1 - CONFIDENCE) / 2, freedom))


def _t_quantile(probability: float, freedom: int) -> float:
    """Student's t, by the expansion 26.7.5 of Abramowitz and Stegun; three digits from 8 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
