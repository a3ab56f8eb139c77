"""When requests are meant to be sent: drawn before the run from a rate and a seed, or read from a trace.

Letters in shapes: n requests, k pieces of a rate.
"""

import array
import csv
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from beamline_client.load.notation import NotationUnusable, parse_duration_s, parse_number
from beamline_client.load.textfiles import TextUnreadable, open_text

Times: TypeAlias = npt.NDArray[np.float64]
"""Seconds from the start of the run, shape [n]."""

MAX_REQUESTS = 50_000_000
MAX_RATE_PER_S = 1e6

_HOW_TO_WRITE = "write a rate per second such as 100, ramp:10-200, step:50,100,150 or spike:50,400,10s,2s"
_TRACE_COLUMN = "intended_s"
_HOW_TO_WRITE_TIMES = f"write one in seconds per line, or a column {_TRACE_COLUMN}"
_FIRST_EPOCH_S = 1e6
_STREAM = 0  # of the seed; the workload draws from another, so that one can change without the other
_CHUNK = 1 << 20


class ArrivalsUnusable(ValueError):
    """No arrivals can be drawn or read; the text is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Spike:
    """When a spike is, in seconds from the start of the run."""

    from_s: float
    length_s: float


@dataclass(frozen=True, slots=True)
class RateProfile:
    """A rate over the time of a run: linear in pieces."""

    text: str
    """As the user wrote it."""
    shape: Literal["flat", "ramp", "step", "spike"]
    rates: tuple[float, ...]
    """Per second: the one; from and to; those of the steps; base and peak."""
    spike: Spike | None = None

    @classmethod
    def flat(cls, rate_per_s: float) -> "RateProfile":
        """The same rate all the time.

        Raises:
            ArrivalsUnusable: It is no rate.
        """
        text = f"{rate_per_s:.12g}"
        return cls(text, "flat", (_checked(rate_per_s, text),))

    @property
    def highest_per_s(self) -> float:
        """The highest rate that it reaches."""
        return max(self.rates)

    def requests(self, duration_s: float) -> float:
        """How many requests a run of that many seconds has on average.

        Raises:
            ArrivalsUnusable: The duration is none, or a spike lies outside of it.
        """
        return float(self._pieces(duration_s).cumulative[-1])

    def cumulative(self, times: Times, duration_s: float) -> npt.NDArray[np.float64]:
        """Mean number of requests up to each of the times, Λ(t), shape [n].

        Raises:
            ArrivalsUnusable: The duration is none, or a spike lies outside of it.
        """
        pieces = self._pieces(duration_s)
        piece = np.clip(np.searchsorted(pieces.edges_s, times, side="right") - 1, 0, len(pieces.first) - 1)
        into_s = times - pieces.edges_s[piece]
        mean: npt.NDArray[np.float64] = (
            pieces.cumulative[piece] + (pieces.first[piece] + pieces.slopes[piece] * into_s / 2) * into_s
        )
        return mean

    def when(self, points: npt.NDArray[np.float64], duration_s: float) -> Times:
        """The inverse of `cumulative`: when the mean number of requests reaches each of the points, shape [n].

        Within a piece that begins with rate a and has slope b, u = a t + b t²/2; of the two forms of the root,
        t = 2u / (a + √(a² + 2bu)) loses no digits and holds for b = 0 too.

        Raises:
            ArrivalsUnusable: The duration is none, or a spike lies outside of it.
        """
        pieces = self._pieces(duration_s)
        piece = np.clip(np.searchsorted(pieces.cumulative, points, side="right") - 1, 0, len(pieces.first) - 1)
        beyond = points - pieces.cumulative[piece]
        first = pieces.first[piece]
        root = np.sqrt(np.maximum(first * first + 2 * pieces.slopes[piece] * beyond, 0))
        times: Times = pieces.edges_s[piece] + 2 * beyond / (first + root)
        return times

    def _pieces(self, duration_s: float) -> "_Pieces":
        if not (math.isfinite(duration_s) and duration_s > 0):
            raise ArrivalsUnusable(f"a run of {duration_s:g} s has no requests: give it a duration above 0")
        if self.shape == "ramp":
            return _Pieces.of([0.0, duration_s], [self.rates[0]], [self.rates[1]])
        if self.spike is None:
            parts = len(self.rates)
            return _Pieces.of([duration_s * part / parts for part in range(parts + 1)], self.rates, self.rates)
        start_s, end_s = self.spike.from_s, self.spike.from_s + self.spike.length_s
        if end_s > duration_s:
            raise ArrivalsUnusable(
                f"the spike of {self.text!r} ends after {end_s:g} s, the run after {duration_s:g} s: "
                "start it earlier or run longer"
            )
        base, peak = self.rates
        return _Pieces.of([0.0, start_s, end_s, duration_s], [base, peak, base], [base, peak, base])


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Where a rate is linear."""

    edges_s: npt.NDArray[np.float64]
    """Shape [k + 1]."""
    first: npt.NDArray[np.float64]
    """The rate that each begins with, per second, shape [k]."""
    slopes: npt.NDArray[np.float64]
    """Per second and second, shape [k]."""
    cumulative: npt.NDArray[np.float64]
    """Mean number of requests up to each edge, shape [k + 1]."""

    @classmethod
    def of(
        cls, edges_s: list[float], first: list[float] | tuple[float, ...], last: "list[float] | tuple[float, ...]"
    ) -> "_Pieces":
        """From the rates at the start and at the end of each piece; pieces without length are left out."""
        edges, start, end = np.array(edges_s), np.array(first), np.array(last)
        widths = np.diff(edges)
        kept = widths > 0
        edges = np.append(edges[:-1][kept], edges[-1])
        widths, start, end = widths[kept], start[kept], end[kept]
        cumulative = np.append(0.0, np.cumsum(widths * (start + end) / 2))
        return cls(edges, start, (end - start) / widths, cumulative)


def parse_rate(text: str) -> RateProfile:
    """Reads a rate over time.

    Either "100", or "ramp:10-200", linear over the run, or "step:50,100,150", equal parts of the run, or
    "spike:50,400,10s,2s": base, peak, from, length.

    Raises:
        ArrivalsUnusable: It is none of them, or a rate is not above 0.
    """
    written = text.strip()
    shape, colon, rest = written.partition(":")
    try:
        if not colon:
            return RateProfile(written, "flat", (_rate(written, text),))
        if shape == "ramp":
            first, _, last = rest.partition("-")
            return RateProfile(written, "ramp", (_rate(first, text), _rate(last, text)))
        if shape == "step":
            return RateProfile(written, "step", tuple(_rate(part, text) for part in rest.split(",")))
        if shape == "spike" and rest.count(",") == 3:
            base, peak, start, length = rest.split(",")
            spike = Spike(parse_duration_s(start, unit="s"), parse_duration_s(length, unit="s"))
            if spike.length_s <= 0:
                raise ArrivalsUnusable(f"the spike of {text!r} has no length: {_HOW_TO_WRITE}")
            return RateProfile(written, "spike", (_rate(base, text), _rate(peak, text)), spike)
    except NotationUnusable as error:
        raise ArrivalsUnusable(f"{text!r} is no rate, for {error}: {_HOW_TO_WRITE}") from error
    raise ArrivalsUnusable(f"{text!r} is no rate: {_HOW_TO_WRITE}")


def draw_arrivals(profile: RateProfile, process: Literal["poisson", "constant"], duration_s: float, seed: int) -> Times:
    """Draws when the requests of a run are meant to be sent: the same for the same arguments, everywhere.

    A change of time: points of a process with rate 1, mapped by the inverse of the cumulative rate, are points of the
    process with that rate. For a Poisson process that is exact (Çinlar, Introduction to Stochastic Processes, 1975,
    section 4.7; Lewis and Shedler, Naval Research Logistics Quarterly 26, 1979).

    Args:
        profile: The rate over time.
        process: "poisson": exponential gaps; "constant": the points k + 1/2.
        duration_s: Length of the run, in seconds.
        seed: 0 or above.

    Returns:
        Ascending, from 0 to below the duration, shape [n].

    Raises:
        ArrivalsUnusable: The run would have no request or too many, a spike is outside of it, or the seed is negative.
    """
    if seed < 0:
        raise ArrivalsUnusable(f"the seed {seed} is negative: choose 0 or above")
    total = profile.requests(duration_s)
    if total > MAX_REQUESTS:
        raise ArrivalsUnusable(
            f"a rate of {profile.text} for {duration_s:g} s is {total:.3g} requests, "
            f"more than {MAX_REQUESTS:,}: lower the rate or run shorter"
        )
    points = _poisson_points(total, seed) if process == "poisson" else np.arange(0.5, total)
    if not len(points):
        raise ArrivalsUnusable(
            f"a rate of {profile.text} for {duration_s:g} s draws no request: raise the rate or run longer"
        )
    # Rounding may take the last point to the very end, and neighbours past each other.
    times = np.minimum(profile.when(points, duration_s), np.nextafter(duration_s, 0))
    return np.maximum.accumulate(times)


def read_trace(path: Path) -> Times:
    """Reads the times of a trace: one in seconds per line, or the column `intended_s` of a CSV file; see `open_text`.

    A list must ascend. The CSV file is the log of a run, which is in the order in which requests ended, and is sorted.
    Lines that are empty or begin with # are left out. Times from 1e6 s on are taken for a calendar's and begin with the
    first; shorter ones already count from the start of the run.

    Returns:
        Ascending, 0 or above, shape [n].

    Raises:
        ArrivalsUnusable: The file cannot be read, has no times, or one that is none, negative or, in a list, too early.
    """
    try:
        with open_text(path) as lines:
            times = _trace_times(path, lines)
    except TextUnreadable as error:
        raise ArrivalsUnusable(str(error)) from error
    except csv.Error as error:
        raise ArrivalsUnusable(f"{path} is no trace ({error}): {_HOW_TO_WRITE_TIMES}") from error
    if not len(times):
        raise ArrivalsUnusable(f"{path} has no times: {_HOW_TO_WRITE_TIMES}")
    return times - times[0] if times[0] >= _FIRST_EPOCH_S else times


def schedule_sha256(times: Times) -> str:
    """SHA-256 of the times as little-endian doubles, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(times, "<f8").tobytes()).hexdigest()


def _rate(text: str, whole: str) -> float:
    return _checked(parse_number(text), whole)


def _checked(rate_per_s: float, whole: str) -> float:
    if not rate_per_s > 0:
        raise ArrivalsUnusable(f"{whole!r} has a rate that is not above 0: {_HOW_TO_WRITE}")
    if rate_per_s > MAX_RATE_PER_S:
        raise ArrivalsUnusable(f"{whole!r} has a rate above {MAX_RATE_PER_S:,.0f} per second: choose a lower one")
    return rate_per_s


def _poisson_points(total: float, seed: int) -> npt.NDArray[np.float64]:
    """Points of a Poisson process with rate 1 below `total`; a longer run begins with those of a shorter one."""
    generator = np.random.default_rng([seed, _STREAM])
    chunks: list[npt.NDArray[np.float64]] = []
    last = 0.0
    while last < total:
        chunk = generator.standard_exponential(_CHUNK)
        chunk[0] += last
        chunks.append(np.cumsum(chunk))
        last = chunks[-1][-1]
    points = np.concatenate(chunks)
    return points[: np.searchsorted(points, total)]


def _trace_times(path: Path, lines: Iterable[str]) -> Times:
    times = array.array("d")
    column, columns = None, 1
    is_log = False
    reader = csv.reader(lines)
    last = 0.0
    for row in reader:
        if not row or (not row[0].strip() and len(row) == 1) or row[0].lstrip().startswith("#"):
            continue
        if column is None:
            is_log = _TRACE_COLUMN in row
            column, columns = (row.index(_TRACE_COLUMN), len(row)) if is_log else (0, 1)
            if is_log:
                continue
        time_s = _trace_time(
            row[column] if len(row) == columns else None, ",".join(row), f"{path}, line {reader.line_num}"
        )
        if time_s < last and not is_log:
            raise ArrivalsUnusable(
                f"{path}, line {reader.line_num}: {time_s:g} s comes before {last:g} s: sort the times"
            )
        times.append(time_s)
        last = time_s
        if len(times) > MAX_REQUESTS:
            raise ArrivalsUnusable(f"{path} has more than {MAX_REQUESTS:,} times: cut it")
    return np.sort(np.frombuffer(times, np.float64)) if times else np.empty(0)


def _trace_time(text: str | None, row: str, where: str) -> float:
    try:
        if text is None:
            raise NotationUnusable("too many fields or too few")
        time_s = parse_number(text)
    except NotationUnusable as error:
        raise ArrivalsUnusable(f"{where}: {row[:40]!r} has no time: {_HOW_TO_WRITE_TIMES}") from error
    if time_s < 0:
        raise ArrivalsUnusable(f"{where}: {time_s:g} s is negative: times count from the start of the run")
    return time_s
