"""What Prometheus can scrape: the service's own series, gRPC's usual ones and the process.

Labels come from closed sets and children are made once: counting a request costs some ten microseconds, a step less.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from beamline_server.engine.request import Completed
from beamline_server.engine.workers import EngineLoad

LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.25, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30),
)
STEP_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
BEAM_BUCKETS = (1, 2, 4, 8, 16)
RELEASE_BUCKETS = (0, 1, 2, 4, 8)

Clock = Callable[[], float]


class Outcome(StrEnum):
    """How a request for generation ended."""

    OK = "ok"
    INVALID = "invalid"
    NOT_FOUND = "not_found"
    QUEUE_FULL = "queue_full"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class MethodName:
    """What gRPC's metrics call a method."""

    service: str
    method: str
    kind: str
    """unary, server_stream, client_stream or bidi_stream."""


UNKNOWN_METHOD = MethodName("unknown", "unknown", "unary")
"""Stands for every method that is not served: callers make up as many names as they like."""


class MethodMetrics:
    """The series of one gRPC method."""

    def __init__(self, started: Counter, handled: Callable[[str], Counter], seconds: Histogram, usual: str) -> None:
        self._started = started
        self._make_handled = handled
        self._handled: dict[str, Counter] = {usual: handled(usual)}  # there from the start, as 0
        self._seconds = seconds

    def started(self) -> None:
        """A call has arrived."""
        self._started.inc()

    def handled(self, code: str, seconds: float) -> None:
        """A call has ended with this status, one of gRPC's seventeen, after so many seconds."""
        counter = self._handled.get(code)
        if counter is None:
            counter = self._handled[code] = self._make_handled(code)
        counter.inc()
        self._seconds.observe(seconds)


class Metrics:
    """All series of a server, in one registry. Thread-safe; a `StepObserver` for the engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._make_server_gauges()
        self._make_request_series()
        self._make_step_series()
        self._make_grpc_series()

    def _make_server_gauges(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=self.registry)

        self.ready = gauge("beamline_ready", "Whether the server is ready for requests (1) or not (0).")
        self.draining = gauge("beamline_draining", "Whether the server has been asked to stop (1) or not (0).")
        self.model_load_seconds = gauge("beamline_model_load_seconds", "Time from start to ready for requests.")
        self.memory_bound = gauge("beamline_memory_bound_bytes", "The most memory that the server comes to.")

    def _make_request_series(self) -> None:
        requests = self._counter("beamline_requests", "Requests for generation that have ended.", "outcome")
        self._requests = {outcome: requests.labels(outcome.value) for outcome in Outcome}
        self._duration = self._histogram(
            "beamline_request_duration_seconds", "Time from arrival to the answer.", LATENCY_BUCKETS_S
        )
        phases = self._histogram(
            "beamline_phase_duration_seconds", "Time of an input in a phase.", LATENCY_BUCKETS_S, "phase"
        )
        self._queue, self._encode, self._decode = (phases.labels(phase) for phase in ("queue", "encode", "decode"))
        self._first_result = self._histogram(
            "beamline_time_to_first_result_seconds",
            "Time from arrival to the first message of a stream.",
            LATENCY_BUCKETS_S,
        )
        self._input_source_tokens = self._histogram(
            "beamline_request_source_tokens", "Source tokens of an input.", TOKEN_BUCKETS
        )
        self._input_target_tokens = self._histogram(
            "beamline_request_target_tokens", "Tokens of the best hypothesis of an input.", TOKEN_BUCKETS
        )
        self._target_tokens = self._counter("beamline_target_tokens", "Tokens of best hypotheses.")
        self._beam_width = self._histogram("beamline_beam_width", "Beam size of an input.", BEAM_BUCKETS)
        self._deadline_missing = self._counter(
            "beamline_client_deadline_missing", "Requests for generation that came without a deadline."
        )
        self._retries = self._counter("beamline_retries_seen", "Calls that gRPC clients sent again.")

    def _make_step_series(self) -> None:
        seconds = self._histogram(
            "beamline_step_duration_seconds", "Time of an engine step, host work included.", STEP_BUCKETS_S, "kind"
        )
        rows = self._histogram("beamline_step_rows", "Rows of an engine step.", ROW_BUCKETS, "kind")
        steps = self._counter("beamline_steps", "Engine steps.", "kind")
        self._encode_steps, self._decode_steps = (
            (seconds.labels(kind), rows.labels(kind), steps.labels(kind)) for kind in ("encode", "decode")
        )
        self._source_tokens = self._counter("beamline_source_tokens", "Source tokens that have been encoded.")
        self._padding_tokens = self._counter("beamline_padding_tokens", "Padding that was encoded along with them.")
        self._release_steps = self._histogram(
            "beamline_slot_release_steps",
            "Steps that ended after a cancellation or deadline and before the rows' release.",
            RELEASE_BUCKETS,
        )

    def _make_grpc_series(self) -> None:
        labels = ("grpc_type", "grpc_service", "grpc_method")
        self._grpc_started = self._counter("grpc_server_started", "Calls that have arrived.", *labels)
        self._grpc_handled = self._counter("grpc_server_handled", "Calls that have ended.", *labels, "grpc_code")
        self._grpc_seconds = self._histogram(
            "grpc_server_handling_seconds", "Time from a call's arrival to its end.", LATENCY_BUCKETS_S, *labels
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    # The engine's observer.

    def encoded(self, seconds: float, sentences: int, source_tokens: int, padded_tokens: int) -> None:
        """See `StepObserver`."""
        duration, rows, steps = self._encode_steps
        duration.observe(seconds)
        rows.observe(sentences)
        steps.inc()
        self._source_tokens.inc(source_tokens)
        self._padding_tokens.inc(padded_tokens)

    def stepped(self, seconds: float, rows: int, sentences: int) -> None:
        """See `StepObserver`."""
        del sentences
        duration, step_rows, steps = self._decode_steps
        duration.observe(seconds)
        step_rows.observe(rows)
        steps.inc()

    def released(self, steps: int) -> None:
        """See `StepObserver`."""
        self._release_steps.observe(steps)

    # The RPC layer.

    def method(self, name: MethodName, *, usual: str = "OK") -> MethodMetrics:
        """The series of a method whose calls usually have this status; to be kept, not looked up per call."""
        labels = _labels(name)

        def handled(code: str) -> Counter:
            return self._grpc_handled.labels(*labels, code)

        return MethodMetrics(self._grpc_started.labels(*labels), handled, self._grpc_seconds.labels(*labels), usual)

    def request_ended(self, outcome: Outcome, seconds: float) -> None:
        """A request for generation, of one or several inputs, has ended so."""
        self._requests[outcome].inc()
        self._duration.observe(seconds)

    def generated(self, completed: Completed, *, source_tokens: int, beam_size: int) -> None:
        """One input is done."""
        timing, length = completed.timing, len(completed.hypotheses[0].tokens)
        self._queue.observe(timing.queue_s)
        self._encode.observe(timing.encode_s)
        self._decode.observe(timing.decode_s)
        self._input_source_tokens.observe(source_tokens)
        self._input_target_tokens.observe(length)
        self._target_tokens.inc(length)
        self._beam_width.observe(beam_size)

    def first_result(self, seconds: float) -> None:
        """A stream's first message goes out, so many seconds after the request's arrival."""
        self._first_result.observe(seconds)

    def deadline_missing(self) -> None:
        """A request for generation has come without a deadline."""
        self._deadline_missing.inc()

    def retry_seen(self) -> None:
        """A call has come that the client's gRPC sends again."""
        self._retries.inc()

    # The application.

    def watch_load(self, load: Callable[[], EngineLoad], *, clock: Clock, wall_clock: Clock = time.time) -> None:
        """From now on, read the engine's load at each scrape.

        Args:
            load: Tells the load; called on the scraping thread.
            clock: The engine's clock, monotonic seconds.
            wall_clock: Seconds since 1970.
        """
        self.registry.register(_LoadCollector(load, clock, wall_clock))

    def watch_log(self, dropped: Mapping[str, int]) -> None:
        """From now on, tell at each scrape how many lines of the log were dropped, and why."""
        self.registry.register(_LogCollector(dropped))

    def tell_constants(self, model: Mapping[str, str], build: Mapping[str, str]) -> None:
        """Publish what does not change: the model's properties, and the versions of the server's parts."""
        Gauge("beamline_model_info", "The served model.", tuple(model), registry=self.registry).labels(**model).set(1)
        Gauge("beamline_build_info", "Versions.", tuple(build), registry=self.registry).labels(**build).set(1)


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], EngineLoad], clock: Clock, wall_clock: Clock) -> None:
        self._load = load
        self._clock = clock
        self._wall_clock = wall_clock

    def collect(self) -> Iterator[GaugeMetricFamily]:
        load = self._load()
        values = (
            ("queued_requests", "Inputs that wait.", load.queued_requests),
            ("queued_rows", "Hypotheses of the inputs that wait.", load.queued_rows),
            ("running_requests", "Inputs in work.", load.running_requests),
            ("running_rows", "Hypotheses of the inputs in work.", load.running_rows),
            ("row_capacity", "Hypotheses that may be in work, but for the spare part.", load.row_capacity),
            ("queue_limit_rows", "Hypotheses that may wait.", load.queue_limit_rows),
        )
        for name, text, value in values:
            yield GaugeMetricFamily(f"beamline_{name}", text, value)
        # Absent before the first step: 0 would look like a stall since 1970.
        if load.last_step_at is not None:
            stamp = self._wall_clock() - (self._clock() - load.last_step_at)
            text = "When the engine's last step ended."
            yield GaugeMetricFamily("beamline_engine_last_step_timestamp_seconds", text, stamp)


class _LogCollector(Collector):
    def __init__(self, dropped: Mapping[str, int]) -> None:
        self._dropped = dropped

    def collect(self) -> Iterator[CounterMetricFamily]:
        text = "Lines of the log that were not written."
        lines = CounterMetricFamily("beamline_log_lines_dropped", text, labels=["reason"])
        for reason, count in self._dropped.items():
            lines.add_metric([reason], count)
        yield lines


def _labels(name: MethodName) -> tuple[str, str, str]:
    return name.kind, name.service, name.method
