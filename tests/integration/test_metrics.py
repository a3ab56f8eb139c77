"""What Prometheus sees of a real server: well-formed, complete, and in agreement with what callers have seen."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_server.process import Samples, ServerProcess

Serve = Callable[..., ServerProcess]

MOST_SERIES = 800
LONG = pb.GenerateRequest(
    inputs=[pb.Input(text="Il fait beau aujourd'hui.")] * 8,
    search=pb.SearchOptions(beam_size=8, min_new_tokens=255, max_new_tokens=256),
)
OUTCOMES = {
    grpc.StatusCode.OK: "ok",
    grpc.StatusCode.INVALID_ARGUMENT: "invalid",
    grpc.StatusCode.NOT_FOUND: "not_found",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "queue_full",
}


@pytest.fixture(scope="module")
def promtool() -> str:
    """Path of Prometheus' checker; a developer's machine may lack it, CI may not."""
    found = shutil.which("promtool")
    if found is not None:
        return found
    advice = "promtool is not installed; it comes with Prometheus (Debian: apt-get install prometheus)"
    if os.environ.get("CI"):
        pytest.fail(advice)
    pytest.skip(advice)


def test_promtool_finds_no_fault(server: ServerProcess, stub: Any, promtool: str) -> None:
    stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text="Bonjour.")]), timeout=10)

    checked = subprocess.run(
        [promtool, "check", "metrics"], input=server.scrape(), capture_output=True, text=True, check=False, timeout=30
    )

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_page_is_valid_open_metrics_too(server: ServerProcess) -> None:
    page = server.scrape(accept="application/openmetrics-text; version=1.0.0")

    parsed = text_string_to_metric_families(page)  # type: ignore[no-untyped-call]  # has no type information
    families = {family.name: family for family in parsed}

    assert all(family.documentation for family in families.values())
    assert {"beamline_requests", "beamline_step_duration_seconds", "grpc_server_handled", "process_cpu_seconds"} <= set(
        families
    )
    # They would double the counters for nothing.
    assert not [name for name in families if name.endswith("_created")]


def test_there_are_not_too_many_series(server: ServerProcess, stub: Any) -> None:
    stub.GetInfo(pb.GetInfoRequest(), timeout=10)

    assert len(server.samples()) <= MOST_SERIES


def test_gauges_tell_what_the_server_is(server: ServerProcess) -> None:
    samples = server.samples()

    assert samples["beamline_ready"] == 1
    assert samples["beamline_draining"] == 0
    assert 0 < samples["beamline_model_load_seconds"] < 60
    assert samples["beamline_row_capacity"] % 128 == 0
    assert samples["beamline_queue_limit_rows"] == 1024
    (model,) = [name for name in samples if name.startswith("beamline_model_info")]
    assert 'model="fr-en"' in model
    assert 'precision="int8"' in model


async def test_the_books_of_callers_and_server_balance(serve: Serve, sentences: Sequence[str]) -> None:
    """Every call has exactly one outcome, and both sides have seen the same."""
    server = serve("--workers", "2", "--max-queue-rows", "64")
    valid = [pb.GenerateRequest(inputs=[pb.Input(text=text)]) for text in sentences[:200]]
    invalid = [pb.GenerateRequest(inputs=[pb.Input()])] * 20
    elsewhere = [pb.GenerateRequest(model="en-fr", inputs=[pb.Input(text="Bonjour.")])] * 10
    async with grpc.aio.insecure_channel(server.target, options=[("grpc.enable_retries", 0)]) as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated

        async def streamed(request: pb.GenerateRequest) -> grpc.StatusCode:
            call = stub.GenerateStream(pb.GenerateStreamRequest(input=request.inputs[0]), timeout=60)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
            code: grpc.StatusCode = await call.code()
            return code

        abandoned = [stub.Generate(LONG, timeout=60), stub.Generate(LONG, timeout=0.2)]
        late = asyncio.gather(*(call.code() for call in abandoned))
        await asyncio.to_thread(server.scrape_until, lambda s: total(s, "grpc_server_started_total", '"Generate"') == 2)
        abandoned[0].cancel()
        calls = [stub.Generate(request, timeout=60).code() for request in valid]
        calls += [streamed(request) for request in valid[:20]]
        codes = Counter(await asyncio.gather(*calls))
        # While the queue is full, what is wrong with a request is not looked at.
        wrong = [stub.Generate(request, timeout=60).code() for request in (*invalid, *elsewhere)]
        codes += Counter(await asyncio.gather(*wrong))
        late_codes = await late
    samples = await asyncio.to_thread(server.samples_when_idle)

    assert late_codes == [grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED]
    assert codes.keys() == OUTCOMES.keys()
    for code, outcome in OUTCOMES.items():
        assert samples[f'beamline_requests_total{{outcome="{outcome}"}}'] == codes[code], outcome
    # When a deadline passes, either side may be the first to notice.
    abandoned_total = sum(samples[f'beamline_requests_total{{outcome="{o}"}}'] for o in ("cancelled", "deadline"))
    assert abandoned_total == len(abandoned)
    check_sums(samples, requests=len(calls) + len(wrong) + len(abandoned))


def total(samples: Samples, prefix: str, *parts: str) -> float:
    """The sum of the series that begin so and have these labels."""
    return sum(v for name, v in samples.items() if name.startswith(prefix) and all(part in name for part in parts))


def check_sums(samples: Samples, *, requests: int) -> None:
    """What is counted twice is counted alike."""
    assert total(samples, "beamline_requests_total") == requests
    for method in ("Generate", "GenerateStream"):
        label = f'grpc_method="{method}"'
        assert total(samples, "grpc_server_started_total", label) == total(samples, "grpc_server_handled_total", label)
    started = total(samples, "grpc_server_started_total", 'grpc_service="beamline.v1.GenerationService"')
    assert started == requests == samples["beamline_request_duration_seconds_count"]
    inputs = samples['beamline_requests_total{outcome="ok"}']  # one per request here
    assert samples["beamline_beam_width_count"] == samples["beamline_request_target_tokens_count"] == inputs
    assert samples["beamline_target_tokens_total"] == samples["beamline_request_target_tokens_sum"]
    for kind in ("encode", "decode"):
        assert (
            samples[f'beamline_steps_total{{kind="{kind}"}}'] == samples[f'beamline_step_rows_count{{kind="{kind}"}}']
        )


def test_an_unknown_method_is_counted_as_such(server: ServerProcess, channel: Any) -> None:
    labels = 'grpc_code="UNIMPLEMENTED",grpc_method="unknown",grpc_service="unknown",grpc_type="unary"'
    series = f"grpc_server_handled_total{{{labels}}}"
    before = server.samples()[series]
    with pytest.raises(grpc.RpcError):
        channel.unary_unary("/no.such.Service/Method")(b"", timeout=10)

    assert server.samples()[series] == before + 1
