"""How figures are written for people, the same on a terminal and on a page."""

from dataclasses import dataclass
from typing import Literal

from beamline_client.load.report import Configuration, FindMaxReport, Pinning, RunReport, ServerDescription, Verdict
from beamline_client.load.slo import SloUnusable, parse_slo
from beamline_client.load.target import FAILURES, Outcome

NOTHING = "–"
_UNTRIED = frozenset({Outcome.CANCELLED, Outcome.NOT_SENT})


def plain(text: str) -> str:
    """The text on one line, without characters that a terminal would obey or a page may not hold."""
    return "".join(character if character.isprintable() else "�" for character in " ".join(text.split()))


def number(value: float | None) -> str:
    """About three digits: 0.42, 7.31, 48.2, 221, 1,559."""
    if value is None:
        return NOTHING
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{decimals}f}"


def milliseconds(value: float | None) -> str:
    """With the unit."""
    return NOTHING if value is None else f"{number(value)} ms"


def per_second(value: float | None) -> str:
    """With the unit."""
    return NOTHING if value is None else f"{number(value)}/s"


def rate(value: float) -> str:
    """A rate that was set, not measured: 150/s, 137.5/s."""
    return f"{round(value, 2):,g}/s"


def limit(value_ms: float) -> str:
    """A latency that was set, not measured: 500 ms, 2,000 ms, 0.5 ms."""
    return f"{value_ms:,g} ms"


def percent(share: float) -> str:
    """A share of 1 as a percentage: 0 %, 0.26 %, 98.4 %, 100 %; never 0 or 100 unless it is exact."""
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    decimals = 1 if 0.1 <= share < 0.999 else 2
    return (
        f"{share * 100:.{decimals}f} %" if 5e-5 <= share <= 1 - 5e-5 else ("< 0.01 %" if share < 0.5 else "> 99.99 %")
    )


@dataclass(frozen=True, slots=True)
class Banner:
    """The verdict in words."""

    state: Literal["good", "doubtful", "bad"]
    word: str
    """VALID or INVALID, and what else there is to know first."""
    sentence: str
    reasons: tuple[str, ...]
    """Why it is invalid, then what failed."""


def banner(verdict: Verdict) -> Banner:
    """Puts the verdict into words."""
    word = "VALID" if verdict.valid else "INVALID"
    if verdict.interrupted:
        word += ", INTERRUPTED"
    if verdict.failures:
        word += ", FAILED"
    if not verdict.valid:
        sentence = "The load generator may have made these figures, not the server: do not use them."
    elif verdict.interrupted:
        sentence = "Stopped before its end: the figures cover what was done."
    elif verdict.failures:
        sentence = "The load generator kept up; the server did not do what was asked."
    else:
        sentence = "The load generator kept up: the figures are the server's. Nothing that was checked failed."
    state: Literal["good", "doubtful", "bad"] = "bad"
    if verdict.valid:
        state = "doubtful" if verdict.interrupted or verdict.failures else "good"
    return Banner(state, word, sentence, (*verdict.invalid_because, *verdict.failures))


def load_in_words(configuration: Configuration) -> str:
    """What load was asked for, such as "open loop, poisson 100/s, 30 s of which 3 s warm-up, seed 0"."""
    if configuration.mode == "closed":
        load = f"closed loop, {configuration.concurrency} callers"
    else:
        unit = "/s" if configuration.rate.replace(".", "", 1).isdecimal() else ""
        load = f"open loop, {configuration.arrivals} {configuration.rate}{unit}"
    warm_up = f" of which {configuration.warm_up_s:g} s warm-up" if configuration.warm_up_s else ""
    return f"{load}, {configuration.duration_s:g} s{warm_up}, seed {configuration.seed}"


def search_in_words(report: FindMaxReport) -> str:
    """What was searched and how, such as "open loop, poisson arrivals, 7 rates tried; localhost:50051"."""
    tried = f"{len(report.points)} rate{'s' * (len(report.points) != 1)} tried"
    if report.configuration is None:
        return tried
    return f"open loop, {report.configuration.arrivals} arrivals, {tried}; {report.configuration.target}"


def server_in_words(server: ServerDescription | None) -> str:
    """What was measured, such as "en-de-tiny, int8 on cpu"."""
    return (
        "a server that does not describe itself"
        if server is None
        else (f"{server.model} ({server.architecture}), {server.precision} on {server.device}")
    )


def pinning_in_words(pinning: Pinning | None) -> str:
    """Which cores were kept for whom; said also when none were."""
    if pinning is None:
        return "not pinned: generator and server ran wherever the system put them"

    def cores(numbers: list[int]) -> str:
        return f"core{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers))}"

    processes = ", ".join(map(str, pinning.server_pids))
    return (
        f"pinned: generator on {cores(pinning.generator_cores)}, server on {cores(pinning.server_cores)} "
        f"(process{'es' * (len(pinning.server_pids) != 1)} {processes})"
    )


def rate_in_words(report: FindMaxReport) -> str:
    """What the search found, such as "150/s ± 5/s"."""
    if report.highest_rate_per_s is None:
        return "no rate that was tried"
    if report.step_per_s is None:
        return f"at least {rate(report.highest_rate_per_s)}"
    return f"{rate(report.highest_rate_per_s)} ± {rate(report.step_per_s)}"


def failed_and_tried(outcomes: dict[str, int]) -> tuple[int, int]:
    """How many requests failed, of how many that were sent and not given up by us."""
    failed = sum(outcomes.get(outcome.label, 0) for outcome in FAILURES)
    return failed, sum(outcomes.values()) - sum(outcomes.get(outcome.label, 0) for outcome in _UNTRIED)


def latency_limits_ms(slo: str | None) -> list[tuple[float, float]]:
    """The latency conditions of an objective as (percentile, limit in milliseconds), strictest percentile last."""
    try:
        return sorted((clause.percentile, clause.limit_ms) for clause in parse_slo(slo).latencies) if slo else []
    except SloUnusable:  # a report of a later version may say more than we can read
        return []


def slo_text(report: RunReport | FindMaxReport) -> str | None:
    """The objective as the user wrote it; None without one."""
    if isinstance(report, FindMaxReport):
        return report.slo
    return report.slo.text if report.slo else None
