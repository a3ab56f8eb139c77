"""What a report says, as tables and facts; pure, so that a terminal and a page say the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from beamline_client.load.report import Environment, FindMaxReport, Latency, Quality, RunReport, ServerDescription
from beamline_client.load.wording import (
    NOTHING,
    failed_and_tried,
    latency_limits_ms,
    limit,
    milliseconds,
    number,
    per_second,
    percent,
    pinning_in_words,
    rate,
    slo_text,
)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of words and numbers: the first column is words, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    last_is_text: bool = False
    """Whether the last column is words too."""


Facts: TypeAlias = list[tuple[str, str]]
"""Pairs of a name and what is to be said."""


def latency_table(report: RunReport) -> Table | None:
    """Percentiles by where a request's time is counted from; None without answers."""
    columns = {
        "from intended send": report.latency,
        "from actual send": report.latency_from_send,
        "with failures": report.latency_with_failures,
    }
    told = {name: latency for name, latency in columns.items() if latency}
    if not told:
        return None
    percentiles = sorted({key for latency in told.values() for key in latency.percentiles_ms}, key=float)
    rows = [(f"p{key}", *(number(latency.percentiles_ms.get(key)) for latency in told.values())) for key in percentiles]
    rows += [
        ("max", *(number(latency.max_ms) for latency in told.values())),
        ("mean", *(number(latency.mean_ms) for latency in told.values())),
        ("requests", *(f"{latency.count:,}" for latency in told.values())),
    ]
    return Table("Latency, ms", ("", *told), tuple(rows))


def phases_table(report: RunReport) -> Table | None:
    """Where the time of answered requests went; None where the server does not tell."""
    if not report.phases:
        return None
    whole_ms = sum(latency.mean_ms for latency in report.phases.values())
    rows = tuple(
        (phase, *_middle_and_tail(latency), number(latency.mean_ms), percent(latency.mean_ms / whole_ms))
        for phase, latency in report.phases.items()
    )
    return Table("Where the time goes, ms", ("", "p50", "p99", "mean", "of the mean"), rows)


def classes_table(report: RunReport) -> Table | None:
    """Latency by kind of request; None if there is but one kind."""
    if len(report.classes) < 2:
        return None
    rows = tuple((kind.name, f"{kind.count:,}", *_middle_and_tail(kind.latency)) for kind in report.classes)
    return Table("Kinds of requests, ms from intended send", ("", "requests", "p50", "p99"), rows)


def slo_table(report: RunReport) -> Table | None:
    """The objective, condition by condition; None without one."""
    if report.slo is None:
        return None
    rows = tuple((clause.text, clause.measured, "met" if clause.met else "MISSED") for clause in report.slo.clauses)
    return Table("SLO", ("", "measured", ""), rows, last_is_text=True)


def points_table(report: FindMaxReport) -> Table | None:
    """The rates that were tried, in order; None if there are none."""
    if not report.points:
        return None
    rows = tuple(
        (
            rate(point.rate_per_s),
            per_second(point.answered_per_s),
            number(point.p50_ms),
            number(point.p99_ms),
            percent(point.failed_share),
            f"{point.seconds:.0f} s",
            _point_in_words(point.met, point.valid, point.why),
        )
        for point in report.points
    )
    header = ("offered", "answered", "p50, ms", "p99, ms", "failed", "ran", "")
    return Table("Rates tried", header, rows, last_is_text=True)


def throughput_facts(report: RunReport) -> Facts:
    """What came through."""
    throughput, limits = report.throughput, latency_limits_ms(slo_text(report))
    came = f"{per_second(throughput.answered_per_s)} answered of {per_second(throughput.offered_per_s)} offered"
    facts = [("Throughput", f"{came}, over {throughput.seconds:g} s")]
    if throughput.goodput_per_s is not None:
        within = f" within {limit(limits[-1][1])}" if limits else ""
        facts.append(("Goodput", f"{per_second(throughput.goodput_per_s)} answered{within}"))
    text = f"{number(throughput.tokens_per_s)} tokens/s, {number(throughput.characters_per_s)} characters/s"
    facts.append(("Output", text))
    if first := report.first_piece:
        p50, p99 = _middle_and_tail(first)
        facts.append(("First piece", f"p50 {p50} ms, p99 {p99} ms from intended send, of {first.count:,} streams"))
    return facts


def outcome_facts(report: RunReport) -> Facts:
    """How requests ended."""
    everyone = sum(report.outcomes.values())
    counts = ", ".join(
        f"{count:,} {label.replace('_', ' ')} ({percent(count / everyone)})"
        for label, count in report.outcomes.items()
        if count
    )
    failed, tried = failed_and_tried(report.outcomes)
    facts = [("Outcomes", counts or "no requests"), ("Errors", f"{percent(failed / tried)}" if tried else NOTHING)]
    codes = ", ".join(f"{count:,} {code}" for code, count in report.codes.items() if count)
    facts += [("gRPC status", codes)] if codes else []
    facts += [("Reason", f"{count:,} times: {reason}") for reason, count in report.messages.items() if count]
    if report.retries_seen is not None:
        facts.append(("Retries", f"{report.retries_seen:,} calls that the server saw for a second time"))
    return facts


def answer_facts(report: RunReport) -> Facts:
    """Whether answers were right, and whether the books balance."""
    facts = _quality_facts(report.quality) if report.quality else [("Answers", "not checked")]
    if report.books is None:
        return [*facts, ("Books", "not compared: the server's counters could not be read")]
    if report.books.balanced:
        return [*facts, ("Books", "balanced: our counts are the server's")]
    return [*facts, *(("Books", f"do not balance: {mismatch}") for mismatch in report.books.mismatches or ["see JSON"])]


def generator_facts(report: RunReport) -> Facts:
    """What the generator measured of itself."""
    generator = report.generator
    facts: Facts = []
    if generator.lag is None:
        facts.append(("Generator lag", "none to measure: a closed loop sends when an answer has come"))
    else:
        measured_ms = generator.lag.latency.percentiles_ms.get("99")
        allowed = f"allowed are {milliseconds(generator.lag.allowed_p99_ms)}"
        facts.append(("Generator lag", f"p99 {milliseconds(measured_ms)}; {allowed}"))
    facts.append(("Cores", pinning_in_words(generator.pinning)))
    return facts


def processes_table(report: RunReport) -> Table | None:
    """What each process of the generator used; None if nothing is known of any."""
    rows = tuple(
        (
            process.name,
            f"{process.requests:,}",
            percent(process.cpu_share),
            number(process.memory_start_mib),
            number(process.memory_quarter_mib),
            number(process.memory_end_mib),
        )
        for process in report.generator.processes
    )
    header = ("", "requests", "of a core", "MiB: start", "quarter", "end")
    return Table("Generator processes", header, rows) if rows else None


def configuration_facts(report: RunReport | FindMaxReport) -> Facts:
    """What was asked for, enough to draw the same load again."""
    asked = report.configuration
    if asked is None:
        return [("started", report.started_at)]
    return [
        ("started", report.started_at),
        ("target", asked.target),
        ("mode", f"{asked.mode} loop"),
        ("arrivals", asked.arrivals),
        ("rate", asked.rate),
        ("callers", NOTHING if asked.concurrency is None else str(asked.concurrency)),
        ("duration", f"{asked.duration_s:g} s, of which {asked.warm_up_s:g} s warm-up"),
        ("seed", str(asked.seed)),
        ("requests", f"{asked.requests:,}"),
        ("schedule SHA-256", asked.schedule_sha256 or NOTHING),
        ("generator", f"{asked.workers} workers, {asked.channels} channels each"),
        ("gRPC retries", "on" if asked.retries else "off"),
        *((f"workload: {name}", value) for name, value in asked.workload.items()),
    ]


def server_facts(server: ServerDescription | None) -> Facts:
    """What the server said about itself."""
    if server is None:
        return [("server", "does not describe itself")]
    default = NOTHING if server.default_beam_size is None else str(server.default_beam_size)
    return [
        ("model", server.model),
        ("architecture", server.architecture),
        ("precision", server.precision),
        ("device", server.device),
        ("fingerprint", server.fingerprint),
        ("beam size", f"{default} by default, {server.max_beam_size} at most"),
        *((f"server's {name}", version) for name, version in server.versions.items()),
    ]


def environment_facts(environment: Environment) -> Facts:
    """Where the generator ran."""
    return [
        ("beamline", environment.beamline),
        ("commit", environment.commit or NOTHING),
        ("Python", environment.python),
        ("platform", environment.platform),
        ("CPU", f"{environment.cpu}, {environment.cores} cores"),
        ("GPU", environment.gpu or NOTHING),
        *environment.libraries.items(),
    ]


def present(*tables: Table | None) -> Iterable[Table]:
    """Those that there are."""
    return (table for table in tables if table is not None)


def _quality_facts(quality: Quality) -> Facts:
    facts: Facts = []
    if quality.bleu is not None or quality.chrf is not None:
        scores = f"BLEU {number(quality.bleu)}, chrF {number(quality.chrf)} over {quality.distinct:,} distinct answers"
        facts.append(("Quality", scores))
    differ = f"{quality.inconsistent:,} answers differ from the first one to the same question"
    facts.append(("Consistency", differ if quality.inconsistent else "same question, same answer, every time"))
    facts += [("Example", example) for example in quality.examples]
    if golden := quality.golden:
        facts.append(
            (
                "Golden",
                f"{golden.compared:,} answers compared with {golden.file}: {golden.different:,} differ, "
                f"{golden.missing:,} are not in the file",
            )
        )
        facts += [("Example", example) for example in golden.examples]
    return facts


def _middle_and_tail(latency: Latency | None) -> tuple[str, str]:
    percentiles_ms = latency.percentiles_ms if latency else {}
    return number(percentiles_ms.get("50")), number(percentiles_ms.get("99"))


def _point_in_words(met: bool, valid: bool, why: str) -> str:
    word = "met" if met else "missed"
    return (word if why in ("", word) else f"{word}: {why}") + ("" if valid else " (INVALID)")
