"""Service-level objectives: `p99<=500ms,errors<=0.1%`, read once and checked against what was measured."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from hdrh.histogram import HdrHistogram

from beamline_client.load.histograms import percentile_ms
from beamline_client.load.report import Clause, Slo

_LATENCY = re.compile(r"p(?P<percentile>\d+(?:\.\d+)?)<=?(?P<value>\d+(?:\.\d+)?)(?P<unit>us|ms|s)")
_ERRORS = re.compile(r"errors<=?(?P<value>\d+(?:\.\d+)?)%")
_MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
_EXAMPLE = "write conditions such as p99<=500ms,errors<=0.1%"


class SloUnusable(ValueError):
    """The text is no objective, or one that nothing can meet; one line that says why."""


@dataclass(frozen=True, slots=True)
class LatencyClause:
    """At least `percentile` percent of the requests are answered within `limit_ms` of their intended send.

    A request that failed was not: an overloaded server that refuses most of them would otherwise look fast.
    """

    text: str
    percentile: float
    limit_ms: float


@dataclass(frozen=True, slots=True)
class Objective:
    """A parsed objective."""

    text: str
    latencies: tuple[LatencyClause, ...]
    errors: float | None
    """Largest share of failed requests, 0 to 1; None is not limited."""
    errors_text: str

    @property
    def limit_s(self) -> float | None:
        """The latency within which an answer counts for goodput: the limit of the highest percentile; None if none."""
        strictest = max(self.latencies, key=lambda clause: clause.percentile, default=None)
        return None if strictest is None else strictest.limit_ms / 1000

    def check(self, answered: HdrHistogram, *, attempted: int, failed: int) -> Slo:
        """Compares with what was measured.

        Args:
            answered: Latency of the answered requests, from the intended send.
            attempted: Requests that were sent and that we did not give up.
            failed: Those of them that failed.
        """
        clauses = [self._latency(clause, answered, failed) for clause in self.latencies]
        if self.errors is not None:
            share = failed / attempted if attempted else 0.0
            clauses.append(Clause(text=self.errors_text, measured=f"{share:.3%}", met=share <= self.errors))
        answered_any = answered.get_total_count() > 0
        return Slo(text=self.text, met=answered_any and all(clause.met for clause in clauses), clauses=clauses)

    def _latency(self, clause: LatencyClause, answered: HdrHistogram, failed: int) -> Clause:
        answers = answered.get_total_count()
        if not answers:
            return Clause(text=clause.text, measured="no answers", met=False)
        # Failures rank behind all answers.
        rank = math.ceil(math.nextafter(clause.percentile, 0) * (answers + failed) / 100)
        if rank > answers:
            return Clause(text=clause.text, measured=f"{failed / (answers + failed):.1%} failed", met=False)
        value_ms = percentile_ms(answered, 100 * rank / answers)
        return Clause(text=clause.text, measured=f"{value_ms:.1f} ms", met=value_ms <= clause.limit_ms)


def parse_slo(text: str) -> Objective:
    """Reads an objective.

    Raises:
        SloUnusable: It is not one, or nothing could meet it.
    """
    latencies: list[LatencyClause] = []
    errors, errors_text = None, ""
    for part in filter(None, (part.strip().replace(" ", "") for part in text.split(","))):
        if match := _LATENCY.fullmatch(part):
            latencies.append(_latency_clause(part, match.group))
        elif match := _ERRORS.fullmatch(part):
            if errors is not None:
                raise SloUnusable(f"two conditions on errors: {text!r}; keep one")
            # Divided in decimal: 0.7 / 100 is less than 7 / 1000 in binary, and 7 failures of 1000 meet 0.7 %.
            errors, errors_text = float(Decimal(match["value"]) / 100), part
            if errors >= 1:
                raise SloUnusable(f"{part!r} allows every request to fail: {_EXAMPLE}")
        else:
            raise SloUnusable(f"{part!r} is no condition: {_EXAMPLE}")
    if not latencies and errors is None:
        raise SloUnusable(f"the SLO is empty: {_EXAMPLE}")
    return Objective(text, tuple(latencies), errors, errors_text)


def _latency_clause(text: str, group: Callable[[str], str]) -> LatencyClause:
    percentile, limit_ms = float(group("percentile")), float(group("value")) * _MILLISECONDS[group("unit")]
    if not 0 < percentile < 100:
        raise SloUnusable(f"{text!r}: a percentile lies between 0 and 100; {_EXAMPLE}")
    if limit_ms <= 0:
        raise SloUnusable(f"{text!r} cannot be met: no answer takes no time; {_EXAMPLE}")
    return LatencyClause(text, percentile, limit_ms)
