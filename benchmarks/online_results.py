"""What the online comparison finds: as data, as JSON, and as a table."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import Any

from online_servers import LABELS, System
from online_tuning import Batching, Try
from pydantic import BaseModel, ConfigDict

from beamline_client.load.report import FindMaxReport, Latency, Point

TARGETS: Mapping[tuple[str, System], float] = {
    ("test", System.REQUEST_LEVEL): 1.3,
    ("mixed", System.REQUEST_LEVEL): 2.0,
    ("test", System.CTRANSLATE2): 1.5,
    ("mixed", System.CTRANSLATE2): 2.0,
}
"""What Beamline's highest rate is to be, as a multiple of the other's."""

FIGURE_OF = {
    System.REQUEST_LEVEL: "request-level batching",
    System.CTRANSLATE2: "CTranslate2 with dynamic batching",
}
WORKLOAD_OF = {"test": "test sentences", "mixed": "mixed"}

SAME_ANSWERS_OF = 256
"""Test sentences that are asked of every server to see whether they compute the same."""

BEGIN, END = "<!-- online: begin -->", "<!-- online: end -->"


_WRAPPED: Any = {"width": 120, "break_long_words": False, "break_on_hyphens": False}


class Part(BaseModel):
    """Frozen, and strict about what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tuning(Part):
    """How a peer's batching was chosen."""

    workload: str
    system: System
    tries: list[Try]
    chosen: Batching


class Search(Part):
    """One search for the highest rate."""

    workload: str
    system: System
    repetition: int
    batching: Batching
    highest_per_s: float | None
    """None if not even the lowest rate that was tried met the SLO."""
    step_per_s: float | None
    """How far above it the lowest rate is that missed."""
    valid: bool
    failures: list[str]
    points: list[Point]
    p50_ms: float | None
    """At the highest rate, as all that follows."""
    p99_ms: float | None
    class_p99_ms: dict[str, float | None]
    """By the length of what is asked."""
    tokens_per_answer: float | None
    bleu: float | None
    inconsistent: int | None
    """Answers that differ from the first one to the same question."""


class Machine(Part):
    """Where it ran."""

    cpu: str
    cores: int
    server_cores: list[int]
    generator_cores: list[int]
    platform: str
    versions: dict[str, str]
    commit: str | None


class Ratio(Part):
    """Beamline's highest rate over another's, over the repetitions."""

    median: float
    low: float
    high: float


class Results(Part):
    """All of it. What has not been measured yet is missing from the lists."""

    started_at: str
    """ISO 8601, UTC."""
    quick: bool
    """Whether it was only tried: then figures mean nothing."""
    slo: str
    beam: int
    max_new_tokens: int
    precision: str
    machine: Machine
    workloads: dict[str, str]
    """What each is, in words."""
    same_answers: dict[System, float]
    """Share of test sentences to which a server gives the same text as Beamline."""
    tunings: list[Tuning]
    searches: list[Search]
    figures: dict[str, Ratio] = {}
    """What there are targets for, by the names that benchmarks/offline/targets.py has for them."""


def search_of(report: FindMaxReport, workload: str, system: System, batching: Batching, repetition: int) -> Search:
    """What is kept of a search."""
    run = report.best
    quality = None if run is None else run.quality
    answered_per_s = 0.0 if run is None else run.throughput.answered_per_s
    return Search(
        workload=workload,
        system=system,
        repetition=repetition,
        batching=batching,
        highest_per_s=report.highest_rate_per_s,
        step_per_s=report.step_per_s,
        valid=report.verdict.valid,
        failures=report.verdict.failures,
        points=report.points,
        p50_ms=_percentile(None if run is None else run.latency, "50"),
        p99_ms=_percentile(None if run is None else run.latency, "99"),
        class_p99_ms={each.name: _percentile(each.latency, "99") for each in (run.classes if run else [])},
        tokens_per_answer=run.throughput.tokens_per_s / answered_per_s if run and answered_per_s else None,
        bleu=None if quality is None else quality.bleu,
        inconsistent=None if quality is None else quality.inconsistent,
    )


def _percentile(latency: Latency | None, percentile: str) -> float | None:
    return None if latency is None else latency.percentiles_ms.get(percentile)


def highest_rates(searches: Sequence[Search], workload: str, system: System) -> dict[int, float]:
    """The highest rates of a system, by repetition, of those that found one."""
    return {
        each.repetition: each.highest_per_s
        for each in searches
        if (each.workload, each.system) == (workload, system) and each.highest_per_s is not None
    }


def ratios(searches: Sequence[Search], workload: str, other: System) -> list[float]:
    """Beamline's highest rate over the other's, for each repetition that has both."""
    ours = highest_rates(searches, workload, System.CONTINUOUS)
    theirs = highest_rates(searches, workload, other)
    return [ours[repetition] / theirs[repetition] for repetition in sorted(ours.keys() & theirs.keys())]


def with_figures(results: Results) -> Results:
    """With the ratios as far as they are known."""
    found = {key: ratios(results.searches, *key) for key in TARGETS}
    figures = {
        f"{FIGURE_OF[other]}, {WORKLOAD_OF[workload]}": Ratio(median=median(each), low=min(each), high=max(each))
        for (workload, other), each in found.items()
        if each
    }
    return results.model_copy(update={"figures": figures})


def complete(results: Results) -> Results:
    """Without the searches of repetitions in which one is missing: what is compared is measured together."""
    servers = Counter((each.workload, each.repetition) for each in results.searches)
    whole = [each for each in results.searches if servers[each.workload, each.repetition] == len(System)]
    return results.model_copy(update={"searches": whole})


def summary(results: Results) -> Iterator[str]:
    """A line for each figure that there is a target for, of the workloads that were measured."""
    for (workload, other), target in TARGETS.items():
        if workload not in results.workloads:
            continue
        found = ratios(results.searches, workload, other)
        yield f"{workload}: {LABELS[System.CONTINUOUS]} ÷ {LABELS[other]}: {spread(found, 2)}, to reach {target:g}"


def spread(values: Sequence[float], digits: int) -> str:
    """The median and the range of values, in words."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown(results: Results, plot: str) -> str:
    """What stands between the markers in docs/benchmarks.md.

    Args:
        results: Of the comparison.
        plot: Where its picture is, relative to the page.
    """
    lines = [fill(_setup(results), **_WRAPPED), "", *_table(results), ""]
    notes = [*(f"{name}: {about}." for name, about in results.workloads.items()), *_notes(results)]
    lines += [fill(f"- {note}", subsequent_indent="  ", **_WRAPPED) for note in notes]
    return "\n".join([*lines, "", f"![p99 against the rate of requests, for all that were tried]({plot})"])


def placed(page: str, block: str) -> str:
    """A page with this between its markers, in place of what was there.

    Raises:
        ValueError: it has no such markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def _setup(results: Results) -> str:
    machine = results.machine
    cores = f"server on core {_numbers(machine.server_cores)}, generator on core {_numbers(machine.generator_cores)}"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    commit = f", commit {_shortened(machine.commit)}" if machine.commit else ""
    tried = "A trial run, whose figures mean nothing. " if results.quick else ""
    repetitions = len({each.repetition for each in results.searches})
    return (
        f"{tried}{machine.cpu}, {cores}; {versions}{commit}; {results.started_at[:10]}. Embedded model, "
        f"{results.precision}, beam {results.beam}, at most {results.max_new_tokens} tokens, Poisson arrivals, "
        f"`{results.slo}`; medians of {repetitions} interleaved repetitions, ranges in brackets."
    )


def _table(results: Results) -> Iterator[str]:
    yield "| workload | served by | batching | requests/s | Beamline's ÷ it | to reach | p50 there, ms | BLEU |"
    yield "|---|---|---|---|---|---|---|---|"
    for workload in results.workloads:
        for system in System:
            found = [each for each in results.searches if (each.workload, each.system) == (workload, system)]
            if found:
                yield _row(results, workload, system, found)


def _row(results: Results, workload: str, system: System, found: Sequence[Search]) -> str:
    rates = list(highest_rates(results.searches, workload, system).values())
    target = TARGETS.get((workload, system))
    ratio = spread(ratios(results.searches, workload, system), 2) if target else ""
    p50s = [each.p50_ms for each in found if each.p50_ms is not None]
    bleus = [each.bleu for each in found if each.bleu is not None]
    cells = [
        workload,
        LABELS[system],
        str(found[-1].batching),
        spread(rates, 0 if rates and median(rates) >= 100 else 1),
        ratio,
        f"≥ {target:g}" if target else "",
        f"{median(p50s):.0f}" if p50s else "-",
        f"{median(bleus):.1f}" if bleus else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _notes(results: Results) -> Iterator[str]:
    for system, share in results.same_answers.items():
        yield f"{LABELS[system]}: the same text as Beamline's for {share:.1%} of {SAME_ANSWERS_OF} test sentences."
    for tuning in results.tunings:
        count = len({each.batching for each in tuning.tries})
        yield (
            f"{LABELS[tuning.system]} on {tuning.workload}: the best of {count} settings is {tuning.chosen} (requests "
            "that run at a time, or that start together × how long the first waits)."
        )
    invalid = sum(not each.valid for each in results.searches)
    if invalid:
        yield f"{invalid} of {len(results.searches)} searches are INVALID: the generator may have made their figures."
    lost = sum(each.highest_per_s is None for each in results.searches)
    if lost:
        yield f"{lost} of {len(results.searches)} searches found no rate that meets the SLO."
    different = {LABELS[each.system] for each in results.searches if each.inconsistent}
    if different:
        yield f"Answers to the same sentence differed with what ran beside it: {', '.join(sorted(different))}."


def _shortened(commit: str) -> str:
    revision, _, changed = commit.partition("-")
    return revision[:12] + (" with changes" if changed else "")


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
