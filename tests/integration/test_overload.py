"""More than the server can do: what fits is answered, the rest is refused at once, and afterwards all is as before."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_client import AsyncClient
from beamline_server.process import ServerProcess

Serve = Callable[..., ServerProcess]

LONGEST_REFUSAL_S = 0.05
PROBES = 600
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
OWN_CONNECTION = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
# Rows for four default searches at a time and as many that wait.
SMALL = ("--workers", "1", "--max-rows", "16", "--max-queue-rows", "16")


@pytest.fixture
def small(serve: Serve) -> ServerProcess:
    return serve(*SMALL)


@pytest.fixture
async def calls(small: ServerProcess) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(small.target, options=[("grpc.enable_retries", 0)]) as channel:
        yield GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated


def request_for(text: str, beam_size: int = 4) -> pb.GenerateRequest:
    return pb.GenerateRequest(inputs=[pb.Input(text=text)], search=pb.SearchOptions(beam_size=beam_size))


async def watch_health(target: str, seen: list[int], connected: asyncio.Event) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        async for status in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            seen.append(status.status)
            connected.set()


async def test_a_burst_is_answered_or_refused_and_leaves_nothing_behind(
    small: ServerProcess, calls: Any, sentences: Sequence[str]
) -> None:
    seen: list[int] = []
    connected = asyncio.Event()
    watch = asyncio.create_task(watch_health(small.target, seen, connected))
    await connected.wait()

    async def call(text: str) -> tuple[grpc.StatusCode, Any]:
        try:
            await calls.Generate(request_for(text), timeout=60)
        except grpc.aio.AioRpcError as error:
            return error.code(), error
        return grpc.StatusCode.OK, None

    ended = await asyncio.gather(*(call(text) for text in sentences[:300]))
    counts = Counter(code for code, _ in ended)
    samples = await asyncio.to_thread(small.samples_when_idle)

    assert counts.keys() == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert counts[grpc.StatusCode.OK] >= 8
    assert samples['beamline_requests_total{outcome="ok"}'] == counts[grpc.StatusCode.OK]
    assert samples['beamline_requests_total{outcome="queue_full"}'] == counts[grpc.StatusCode.RESOURCE_EXHAUSTED]
    for _, error in ended:
        if error is not None:
            check_advice(error)
    assert seen == [health_pb2.HealthCheckResponse.SERVING]
    watch.cancel()
    assert await call("Bonjour.") == (grpc.StatusCode.OK, None)


@pytest.mark.parametrize(
    ("calls_at_once", "connections"), [(1_500, 1), (3_000, 1), (4_000, 50)], ids=lambda number: f"{number}"
)
async def test_every_one_of_thousands_of_calls_at_once_has_an_answer_of_ours(
    small: ServerProcess, calls_at_once: int, connections: int
) -> None:
    """More calls than a connection may have open, and more than gRPC holds by itself: none is dropped on the way."""
    raw = request_for("Bonjour.", beam_size=1).SerializeToString()
    channels = [grpc.aio.insecure_channel(small.target, options=OWN_CONNECTION) for _ in range(connections)]
    methods = [channel.unary_unary("/beamline.v1.GenerationService/Generate") for channel in channels]

    async def call(number: int) -> Any:
        try:
            await methods[number % connections](raw, timeout=120)
        except grpc.aio.AioRpcError as error:
            return error
        return None

    began = time.perf_counter()
    errors = [error for error in await asyncio.gather(*map(call, range(calls_at_once))) if error is not None]
    seconds = time.perf_counter() - began
    samples = await asyncio.to_thread(small.samples_when_idle)
    await asyncio.gather(*(channel.close() for channel in channels))

    print(f"{calls_at_once} calls on {connections} connections: {len(errors)} refused, all ended in {seconds:.1f} s")
    assert {(error.code(), error.details()) for error in errors if error.code() != FULL} == set()
    for error in errors:
        check_advice(error)
    assert samples['beamline_requests_total{outcome="queue_full"}'] == len(errors) > 0
    assert samples['beamline_requests_total{outcome="ok"}'] == calls_at_once - len(errors) > 0
    ended = [value for series, value in samples.items() if series.startswith("beamline_requests_total")]
    assert sum(ended) == calls_at_once


def check_advice(error: Any) -> None:
    """A refusal tells when to come back, twice alike: for programs that read it, and for gRPC's own retries."""
    info, advice = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    first, second = rpc_status.from_call(error).details
    assert first.Unpack(info)
    assert second.Unpack(advice)
    assert info.reason == "QUEUE_FULL"
    delay_ms = round(advice.retry_delay.ToTimedelta().total_seconds() * 1000)
    assert 20 <= delay_ms <= 5000
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) == delay_ms


async def test_refusals_come_at_once_while_the_engine_is_saturated(
    small: ServerProcess, calls: Any, sentences: Sequence[str]
) -> None:
    """Eight callers hold all rows there are; probes ask for as many again."""
    texts = itertools.cycle(sentences)
    probe = pb.GenerateRequest(inputs=[pb.Input(text="Bonjour.")] * 2, search=pb.SearchOptions(beam_size=16))
    done = asyncio.Event()
    answered = 0

    async def caller() -> None:
        nonlocal answered
        while not done.is_set():
            await calls.Generate(request_for(next(texts)), timeout=60)
            answered += 1

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    await asyncio.to_thread(small.scrape_until, lambda samples: samples["beamline_queued_rows"] == 16)
    before, seconds = answered, []
    for _ in range(PROBES):
        began = time.perf_counter()
        code = await calls.Generate(probe, timeout=60).code()
        seconds.append(time.perf_counter() - began)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    goodput = answered - before
    done.set()
    await asyncio.gather(*callers)

    seconds.sort()
    p50, p99 = (seconds[int(share * len(seconds))] for share in (0.5, 0.99))
    print(
        f"refused in p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms; meanwhile {goodput / sum(seconds):.0f} answers/s"
    )
    assert p99 <= LONGEST_REFUSAL_S
    assert goodput > 0


async def test_the_client_library_comes_back_when_it_is_told_to(small: ServerProcess, sentences: Sequence[str]) -> None:
    async with AsyncClient(small.target) as client:
        results = await asyncio.gather(*(client.generate_one(text) for text in sentences[:12]))

    assert all(result.text for result in results)
    assert small.samples()["beamline_retries_seen_total"] > 0


@pytest.mark.parametrize(
    ("flags", "inputs", "told"),
    [
        pytest.param(SMALL, 3, "needs up to 48 rows; this server has 32", id="more rows than run and wait"),
        pytest.param(("--workers", "1", "--kv-slots", "256"), 1, "cache slots", id="more slots than there are"),
    ],
)
async def test_what_could_never_run_is_refused_as_invalid(
    serve: Serve, flags: tuple[str, ...], inputs: int, told: str
) -> None:
    """To come back later would be no use."""
    request = pb.GenerateRequest(
        inputs=[pb.Input(text="Bonjour.")] * inputs, search=pb.SearchOptions(beam_size=16, max_new_tokens=64)
    )
    async with grpc.aio.insecure_channel(serve(*flags).target) as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        call = stub.Generate(request, timeout=60)

        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert told in await call.details()
