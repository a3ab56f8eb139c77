"""What repeated measurements say: medians, spreads, ratios within a repetition."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, the least and the greatest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, repetition by repetition: what slows the machine down slows down both.

    Raises:
        ValueError: there are not as many of one as of the other.
    """
    return [own / other for own, other in zip(ours, theirs, strict=True)]
