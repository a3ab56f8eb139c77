"""Requests that nobody waits for any more: their rows are free at the next step, and nobody else notices."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_server.metrics import Outcome
from beamline_server.process import Samples, ServerProcess

# Some seconds of work on two cores: long enough to be caught half-way.
LONG_SEARCH = pb.SearchOptions(beam_size=16, min_new_tokens=255, max_new_tokens=256)
LONG = pb.GenerateRequest(inputs=[pb.Input(text="Il fait beau aujourd'hui.")] * 8, search=LONG_SEARCH)
LONG_STREAM = pb.GenerateStreamRequest(
    input=LONG.inputs[0], search=pb.SearchOptions(beam_size=1, min_new_tokens=255, max_new_tokens=256)
)
OUTCOMES = [outcome.value for outcome in Outcome]


@pytest.fixture
async def calls(server: ServerProcess) -> AsyncIterator[Any]:
    """The methods of the service for asyncio, one attempt per call."""
    async with grpc.aio.insecure_channel(server.target, options=[("grpc.enable_retries", 0)]) as channel:
        yield GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated


@pytest.fixture
def ended_since(server: ServerProcess) -> Callable[[], dict[str, float]]:
    """Tells how many requests have ended during the test, by outcome; those without any are left out."""
    before = server.samples()

    def difference() -> dict[str, float]:
        samples = server.samples_when_idle()
        names = (name for name in samples if name.startswith("beamline_requests_total"))
        counts = {name.split('"')[1]: samples[name] - before[name] for name in names}
        return {outcome: count for outcome, count in counts.items() if count}

    return difference


def is_busy(samples: Samples) -> bool:
    return samples["beamline_running_rows"] > 0


async def test_a_cancelled_request_frees_its_rows(
    server: ServerProcess, calls: Any, ended_since: Callable[[], dict[str, float]]
) -> None:
    call = calls.Generate(LONG, timeout=60)
    waiting = asyncio.ensure_future(call.code())
    await asyncio.to_thread(server.scrape_until, is_busy)

    call.cancel()

    assert await waiting == grpc.StatusCode.CANCELLED
    assert await asyncio.to_thread(ended_since) == {"cancelled": 1}
    samples = server.samples()
    assert samples["beamline_slot_release_steps_count"] >= len(LONG.inputs)
    assert samples['beamline_slot_release_steps_bucket{le="1.0"}'] == samples["beamline_slot_release_steps_count"]


async def test_a_stream_that_is_left_frees_its_rows(calls: Any, ended_since: Callable[[], dict[str, float]]) -> None:
    call = calls.GenerateStream(LONG_STREAM, timeout=60)
    first = await call.read()
    call.cancel()

    assert first.WhichOneof("event") == "piece"
    assert await asyncio.to_thread(ended_since) == {"cancelled": 1}


async def test_a_lost_connection_cancels(server: ServerProcess, ended_since: Callable[[], dict[str, float]]) -> None:
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        call = stub.Generate(LONG, timeout=60)
        waiting = asyncio.ensure_future(call.code())
        await asyncio.to_thread(server.scrape_until, is_busy)
    await waiting

    assert await asyncio.to_thread(ended_since) == {"cancelled": 1}


@pytest.mark.parametrize("timeout_s", [0.001, 0.2])
async def test_a_deadline_that_passes_frees_the_rows(serve: Callable[..., ServerProcess], timeout_s: float) -> None:
    """In a server that has computed nothing yet: one that knows its pace would refuse what it cannot do in time."""
    server = serve()
    async with grpc.aio.insecure_channel(server.target, options=[("grpc.enable_retries", 0)]) as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        codes = await asyncio.gather(*(stub.Generate(LONG, timeout=timeout_s).code() for _ in range(4)))
    samples = await asyncio.to_thread(server.samples_when_idle)
    counts = {outcome: samples[f'beamline_requests_total{{outcome="{outcome}"}}'] for outcome in OUTCOMES}

    assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
    # The caller's clock may be the first to notice, and its call may never have left.
    assert {outcome for outcome, count in counts.items() if count} <= {"deadline", "cancelled"}
    assert sum(counts.values()) <= 4


async def test_without_a_deadline_the_server_sets_one(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--max-duration-s", "0.3")
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        codes = await asyncio.gather(stub.Generate(LONG).code(), stub.Generate(LONG, timeout=60).code())

    samples = await asyncio.to_thread(server.samples_when_idle)
    assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert samples['beamline_requests_total{outcome="deadline"}'] == 2
    assert samples["beamline_client_deadline_missing_total"] == 1


async def test_a_stream_that_nobody_reads_holds_no_rows(server: ServerProcess, calls: Any) -> None:
    request = pb.GenerateStreamRequest(input=pb.Input(text="Bonjour."), search=pb.SearchOptions(beam_size=1))
    unread = [calls.GenerateStream(request, timeout=60) for _ in range(20)]
    await asyncio.gather(*(call.wait_for_connection() for call in unread))

    await asyncio.to_thread(server.samples_when_idle)

    for call in unread:
        messages = [message async for message in call]
        assert messages[-1].WhichOneof("event") == "result"


async def test_survivors_of_cancellations_get_the_answer_they_would_get_alone(
    server: ServerProcess, calls: Any, sentences: Sequence[str], ended_since: Callable[[], dict[str, float]]
) -> None:
    rng = random.Random(3)
    searches = [pb.SearchOptions(beam_size=rng.choice([1, 2, 4, 8])) for _ in range(60)]
    requests = [
        pb.GenerateRequest(inputs=[pb.Input(text=text)], search=search, output=pb.OutputOptions(token_ids=True))
        for text, search in zip(sentences, searches, strict=False)
    ]
    alone = [(await calls.Generate(request, timeout=60)).results[0].hypotheses for request in requests]

    doomed = [calls.Generate(LONG, timeout=60)]
    doomed += [calls.Generate(request, timeout=60) for request in requests]
    survivors = [calls.Generate(request, timeout=60) for request in requests]
    rng.shuffle(doomed)
    cancelled = 0
    for expected, survivor in zip(alone, survivors, strict=True):
        cancelled += doomed.pop().cancel()
        assert (await survivor).results[0].hypotheses == expected
    cancelled += sum(call.cancel() for call in doomed)

    assert cancelled > 0
    counts = await asyncio.to_thread(ended_since)
    assert counts.pop("ok") >= 2 * len(requests)
    assert counts.keys() <= {"cancelled"}
