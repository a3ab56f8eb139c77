"""What can be scraped: names, values, bounds, and the server that is scraped."""

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import RequestId
from beamline_server.engine.workers import EngineLoad
from beamline_server.metrics import MethodName, Metrics, Outcome
from beamline_server.rpc.info import versions
from doubles.service import ManualClock, make_completed, serving

# Other files - dashboards, alerts, autoscaling - name these.
NAMES = {
    "beamline_beam_width": "histogram",
    "beamline_build_info": "gauge",
    "beamline_client_deadline_missing": "counter",
    "beamline_draining": "gauge",
    "beamline_engine_last_step_timestamp_seconds": "gauge",
    "beamline_model_info": "gauge",
    "beamline_model_load_seconds": "gauge",
    "beamline_memory_bound_bytes": "gauge",
    "beamline_padding_tokens": "counter",
    "beamline_phase_duration_seconds": "histogram",
    "beamline_queue_limit_rows": "gauge",
    "beamline_queued_requests": "gauge",
    "beamline_queued_rows": "gauge",
    "beamline_ready": "gauge",
    "beamline_request_duration_seconds": "histogram",
    "beamline_request_source_tokens": "histogram",
    "beamline_request_target_tokens": "histogram",
    "beamline_requests": "counter",
    "beamline_retries_seen": "counter",
    "beamline_row_capacity": "gauge",
    "beamline_running_requests": "gauge",
    "beamline_running_rows": "gauge",
    "beamline_slot_release_steps": "histogram",
    "beamline_source_tokens": "counter",
    "beamline_step_duration_seconds": "histogram",
    "beamline_step_rows": "histogram",
    "beamline_steps": "counter",
    "beamline_target_tokens": "counter",
    "beamline_time_to_first_result_seconds": "histogram",
    "grpc_server_handled": "counter",
    "grpc_server_handling_seconds": "histogram",
    "grpc_server_started": "counter",
}
LOAD = EngineLoad(1, 2, 3, 4, 5, 6, last_step_at=990.0)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def samples(metrics: Metrics) -> Iterator[Sample]:
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        # Switched off where the server runs; it is a switch of the whole process.
        yield from (sample for sample in family.samples if not sample.name.endswith("_created"))


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_all_names_and_types(metrics: Metrics) -> None:
    metrics.watch_load(lambda: LOAD, clock=ManualClock())
    metrics.tell_constants({"model": "m"}, versions())
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    found = {
        family.name: family.type
        for family in families
        if not family.name.startswith(("process_", "python_")) and not family.name.endswith("_created")
    }
    assert found == NAMES


def test_every_family_is_described(metrics: Metrics) -> None:
    metrics.watch_load(lambda: LOAD, clock=ManualClock())
    for family in metrics.registry.collect():
        if family.name in NAMES:
            assert family.documentation.endswith("."), family.name


def test_it_is_a_step_observer(metrics: Metrics) -> None:
    observer: StepObserver = metrics
    observer.encoded(0.002, sentences=3, source_tokens=30, padded_tokens=6)
    observer.stepped(0.004, rows=12, sentences=3)
    observer.stepped(0.004, rows=8, sentences=2)
    observer.released(1)
    assert value(metrics, "beamline_steps_total", kind="encode") == 1
    assert value(metrics, "beamline_steps_total", kind="decode") == 2
    assert value(metrics, "beamline_step_rows_sum", kind="encode") == 3
    assert value(metrics, "beamline_step_rows_sum", kind="decode") == 20
    assert value(metrics, "beamline_step_duration_seconds_count", kind="decode") == 2
    assert value(metrics, "beamline_source_tokens_total") == 30
    assert value(metrics, "beamline_padding_tokens_total") == 6
    assert value(metrics, "beamline_slot_release_steps_bucket", le="0.0") == 0
    assert value(metrics, "beamline_slot_release_steps_bucket", le="1.0") == 1


def test_each_input_is_counted_by_phase_and_size(metrics: Metrics) -> None:
    metrics.generated(make_completed(RequestId(1), range(7)), source_tokens=5, beam_size=4)
    assert value(metrics, "beamline_phase_duration_seconds_sum", phase="queue") == 0.001
    assert value(metrics, "beamline_phase_duration_seconds_sum", phase="encode") == 0.002
    assert value(metrics, "beamline_phase_duration_seconds_sum", phase="decode") == 0.25
    assert value(metrics, "beamline_target_tokens_total") == 7
    assert value(metrics, "beamline_request_target_tokens_sum") == 7
    assert value(metrics, "beamline_request_source_tokens_sum") == 5
    assert value(metrics, "beamline_beam_width_bucket", le="4.0") == 1
    assert value(metrics, "beamline_beam_width_bucket", le="2.0") == 0


def test_all_outcomes_are_there_from_the_start(metrics: Metrics) -> None:
    for outcome in Outcome:
        assert value(metrics, "beamline_requests_total", outcome=outcome.value) == 0


def test_the_load_is_read_when_it_is_scraped(metrics: Metrics) -> None:
    metrics.watch_load(lambda: LOAD, clock=ManualClock(1000.0), wall_clock=ManualClock(5000.0))
    assert value(metrics, "beamline_queued_requests") == 1
    assert value(metrics, "beamline_queued_rows") == 2
    assert value(metrics, "beamline_running_requests") == 3
    assert value(metrics, "beamline_running_rows") == 4
    assert value(metrics, "beamline_row_capacity") == 5
    assert value(metrics, "beamline_queue_limit_rows") == 6
    assert value(metrics, "beamline_engine_last_step_timestamp_seconds") == 4990


def test_there_is_no_last_step_before_the_first(metrics: Metrics) -> None:
    load = EngineLoad(0, 0, 0, 0, 5, 6, last_step_at=None)
    metrics.watch_load(lambda: load, clock=ManualClock())
    assert value(metrics, "beamline_engine_last_step_timestamp_seconds") is None


def test_constants_are_labels(metrics: Metrics) -> None:
    metrics.tell_constants({"model": "fr-en", "precision": "int8"}, {"beamline": "1"})
    assert value(metrics, "beamline_model_info", model="fr-en", precision="int8") == 1
    assert value(metrics, "beamline_build_info", beamline="1") == 1


def test_statuses_are_counted_per_method(metrics: Metrics) -> None:
    method = metrics.method(MethodName("s", "m", "unary"))
    method.started()
    method.handled("OK", 0.1)
    method.handled("INTERNAL", 0.1)
    labels = {"grpc_service": "s", "grpc_method": "m", "grpc_type": "unary"}
    assert value(metrics, "grpc_server_started_total", **labels) == 1
    assert value(metrics, "grpc_server_handled_total", **labels, grpc_code="INTERNAL") == 1
    assert value(metrics, "grpc_server_handling_seconds_count", **labels) == 2


async def test_series_stay_few_whatever_is_asked() -> None:
    async with serving() as service:
        service.metrics.watch_load(service.engine.load, clock=ManualClock())
        await service.stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text="a")]))
        before = len(list(samples(service.metrics)))
        for number in range(200):
            await service.stub.Generate(
                pb.GenerateRequest(inputs=[pb.Input(text=f"text {number}")]),
                metadata=[("x-request-id", f"id-{number}")],
            )
        assert len(list(samples(service.metrics))) == before
    assert before < 800
