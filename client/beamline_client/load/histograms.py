"""HdrHistograms of microseconds, and what reports tell of them.

Gil Tene's HdrHistogram: a fixed number of counters, every value known to three significant digits, whatever its size
and however many there are.
"""

import math

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram

from beamline_client.load.report import Latency

HIGHEST_US = 3_600_000_000
"""An hour; what is longer counts as an hour."""
PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
FINEST_PERCENTILE, FINEST_FROM = 99.99, 100_000
"""The 99.99th percentile is told from so many values on: below, it would hang on less than ten of them."""


def new_histogram() -> HdrHistogram:
    """An empty histogram."""
    return HdrHistogram(1, HIGHEST_US, 3)


def record(histogram: HdrHistogram, seconds: npt.NDArray[np.floating]) -> None:
    """Adds times, shape [n], in seconds."""
    microseconds = np.clip(np.rint(seconds * 1e6), 1, HIGHEST_US).astype(np.int64)
    values, counts = np.unique(microseconds, return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram.record_value(value, count)


def encoded(histogram: HdrHistogram) -> str:
    """Its V2 compressed encoding, base64."""
    return histogram.encode().decode("ascii")  # type: ignore[no-any-return]


def decoded(text: str) -> HdrHistogram:
    """The histogram of an encoding."""
    return HdrHistogram.decode(text)


def percentile_ms(histogram: HdrHistogram, percentile: float) -> float:
    """The value below or at which at least that share of the values lies, in milliseconds; 0 if there are none.

    The rank is rounded up, as in the original HdrHistogram. The Python one rounds to the nearest: of 60 values, its
    99th percentile would leave out one.
    """
    count = histogram.get_total_count()
    if not count:
        return 0.0
    rank = max(1, math.ceil(math.nextafter(percentile, 0) * count / 100))  # a step down, lest 99.9 * 1000 / 100 be 1000
    return float(histogram.get_value_at_percentile(100 * rank / count)) / 1000


def latency(histogram: HdrHistogram) -> Latency | None:
    """What a report tells of it; None if it is empty."""
    count = histogram.get_total_count()
    if not count:
        return None
    told = PERCENTILES + ((FINEST_PERCENTILE,) if count >= FINEST_FROM else ())
    return Latency(
        count=count,
        mean_ms=histogram.get_mean_value() / 1000,
        min_ms=histogram.get_min_value() / 1000,
        max_ms=histogram.get_max_value() / 1000,
        percentiles_ms={f"{percentile:g}": percentile_ms(histogram, percentile) for percentile in told},
        histogram=encoded(histogram),
    )
