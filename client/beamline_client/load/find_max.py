"""The highest arrival rate at which a server meets an SLO: bracket it, then bisect.

The search itself is a pure function of the rates that were tried. A rate is tried for as long as it takes until its
last three windows agree, as NVIDIA's perf_analyzer does, in answers per second and in median latency.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from beamline_client.load.arrivals import ArrivalsUnusable
from beamline_client.load.assembly import server_description
from beamline_client.load.coordinator import GeneratorFailed
from beamline_client.load.recorder import SHORTEST_WINDOW_S, Recorder, whole_windows_s
from beamline_client.load.report import FindMaxReport, Point, RunReport, Verdict
from beamline_client.load.session import Session
from beamline_client.load.setup import closed_load, open_load
from beamline_client.load.slo import Objective
from beamline_client.load.target import TargetUnusable
from beamline_client.load.wording import milliseconds

PROBE_S = 5.0
PROBE_CALLERS = 64
PROBE_SHARE = 0.8
"""The search begins at this share of what so many callers in a closed loop get answered."""
FIRST_STEP, FURTHER_STEPS = 1.25, 2.0
"""From one rate to the next as long as only one side of the bracket is known: the start is a good guess, or far off."""
WINDOWS_THAT_AGREE = 3
_LOWEST_PER_S = 0.1
_HIGHEST_PER_S = 100_000.0


ATTEMPTS = 3
"""A rate is missed when it was missed so often, and met when it was met once: what disturbs a machine for half a second
makes a rate near the limit miss its p99, and nothing makes a rate beyond it meet."""


@dataclass(frozen=True, slots=True)
class FindMaxOptions:
    """How to search."""

    start_per_s: float | None = None
    """First rate; None asks a short closed loop."""
    precision: float = 0.05
    """The search ends when the bracket is no wider than this share of the rate."""
    window_s: float = 5.0
    max_windows: int = 8
    """A rate whose windows do not agree by then is judged by all of them."""
    stability: float = 0.1
    """Windows agree when they are within this share of their mean."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A rate and whether it met the SLO."""

    rate_per_s: float
    met: bool


@dataclass(frozen=True, slots=True)
class Bracket:
    """What the tried rates tell; None where none does."""

    met: float | None
    """The highest rate that met the SLO, below every rate that missed it."""
    missed: float | None
    """The lowest rate that missed it."""


def bracket(tried: Sequence[Tried]) -> Bracket:
    """Where the highest rate lies. A rate that was met above one that was missed was luck, and does not count.

    A rate is missed only if it was missed as often as it is tried, for a machine can have a bad moment; see `doubtful`.
    """
    rates_met = {each.rate_per_s for each in tried if each.met}
    rates_missed = {each.rate_per_s for each in tried} - rates_met
    missed = min(rates_missed, default=None)
    return Bracket(max((rate for rate in rates_met if missed is None or rate < missed), default=None), missed)


def doubtful(tried: Sequence[Tried]) -> float | None:
    """The rate tried last, if it was missed and is to be tried again."""
    if not tried or tried[-1].met:
        return None
    last = tried[-1].rate_per_s
    return last if [each.rate_per_s for each in tried].count(last) < ATTEMPTS else None


def next_rate(tried: Sequence[Tried], start_per_s: float, precision: float) -> float | None:
    """The rate to try next; None when the bracket is narrow enough, or there is nothing to find."""
    if (again := doubtful(tried)) is not None:
        return again
    known = bracket(tried)
    factor = FIRST_STEP if len({each.rate_per_s for each in tried}) == 1 else FURTHER_STEPS
    if known.met is None and known.missed is None:
        return start_per_s
    if known.missed is None:
        assert known.met is not None
        return _within_reach(known.met * factor)
    if known.met is None:
        return _within_reach(known.missed / factor)
    if known.missed - known.met <= precision * known.met * (1 + 1e-9):
        return None
    return (known.met + known.missed) / 2


def _within_reach(rate_per_s: float) -> float | None:
    return rate_per_s if _LOWEST_PER_S <= rate_per_s <= _HIGHEST_PER_S else None


def agree(values: Sequence[float | None], stability: float) -> bool:
    """Whether all values are within that share of their mean; one that is missing agrees with nothing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return False
    mean = sum(known) / len(known)
    return all(abs(value - mean) <= stability * mean for value in known)


class Patience:
    """Decides when a rate has been tried for long enough; see `Session.run`.

    Args:
        objective: What the rate should meet.
        options: See there.
        warm_up_s: When the windows begin.
        planned: Requests after the warm-up, if the schedule is sent to its end.
    """

    def __init__(self, objective: Objective, options: FindMaxOptions, warm_up_s: float, planned: int) -> None:
        self._objective = objective
        self._options = options
        self._warm_up_s = warm_up_s
        self._planned = planned
        self._windows: list[tuple[float, float | None]] = []
        self.stable = False
        self.hopeless = False

    def enough(self, recorder: Recorder, elapsed_s: float) -> bool:
        """Looks at the windows that have ended; a window has ended when its answers are in, or are too late."""
        self.hopeless = self.hopeless or self._is_hopeless(recorder)
        settled_s = elapsed_s - (self._objective.limit_s or 0.0)
        while settled_s >= (end_s := self._warm_up_s + (len(self._windows) + 1) * self._options.window_s):
            self._windows.append(recorder.stretch(end_s - self._options.window_s, end_s))
        last = self._windows[-WINDOWS_THAT_AGREE:]
        if len(last) == WINDOWS_THAT_AGREE:
            self.stable = all(agree(column, self._options.stability) for column in zip(*last, strict=True))
        return self.stable or self.hopeless

    def _is_hopeless(self, recorder: Recorder) -> bool:
        """Whether the SLO would be missed even if all requests that are still to come were answered in time."""
        strictest = max((clause.percentile for clause in self._objective.latencies), default=None)
        if strictest is not None and recorder.too_slow > (1 - strictest / 100) * self._planned + 1:
            return True
        errors = self._objective.errors
        return errors is not None and recorder.failed_after_warm_up > errors * self._planned + 1


def find_max(session: Session, objective: Objective, options: FindMaxOptions) -> FindMaxReport:
    """Searches, and shows each rate that was tried. What ends it early is told in the report, once a rate was tried.

    Raises:
        TargetUnusable: The server could not be reached from the start.
        GeneratorFailed: A process of the generator died before a rate was tried.
        KeyboardInterrupt: It was interrupted before a rate was tried.
    """
    return _Search(session, objective, options).run()


class _Search:
    def __init__(self, session: Session, objective: Objective, options: FindMaxOptions) -> None:
        self._session = session
        self._objective = objective
        self._options = options
        self._reports: list[tuple[Point, RunReport]] = []
        self._ended_by = ""

    def run(self) -> FindMaxReport:
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._search(self._options.start_per_s or self._probe())
        except (TargetUnusable, GeneratorFailed) as error:
            if not self._reports:
                raise
            self._ended_by = str(error)
        except KeyboardInterrupt:
            if not self._reports:
                raise
        return self._report(started_at)

    def _search(self, start_per_s: float) -> None:
        while not self._session.interruption.asked:
            rate_per_s = next_rate(self._tried(), start_per_s, self._options.precision)
            if rate_per_s is None:
                return
            try:
                self._try(rate_per_s)
            except ArrivalsUnusable:  # so few requests per second that none would come
                return

    def _tried(self) -> list[Tried]:
        return [Tried(point.rate_per_s, point.met) for point, _ in self._reports]

    def _probe(self) -> float:
        report, _ = self._session.run(closed_load(PROBE_CALLERS, PROBE_S))
        answered_per_s = report.throughput.answered_per_s
        start_per_s = max(PROBE_SHARE * answered_per_s, 1.0)
        self._session.view.note(
            f"{PROBE_CALLERS} callers in a closed loop: {answered_per_s:.0f} answers/s; "
            f"the search begins at {start_per_s:.0f}/s"
        )
        return start_per_s

    def _try(self, rate_per_s: float) -> None:
        options, setup = self._options, self._session.setup
        # The recorder's windows divide the search's.
        window_s = options.window_s / math.ceil(options.window_s / SHORTEST_WINDOW_S)
        warm_up_s = whole_windows_s(setup.options.warm_up_s, window_s)
        # The last window has ended only when its answers are in.
        duration_s = warm_up_s + options.max_windows * options.window_s + (self._objective.limit_s or 0.0)
        duration_s = max(duration_s, 2 * warm_up_s)  # a run gives no more than half of itself to the warm-up
        load = replace(open_load(setup.options, f"{rate_per_s:.2f}", duration_s), window_s=window_s)
        assert load.intended_s is not None
        patience = Patience(self._objective, options, warm_up_s, int((load.intended_s >= warm_up_s).sum()))
        report, _ = self._session.run(load, patience.enough)
        if report.verdict.interrupted:
            return
        point = _point(rate_per_s, report, patience)
        self._reports.append((point, report))
        self._session.view.note(_sentence(point))

    def _report(self, started_at: str) -> FindMaxReport:
        known = bracket(self._tried())
        best = next((report for point, report in self._reports if point.met and point.rate_per_s == known.met), None)
        setup = self._session.setup
        _, last = self._reports[-1] if self._reports else (None, None)
        shown = best or last
        return FindMaxReport(
            started_at=started_at,
            configuration=None if shown is None else shown.configuration,
            environment=setup.environment,
            server=server_description(setup.info),
            verdict=self._verdict(known),
            slo=self._objective.text,
            highest_rate_per_s=known.met,
            step_per_s=None if known.met is None or known.missed is None else known.missed - known.met,
            points=[point for point, _ in self._reports],
            best=best,
        )

    def _verdict(self, known: Bracket) -> Verdict:
        decisive = [
            (point, report)
            for point, report in self._reports
            if point.rate_per_s == (known.met if point.met else known.missed)
        ]
        invalid = [
            f"at {point.rate_per_s:.1f}/s: {reason}"
            for point, report in decisive
            for reason in report.verdict.invalid_because
        ]
        failures, remarks = [], list(self._session.setup.remarks)
        if self._ended_by:
            failures.append(f"the search ended early: {self._ended_by}")
        if known.met is None:
            lowest = min((point.rate_per_s for point, _ in self._reports), default=None)
            failures.append("no rate could be tried" if lowest is None else f"not even {lowest:.2f}/s met the SLO")
        if known.met is not None and known.missed is None:
            remarks.append("no rate missed the SLO: the server can do more than was tried")
        for point, report in self._reports:
            wrong = [failure for failure in report.verdict.failures if not failure.startswith("the SLO was missed")]
            failures += [f"at {point.rate_per_s:.1f}/s: {failure}" for failure in wrong if point.met]
        return Verdict(
            valid=not invalid,
            invalid_because=invalid,
            interrupted=self._session.interruption.asked,
            failures=failures,
            remarks=remarks,
        )


def _point(rate_per_s: float, report: RunReport, patience: Patience) -> Point:
    assert report.slo is not None
    percentiles = report.latency.percentiles_ms if report.latency else {}
    attempted = report.latency_with_failures.count if report.latency_with_failures else 0
    answered = report.latency.count if report.latency else 0
    missed = [f"{clause.text} ({clause.measured})" for clause in report.slo.clauses if not clause.met]
    why = ", ".join(missed)
    if not patience.stable:
        doubt = "out of reach" if patience.hopeless else "its windows do not agree"
        why = f"{why}; {doubt}" if why else doubt
    return Point(
        rate_per_s=rate_per_s,
        met=report.slo.met and not patience.hopeless,
        stable=patience.stable,
        valid=report.verdict.valid,
        seconds=report.throughput.seconds,
        answered_per_s=report.throughput.answered_per_s,
        p50_ms=percentiles.get("50"),
        p99_ms=percentiles.get("99"),
        failed_share=1 - answered / attempted if attempted else 0.0,
        why=why,
    )


def _sentence(point: Point) -> str:
    p50, p99 = milliseconds(point.p50_ms), milliseconds(point.p99_ms)
    valid = "" if point.valid else " [INVALID]"
    word = "met" if point.met else "missed"
    why = f": {point.why}" if point.why else ""
    return f"{point.rate_per_s:8.1f}/s  p50 {p50}  p99 {p99}  {point.seconds:.0f} s  {word}{why}{valid}"
