"""Turns the records of requests into distributions, rates and windows as they come, in memory that does not grow."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram

from beamline_client.load import histograms
from beamline_client.load.records import Records
from beamline_client.load.report import Latency, RequestClass, Throughput, Window
from beamline_client.load.target import FAILURES, Outcome

MOST_WINDOWS = 120
SHORTEST_WINDOW_S = 1.0
FEWEST_WINDOWS = 10
PHASES = ("queue", "encode", "decode", "elsewhere")

_FAILED = np.array([outcome in FAILURES for outcome in Outcome])
_COUNTED = np.array([outcome not in (Outcome.CANCELLED, Outcome.NOT_SENT) for outcome in Outcome])


def window_length_s(duration_s: float) -> float:
    """How long the windows of a run are: a second, longer for long runs, a tenth of the run for short ones."""
    return max(min(SHORTEST_WINDOW_S, duration_s / FEWEST_WINDOWS), duration_s / MOST_WINDOWS)


@dataclass(frozen=True, slots=True)
class Frame:
    """How a run is divided in time, and what is asked in it."""

    duration_s: float
    """Length of the schedule."""
    window_s: float
    warm_up_s: float
    """Requests meant to be sent before it are left out of latency and rates; a multiple of `window_s`."""
    limit_s: float | None
    """Latency within which an answer counts for goodput."""
    class_names: Sequence[str]
    class_of: npt.NDArray[np.integer]
    """Class of each question, shape [questions]."""

    @property
    def windows(self) -> int:
        """How many windows the schedule has."""
        return max(1, int(np.ceil(self.duration_s / self.window_s - 1e-9)))


def whole_windows_s(time_s: float, window_s: float) -> float:
    """The time, rounded to whole windows."""
    return round(time_s / window_s) * window_s


class Recorder:
    """Everything that is known about the requests that have ended so far. Single-threaded."""

    def __init__(self, frame: Frame, offered: npt.NDArray[np.floating] | None) -> None:
        """Begins with nothing.

        Args:
            frame: See there.
            offered: The intended times of all requests in seconds, shape [n]; None in a closed loop, where they are
                known only once they are sent.
        """
        self.frame = frame
        self.outcomes: Counter[Outcome] = Counter()
        self.codes: Counter[int] = Counter()
        self.failed_after_warm_up = 0
        self.attempted_after_warm_up = 0
        """Requests after the warm-up that were sent and not given up by us."""
        self.answered = histograms.new_histogram()
        """Latency of answered requests after the warm-up, from the intended send."""
        self._from_send = histograms.new_histogram()
        self._with_failures = histograms.new_histogram()
        self.lag = histograms.new_histogram()
        """Of every request that was sent, warm-up included."""
        self._first_piece = histograms.new_histogram()
        self._phases = {phase: histograms.new_histogram() for phase in PHASES}
        self._classes = [histograms.new_histogram() for _ in frame.class_names]
        self._class_counts = np.zeros(len(frame.class_names), np.int64)
        self.too_slow = 0
        """Requests after the warm-up that failed, or were answered after the limit; 0 without one."""
        n = frame.windows
        self._window_histograms: list[HdrHistogram | None] = [None] * n
        self._offered = np.zeros(n, np.int64) if offered is None else self._per_window(offered)
        self._offered_is_known = offered is not None
        self._failed = np.zeros(n, np.int64)
        # Of answers, by the window in which they came.
        self._answered, self._good, self._tokens, self._characters = (np.zeros(n, np.int64) for _ in range(4))
        # Sums over answers in ms, by the window in which they were meant to be sent; and their number.
        self._phase_sums = {phase: np.zeros(n) for phase in PHASES[:3]}
        self._phase_counts = np.zeros(n, np.int64)

    @property
    def ended(self) -> int:
        """Requests whose end is known."""
        return self.outcomes.total()

    def add(self, records: Records) -> None:
        """Takes in the ends of some requests."""
        if not len(records):
            return
        outcome = records["outcome"]
        self.outcomes.update({Outcome(i): int(n) for i, n in enumerate(np.bincount(outcome)) if n})
        sent = records[outcome != Outcome.NOT_SENT]
        self.codes.update({int(code): int(n) for code, n in enumerate(np.bincount(sent["code"])) if n})
        histograms.record(self.lag, sent["sent_s"] - sent["intended_s"])
        window = self._window_of(records["intended_s"])
        if not self._offered_is_known:
            self._offered += np.bincount(window, minlength=self.frame.windows)
        self._failed += np.bincount(window[_FAILED[outcome]], minlength=self.frame.windows)
        self._add_answers_to_windows(records[outcome == Outcome.OK])
        self._add_measured(records[records["intended_s"] >= self.frame.warm_up_s - 1e-9])

    def _add_measured(self, records: Records) -> None:
        counted = records[_COUNTED[records["outcome"]]]
        self.attempted_after_warm_up += len(counted)
        self.failed_after_warm_up += int(_FAILED[counted["outcome"]].sum())
        histograms.record(self._with_failures, counted["done_s"] - counted["intended_s"])
        classes = self.frame.class_of[records["question"]]
        self._class_counts += np.bincount(classes, minlength=len(self._classes))
        answered = records[records["outcome"] == Outcome.OK]
        latency_s, from_send_s = answered["done_s"] - answered["intended_s"], answered["done_s"] - answered["sent_s"]
        histograms.record(self.answered, latency_s)
        histograms.record(self._from_send, from_send_s)
        if self.frame.limit_s is not None:
            self.too_slow += int((latency_s > self.frame.limit_s).sum()) + int(_FAILED[counted["outcome"]].sum())
        if len(self._classes) > 1:
            of_answered = classes[records["outcome"] == Outcome.OK]
            for number in np.unique(of_answered):
                histograms.record(self._classes[number], latency_s[of_answered == number])
        streamed = answered[~np.isnan(answered["first_piece_s"])]
        lag_s = streamed["sent_s"] - streamed["intended_s"]
        histograms.record(self._first_piece, streamed["first_piece_s"] + lag_s)
        timed = ~np.isnan(answered["queue_s"])
        told_s = {phase: answered[f"{phase}_s"][timed].astype(np.float64) for phase in PHASES[:3]}
        told_s["elsewhere"] = np.maximum(from_send_s[timed] - sum(told_s.values()), 0)
        for phase, seconds in told_s.items():
            histograms.record(self._phases[phase], seconds)

    def _add_answers_to_windows(self, answered: Records) -> None:
        latency_s = answered["done_s"] - answered["intended_s"]
        meant = self._window_of(answered["intended_s"])
        for number in np.unique(meant):
            histogram = self._window_histograms[number]
            if histogram is None:
                histogram = self._window_histograms[number] = histograms.new_histogram()
            histograms.record(histogram, latency_s[meant == number])
        timed = ~np.isnan(answered["queue_s"])
        n = self.frame.windows
        self._phase_counts += np.bincount(meant[timed], minlength=n)
        for phase in self._phase_sums:
            self._phase_sums[phase] += np.bincount(meant[timed], answered[f"{phase}_s"][timed] * 1000, minlength=n)
        in_time = answered["done_s"] < self.frame.duration_s
        came = self._window_of(answered["done_s"][in_time])
        self._answered += np.bincount(came, minlength=n)
        if self.frame.limit_s is not None:
            self._good += np.bincount(came[latency_s[in_time] <= self.frame.limit_s], minlength=n)
        self._tokens += np.bincount(came, answered["tokens"][in_time], minlength=n).astype(np.int64)
        self._characters += np.bincount(came, answered["characters"][in_time], minlength=n).astype(np.int64)

    def _window_of(self, times_s: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
        return np.clip((times_s / self.frame.window_s).astype(np.intp), 0, self.frame.windows - 1)

    def _per_window(self, times_s: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        return np.bincount(self._window_of(times_s), minlength=self.frame.windows).astype(np.int64)

    def windows(self, until_s: float) -> list[Window]:
        """The windows that had ended so many seconds after the start."""
        return [self._window(number) for number in range(self._whole_windows(until_s))]

    def _whole_windows(self, until_s: float) -> int:
        if until_s >= self.frame.duration_s - 1e-9:
            return self.frame.windows  # the last one may be shorter
        return int(until_s / self.frame.window_s + 1e-9)

    def _window(self, number: int) -> Window:
        histogram, timed = self._window_histograms[number], int(self._phase_counts[number])
        means = {phase: float(sums[number]) / timed if timed else None for phase, sums in self._phase_sums.items()}
        start_s = number * self.frame.window_s
        return Window(
            start_s=start_s,
            seconds=min(self.frame.window_s, self.frame.duration_s - start_s),
            offered=int(self._offered[number]),
            answered=int(self._answered[number]),
            failed=int(self._failed[number]),
            tokens=int(self._tokens[number]),
            p50_ms=None if histogram is None else histograms.percentile_ms(histogram, 50),
            p99_ms=None if histogram is None else histograms.percentile_ms(histogram, 99),
            queue_ms=means["queue"],
            encode_ms=means["encode"],
            decode_ms=means["decode"],
            histogram=None if histogram is None else histograms.encoded(histogram),
        )

    def throughput(self, until_s: float) -> Throughput:
        """Rates from the end of the warm-up to that time, over whole windows."""
        first, end = round(self.frame.warm_up_s / self.frame.window_s), self._whole_windows(until_s)
        seconds = min(end * self.frame.window_s, self.frame.duration_s) - first * self.frame.window_s
        per_s = 1 / seconds if seconds > 0 else 0.0
        measured = slice(first, max(first, end))
        return Throughput(
            seconds=max(seconds, 0.0),
            offered_per_s=float(self._offered[measured].sum()) * per_s,
            answered_per_s=float(self._answered[measured].sum()) * per_s,
            goodput_per_s=None if self.frame.limit_s is None else float(self._good[measured].sum()) * per_s,
            tokens_per_s=float(self._tokens[measured].sum()) * per_s,
            characters_per_s=float(self._characters[measured].sum()) * per_s,
        )

    def stretch(self, first_s: float, end_s: float) -> tuple[float, float | None]:
        """Answers per second, and the median latency in ms or None without answers, from one time to another."""
        first, end = (round(time_s / self.frame.window_s) for time_s in (first_s, end_s))
        together = histograms.new_histogram()
        for histogram in self._window_histograms[first:end]:
            if histogram is not None:
                together.add(histogram)
        median_ms = histograms.percentile_ms(together, 50) if together.get_total_count() else None
        return float(self._answered[first:end].sum()) / ((end - first) * self.frame.window_s), median_ms

    def latencies(self) -> dict[str, Latency | None]:
        """The distributions of a report, by its field names."""
        return {
            "latency": histograms.latency(self.answered),
            "latency_from_send": histograms.latency(self._from_send),
            "latency_with_failures": histograms.latency(self._with_failures),
            "first_piece": histograms.latency(self._first_piece),
        }

    def phases(self) -> dict[str, Latency]:
        """Where the server says that the time went, and the rest."""
        told = {phase: histograms.latency(histogram) for phase, histogram in self._phases.items()}
        return {phase: latency for phase, latency in told.items() if latency is not None}

    def classes(self) -> list[RequestClass]:
        """The classes of a mixed workload; empty if there is one."""
        if len(self._classes) < 2:
            return []
        return [
            RequestClass(name=name, count=int(count), latency=histograms.latency(histogram))
            for name, count, histogram in zip(self.frame.class_names, self._class_counts, self._classes, strict=True)
        ]
