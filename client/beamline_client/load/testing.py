"""Example reports for tests: drawn from a seed, so that all their figures agree with each other.

report = example_run(seed=1, slower=1.2)
bare = example_run(latency=None, windows=[])
"""

from functools import lru_cache
from typing import Any

import numpy as np

from beamline_client.load.histograms import encoded, latency, new_histogram, percentile_ms, record
from beamline_client.load.made_up_load import DURATION_S, KINDS, SLOTS, WARM_UP_S, Drawn, Flags, Floats, draw
from beamline_client.load.report import (
    Books,
    Configuration,
    Environment,
    FindMaxReport,
    Generator,
    GeneratorProcess,
    Golden,
    Lag,
    Latency,
    Pinning,
    Point,
    Quality,
    RequestClass,
    RunReport,
    ServerDescription,
    ServerSample,
    Slo,
    Throughput,
    Verdict,
    Window,
)
from beamline_client.load.slo import parse_slo
from beamline_client.load.target import Outcome
from beamline_client.load.validity import allowed_lag_ms

SLO = "p99<=500ms,errors<=1%"
_LOWEST_RATE_PER_S = 5.0
_PHASES = ("queue", "encode", "decode", "elsewhere")
_CODES = {"ok": "OK", "rejected": "RESOURCE_EXHAUSTED", "cancelled": "CANCELLED"}


def example_run(
    *, seed: int = 0, slower: float = 1.0, rate_per_s: float = 100.0, objective: str | None = SLO, **changes: Any
) -> RunReport:
    """A run of 30 s in windows of 1 s, the first 3 s being the warm-up.

    Args:
        seed: Same arguments, same report.
        slower: Factor on all times that the server takes; the arrivals stay.
        rate_per_s: Of Poisson arrivals; the server can do about 160 a second.
        objective: What is checked; None for a run without an SLO.
        changes: Fields of the report, in place of what was drawn.
    """
    drawn = _example_run(seed, slower, rate_per_s, objective)
    return RunReport.model_validate({name: getattr(drawn, name) for name in RunReport.model_fields} | changes)


def example_find_max(*, seed: int = 0, slower: float = 1.0, **changes: Any) -> FindMaxReport:
    """A search for the highest rate that meets SLO: doubled until it is missed, then halved; `best` is the run there.

    Args:
        seed: Same arguments, same report.
        slower: Factor on all times that the server takes.
        changes: Fields of the report, in place of what was found.
    """
    points: list[Point] = []

    def met(rate_per_s: float) -> bool:
        points.append(_point(draw(seed, rate_per_s).slowed(slower), rate_per_s))
        return points[-1].met

    good, bad = 0.0, 40.0
    while met(bad):
        good, bad = bad, bad * 2
    while bad - good > 0.05 * bad and bad > _LOWEST_RATE_PER_S:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if met(middle) else (good, middle)
    run = example_run(seed=seed, slower=slower, rate_per_s=good or bad)
    fields: dict[str, Any] = {
        "started_at": run.started_at,
        "configuration": run.configuration,
        "environment": run.environment,
        "server": run.server,
        "verdict": Verdict(valid=True, invalid_because=[], interrupted=False, failures=[], remarks=[]),
        "slo": SLO,
        "highest_rate_per_s": good or None,
        "step_per_s": bad - good,
        "points": points,
        "best": run if good else None,
    }
    return FindMaxReport.model_validate(fields | changes)


@lru_cache(maxsize=32)
def _example_run(seed: int, slower: float, rate_per_s: float, slo: str | None) -> RunReport:
    drawn = draw(seed, rate_per_s).slowed(slower)
    answered, failed = drawn.measured & drawn.answered, drawn.measured & drawn.failed
    checked = _checked(slo, drawn, answered, failed)
    counts = {outcome.label: int((drawn.outcome == outcome).sum()) for outcome in Outcome}
    outcomes = {label: count for label, count in counts.items() if count}
    missed = [clause for clause in checked.clauses if not clause.met] if checked else []
    phases = {phase: _latency(getattr(drawn, f"{phase}_s")[answered]) for phase in _PHASES}
    streams = answered & ~np.isnan(drawn.first_piece_s)
    return RunReport(
        started_at="2025-01-02T03:04:05Z",
        configuration=_configuration(seed, rate_per_s, drawn.intended_s.size),
        environment=_environment(),
        server=_server(),
        verdict=Verdict(
            valid=True,
            invalid_because=[],
            interrupted=False,
            failures=[f"the SLO was missed: {clause.text} was {clause.measured}" for clause in missed],
            remarks=[],
        ),
        outcomes=outcomes,
        codes={_CODES[label]: count for label, count in outcomes.items()},
        messages={"256 requests are waiting; try again later": outcomes.get("rejected", 0)},
        retries_seen=0,
        throughput=_throughput(drawn, slo),
        latency=_latency(drawn.latency_s[answered]),
        latency_from_send=_latency(drawn.from_send_s[answered]),
        latency_with_failures=_latency(drawn.latency_s[answered | failed]),
        first_piece=_latency((drawn.lag_s + drawn.first_piece_s)[streams]),
        phases={phase: times for phase, times in phases.items() if times},
        classes=[_request_class(drawn, kind, answered) for kind in range(len(KINDS))],
        slo=checked,
        quality=_quality(int(answered.sum())),
        books=Books(balanced=True, client=outcomes, server=outcomes, mismatches=[]),
        generator=_generator(drawn),
        windows=[_window(drawn, start_s) for start_s in np.arange(0.0, DURATION_S).tolist()],
        server_samples=[_sample(drawn, at_s) for at_s in np.arange(1.0, DURATION_S).tolist()],
    )


def _point(drawn: Drawn, rate_per_s: float) -> Point:
    answered, failed = drawn.measured & drawn.answered, drawn.measured & drawn.failed
    histogram = new_histogram()
    record(histogram, drawn.latency_s[answered])
    checked = _checked(SLO, drawn, answered, failed)
    missed = [f"{clause.text} was {clause.measured}" for clause in checked.clauses if not clause.met] if checked else []
    return Point(
        rate_per_s=rate_per_s,
        met=not missed,
        stable=not missed,
        valid=True,
        seconds=DURATION_S,
        answered_per_s=_throughput(drawn, SLO).answered_per_s,
        p50_ms=percentile_ms(histogram, 50),
        p99_ms=percentile_ms(histogram, 99),
        failed_share=float(failed.sum() / (answered | failed).sum()),
        why="; ".join(missed) or "met",
    )


def _latency(seconds: Floats) -> Latency | None:
    histogram = new_histogram()
    record(histogram, seconds)
    return latency(histogram)


def _checked(slo: str | None, drawn: Drawn, answered: Flags, failed: Flags) -> Slo | None:
    if slo is None:
        return None
    histogram = new_histogram()
    record(histogram, drawn.latency_s[answered])
    return parse_slo(slo).check(histogram, attempted=int((answered | failed).sum()), failed=int(failed.sum()))


def _throughput(drawn: Drawn, slo: str | None) -> Throughput:
    seconds = DURATION_S - WARM_UP_S
    came = drawn.answered & (drawn.done_s >= WARM_UP_S) & (drawn.done_s < DURATION_S)
    limit_s = parse_slo(slo).limit_s if slo else None
    tokens_per_s = float(drawn.tokens[came].sum()) / seconds
    return Throughput(
        seconds=seconds,
        offered_per_s=float(drawn.measured.sum()) / seconds,
        answered_per_s=float(came.sum()) / seconds,
        goodput_per_s=None if limit_s is None else float((came & (drawn.latency_s <= limit_s)).sum()) / seconds,
        tokens_per_s=tokens_per_s,
        characters_per_s=4.3 * tokens_per_s,
    )


def _request_class(drawn: Drawn, kind: int, answered: Flags) -> RequestClass:
    ours = drawn.kind == kind
    return RequestClass(
        name=KINDS[kind], count=int((drawn.measured & ours).sum()), latency=_latency(drawn.latency_s[answered & ours])
    )


def _window(drawn: Drawn, start_s: float) -> Window:
    began = (drawn.intended_s >= start_s) & (drawn.intended_s < start_s + 1)
    ended = drawn.answered & (drawn.done_s >= start_s) & (drawn.done_s < start_s + 1)
    ours = began & drawn.answered
    histogram = new_histogram()
    record(histogram, drawn.latency_s[ours])
    means_ms = {phase: float(getattr(drawn, f"{phase}_s")[ours].mean()) * 1000 for phase in _PHASES if ours.any()}
    return Window(
        start_s=start_s,
        seconds=1.0,
        offered=int(began.sum()),
        answered=int(ended.sum()),
        failed=int((began & drawn.failed).sum()),
        tokens=int(drawn.tokens[ended].sum()),
        p50_ms=percentile_ms(histogram, 50) if means_ms else None,
        p99_ms=percentile_ms(histogram, 99) if means_ms else None,
        queue_ms=means_ms.get("queue"),
        encode_ms=means_ms.get("encode"),
        decode_ms=means_ms.get("decode"),
        histogram=encoded(histogram) if means_ms else None,
    )


def _sample(drawn: Drawn, at_s: float) -> ServerSample:
    here = drawn.answered & (drawn.intended_s <= at_s) & (drawn.done_s > at_s)
    waiting = here & (drawn.intended_s + drawn.queue_s > at_s)
    rows = float(np.where(drawn.kind == 0, 1, 4)[here & ~waiting].sum())
    ended = (drawn.done_s > at_s - 1) & (drawn.done_s <= at_s)
    return ServerSample(
        at_s=at_s,
        rows_per_step=rows or None,
        step_ms=4 + rows / SLOTS if rows else None,
        queued_requests=float(waiting.sum()),
        running_rows=rows,
        requests_per_s=float(ended.sum()),
    )


def _generator(drawn: Drawn) -> Generator:
    lag, times = _latency(drawn.lag_s), _latency(drawn.latency_s[drawn.answered])
    median_ms = times.percentiles_ms["50"] if times else None
    process = {"cpu_share": 0.12, "memory_start_mib": 81.0, "memory_quarter_mib": 84.5, "memory_end_mib": 84.5}
    requests = drawn.intended_s.size
    return Generator(
        processes=[
            GeneratorProcess(name="worker 0", requests=requests // 2, **process),
            GeneratorProcess(name="worker 1", requests=requests - requests // 2, **process),
            GeneratorProcess(name="coordinator", requests=0, **process),
        ],
        lag=None if lag is None else Lag(latency=lag, allowed_p99_ms=allowed_lag_ms(median_ms)),
        pinning=Pinning(generator_cores=[1], server_cores=[0], server_pids=[4711]),
        max_in_flight=4096,
    )


def _quality(answered: int) -> Quality:
    return Quality(
        distinct=min(answered, 800),
        inconsistent=0,
        examples=[],
        bleu=38.21,
        chrf=61.07,
        signature="nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
        golden=Golden(file="golden.tsv", compared=answered, different=0, missing=0, examples=[]),
    )


def _configuration(seed: int, rate_per_s: float, requests: int) -> Configuration:
    return Configuration(
        target="localhost:50051",
        mode="open",
        arrivals="poisson",
        rate=f"{rate_per_s:g}",
        concurrency=None,
        duration_s=DURATION_S,
        warm_up_s=WARM_UP_S,
        seed=seed,
        requests=requests,
        schedule_sha256="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        workers=2,
        channels=4,
        retries=False,
        workload={"sentences": "the model's test file", "beams": "1:50%,4:50%", "lengths": "1-8,9-20", "stream": "30%"},
    )


def _environment() -> Environment:
    return Environment(
        beamline="0.1.0",
        python="3.11.9",
        platform="Linux-6.1-x86_64",
        cpu="Example CPU @ 2.50GHz",
        cores=2,
        gpu=None,
        commit="0123456789abcdef0123456789abcdef01234567",
        libraries={"grpcio": "1.80.0", "numpy": "2.1.0", "hdrhistogram": "0.10.3"},
    )


def _server() -> ServerDescription:
    return ServerDescription(
        model="en-de-tiny",
        architecture="MarianMTModel",
        precision="int8",
        device="cpu",
        fingerprint="sha256:5d41402abc4b2a76b9719d911017c592",
        default_beam_size=4,
        max_beam_size=16,
        versions={"beamline": "0.1.0", "onnxruntime": "1.31.0"},
    )
