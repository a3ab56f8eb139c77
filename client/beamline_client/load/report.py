"""The report of a run, of a search for the highest rate, and their JSON schema.

Units are part of every name. Histograms are HdrHistograms of microseconds, three significant digits, in the V2
compressed encoding of hdrhistogram.org, base64.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from hdrh.histogram import HdrHistogram
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

SCHEMA_VERSION = 1


class Part(BaseModel):
    """Base of every part: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="null")


class Latency(Part):
    """A distribution of times."""

    count: int
    mean_ms: float
    min_ms: float
    max_ms: float
    percentiles_ms: dict[str, float]
    """Keys "50", "75", "90", "95", "99", "99.9", and from 100,000 values on "99.99"."""
    histogram: str
    """HdrHistogram of microseconds, V2 compressed, base64."""


class Lag(Part):
    """How late the generator itself sent."""

    latency: Latency
    """From the intended to the actual send."""
    allowed_p99_ms: float
    """What its p99 may be: max(1 ms, 2 % of the median latency)."""


class GeneratorProcess(Part):
    """One process of the load generator."""

    name: str
    requests: int
    cpu_share: float
    """CPU time by wall time from the start to the last send; 1 is a whole core."""
    memory_start_mib: float
    """Resident memory when the run began."""
    memory_quarter_mib: float
    """Resident memory after the first quarter of the run."""
    memory_end_mib: float
    """Resident memory when the run ended."""


class Pinning(Part):
    """Which cores the generator and the server were kept on."""

    generator_cores: list[int]
    server_cores: list[int]
    server_pids: list[int]


class Generator(Part):
    """The generator, measured by itself."""

    processes: list[GeneratorProcess]
    lag: Lag | None
    """None for a closed loop, which sends when an answer has come."""
    pinning: Pinning | None
    max_in_flight: int


class Verdict(Part):
    """Whether the figures may be believed, and whether the server did what was asked."""

    valid: bool
    """False if the generator, not the server, may have made the figures."""
    invalid_because: list[str]
    interrupted: bool
    """Whether the run was stopped before its end; the figures cover what was done."""
    failures: list[str]
    """What the server failed at: wrong answers, a missed SLO. Empty if nothing."""
    remarks: list[str]
    """What the reader should know besides: books that do not balance, parts that could not be measured."""


class Clause(Part):
    """One condition of an SLO and what was measured."""

    text: str
    """For example "p99<=500ms"."""
    measured: str
    met: bool


class Slo(Part):
    """A service-level objective and whether it was met."""

    text: str
    met: bool
    clauses: list[Clause]


class Throughput(Part):
    """What came through, from the end of the warm-up to the end of the schedule, per second."""

    seconds: float
    """How long that was."""
    offered_per_s: float
    """Requests meant to be sent."""
    answered_per_s: float
    """Requests whose answer came."""
    goodput_per_s: float | None
    """Answers that came within the SLO's latency limit; None without one."""
    tokens_per_s: float
    """Tokens of best hypotheses."""
    characters_per_s: float


class RequestClass(Part):
    """The requests of one kind in a mixed workload."""

    name: str
    """Such as "beam 4, 1-8 words"."""
    count: int
    latency: Latency | None
    """Of its answered requests, from the intended send; None if there are none."""


class Window(Part):
    """A slice of the run. Latency belongs to the slice in which a request was meant to be sent."""

    start_s: float
    seconds: float
    offered: int
    """Requests meant to be sent in it."""
    answered: int
    """Answers that came in it."""
    failed: int
    """Requests meant to be sent in it that failed."""
    tokens: int
    """Tokens of the answers that came in it."""
    p50_ms: float | None
    """Median latency of its answered requests, from the intended send; None if there are none."""
    p99_ms: float | None
    queue_ms: float | None
    """Mean time of its answered requests in a phase of the server; None where it tells none."""
    encode_ms: float | None
    decode_ms: float | None
    histogram: str | None
    """Latency of its answered requests, from the intended send; None if there are none."""


class ServerSample(Part):
    """What /metrics told between two scrapes."""

    at_s: float
    """When, from the start of the run."""
    rows_per_step: float | None
    """Mean over the decoder steps since the scrape before; None if there were none."""
    step_ms: float | None
    """Mean time of a decoder step since the scrape before; None if there were none."""
    queued_requests: float
    running_rows: float
    requests_per_s: float
    """Requests that ended, whatever their outcome."""


class Golden(Part):
    """Comparison with recorded answers."""

    file: str
    compared: int
    """Answers that were compared."""
    different: int
    missing: int
    """Answers to questions that the file does not have."""
    examples: list[str]
    """Some of the differences, in words."""


class Quality(Part):
    """Whether the answers were right."""

    distinct: int
    """Different pairs of question and answer."""
    inconsistent: int
    """Answers that differ from the first one to the same question."""
    examples: list[str]
    """Some of those, in words."""
    bleu: float | None
    """sacreBLEU over the distinct pairs; None without references."""
    chrf: float | None
    signature: str | None
    """sacreBLEU's description of the two scores."""
    golden: Golden | None


class Books(Part):
    """Our counts against the server's."""

    balanced: bool
    client: dict[str, int]
    server: dict[str, int]
    mismatches: list[str]


class ServerDescription(Part):
    """What the server said about itself."""

    model: str
    architecture: str
    precision: str
    device: str
    fingerprint: str
    default_beam_size: int | None
    max_beam_size: int
    versions: dict[str, str]


class Environment(Part):
    """Where the generator ran."""

    beamline: str
    python: str
    platform: str
    cpu: str
    cores: int
    gpu: str | None
    commit: str | None
    """Of the source tree, with "-dirty" when it had changes; None outside of one."""
    libraries: dict[str, str]


class Configuration(Part):
    """What was asked for, defaults filled in; enough to draw the same load again."""

    target: str
    mode: Literal["open", "closed"]
    arrivals: str
    """Such as "poisson" or "constant"; "closed" for a closed loop; "trace" for a file."""
    rate: str
    """As the user wrote it, such as "100" or "ramp:10-200"."""
    concurrency: int | None
    """Callers of a closed loop."""
    duration_s: float
    warm_up_s: float
    seed: int
    requests: int
    """Requests of the schedule; of a closed loop, those that were sent."""
    schedule_sha256: str | None
    """Of the intended times as little-endian doubles, in seconds; None for a closed loop."""
    workers: int
    channels: int
    """Connections of each worker."""
    retries: bool
    """Whether gRPC sends refused calls again, as the client does by default."""
    workload: dict[str, str]
    """The options of the workload as the user wrote them."""


class RunReport(Part):
    """One run."""

    kind: Literal["run"] = "run"
    schema_version: Literal[1] = 1
    started_at: str
    """ISO 8601, UTC."""
    configuration: Configuration
    environment: Environment
    server: ServerDescription | None
    verdict: Verdict
    outcomes: dict[str, int]
    """Of all requests, warm-up included, by `Outcome` in lower case."""
    codes: dict[str, int]
    """Of all requests that were sent, by gRPC status."""
    messages: dict[str, int]
    """Some of the reasons of failures, in words, and how often."""
    retries_seen: int | None
    """Calls that the server saw for a second time; None without its metrics."""
    throughput: Throughput
    latency: Latency | None
    """Of answered requests, from the intended send; None if there are none. The warm-up is left out here and below."""
    latency_from_send: Latency | None
    """The same from the actual send."""
    latency_with_failures: Latency | None
    """From the intended send to whatever end, of all requests but those that we gave up."""
    first_piece: Latency | None
    """From the intended send to the first message of answered streams."""
    phases: dict[str, Latency]
    """Of answered requests: "queue", "encode", "decode" as the server tells them, and "elsewhere", which is the rest of
    the time from the actual send: network, gRPC, tokenizer, waiting for a core."""
    classes: list[RequestClass]
    slo: Slo | None
    quality: Quality | None
    books: Books | None
    generator: Generator
    windows: list[Window]
    server_samples: list[ServerSample]


class Point(Part):
    """One rate that was tried."""

    rate_per_s: float
    met: bool
    stable: bool
    """Whether its last windows agreed; if not, the point was ended by its time limit or by an SLO far out of reach."""
    valid: bool
    seconds: float
    answered_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    failed_share: float
    why: str
    """In words: the clauses that were missed, and what was not stable; empty if there is nothing to say."""


class FindMaxReport(Part):
    """A search for the highest rate that meets an SLO."""

    kind: Literal["find-max"] = "find-max"
    schema_version: Literal[1] = 1
    started_at: str
    configuration: Configuration | None
    """Of the run at the highest rate; None if the search was interrupted before its first."""
    environment: Environment
    server: ServerDescription | None
    verdict: Verdict
    slo: str
    highest_rate_per_s: float | None
    """The highest rate that met the SLO; None if not even the lowest did."""
    step_per_s: float | None
    """How far above it the lowest rate is that missed the SLO; None if none missed it."""
    points: list[Point]
    """In the order in which they were tried."""
    best: RunReport | None
    """The run at the highest rate that met the SLO."""


Report: TypeAlias = Annotated[RunReport | FindMaxReport, Field(discriminator="kind")]

_ADAPTER: TypeAdapter[RunReport | FindMaxReport] = TypeAdapter(Report)


class ReportUnreadable(Exception):
    """A file is not a report; the text is one line that says why."""


def json_schema() -> dict[str, Any]:
    """The JSON schema of reports."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_ADAPTER.json_schema(mode="serialization")}


def to_json(report: RunReport | FindMaxReport) -> str:
    """A report as JSON text, for people too: indented."""
    return report.model_dump_json(indent=1) + "\n"


def read_report(path: Path) -> RunReport | FindMaxReport:
    """Reads a report.

    Raises:
        ReportUnreadable: There is no such file, or it is no report of this version.
    """
    try:
        report = _ADAPTER.validate_python(json.loads(path.read_text(encoding="utf-8")))
        return _checked(report)
    except OSError as error:
        raise ReportUnreadable(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        where = "/".join(map(str, problem["loc"])) + ": " + problem["msg"] if problem else str(error) or "no JSON"
        raise ReportUnreadable(
            f"{path} is not a report of `beamline load`, schema version {SCHEMA_VERSION} ({where})"
        ) from error


def _checked(report: RunReport | FindMaxReport) -> RunReport | FindMaxReport:
    """The report, after a check of what validation cannot see of the windows, from which comparisons draw.

    Raises:
        ValueError: A window has no length, a negative count, or a histogram that is none.
    """
    run = report if isinstance(report, RunReport) else report.best
    for number, window in enumerate(run.windows if run else ()):
        if not 0 < window.seconds < math.inf or min(window.offered, window.answered, window.failed, window.tokens) < 0:
            raise ValueError(f"window {number} has an impossible length or count")
        if window.histogram is not None:
            try:
                HdrHistogram.decode(window.histogram)
            except Exception as error:  # the decoder raises whatever comes of it
                raise ValueError(f"the histogram of window {number} is damaged") from error
    return report
