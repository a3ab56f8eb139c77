"""Request-level batching, which continuous batching is compared with, as a setting of a real server."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_client import AsyncClient, Client, Result, SearchOptions
from beamline_client.results import Timing
from beamline_server.process import ServerProcess

Serve = Callable[..., ServerProcess]


@pytest.fixture
async def for_ever(serve: Serve) -> AsyncIterator[tuple[ServerProcess, Any]]:
    """A server whose batches wait for a minute for their hundredth request, and its methods, one attempt per call."""
    process = serve("--workers", "1", "--request-batch", "100", "--request-batch-delay-ms", "60000")
    async with grpc.aio.insecure_channel(process.target, options=[("grpc.enable_retries", 0)]) as channel:
        yield process, GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated


def answer(result: Result) -> Result:
    """A result without what differs from call to call."""
    return replace(result, timing=Timing(0, 0, 0, 0))


async def test_answers_are_those_of_continuous_batching(client: Client, serve: Serve, sentences: Sequence[str]) -> None:
    rng = random.Random(30)
    texts = rng.sample(sentences, 60)
    searches = [SearchOptions(beam_size=rng.choice([1, 2, 4, 8]), max_new_tokens=rng.choice([5, 60])) for _ in texts]
    by_batches = serve("--request-batch", "8", "--request-batch-delay-ms", "5")

    async with AsyncClient(by_batches.target) as other:
        calls = [other.generate_one(text, search=search) for text, search in zip(texts, searches, strict=True)]
        together = await asyncio.gather(*calls)

    for text, search, result in zip(texts, searches, together, strict=True):
        assert answer(result) == answer(client.generate_one(text, search=search))
    samples = await asyncio.to_thread(by_batches.samples_when_idle)
    assert samples['beamline_requests_total{outcome="ok"}'] == len(texts)


async def test_a_call_of_many_inputs_is_a_batch_of_many(client: Client, serve: Serve, sentences: Sequence[str]) -> None:
    some = sentences[:40]
    by_batches = serve("--workers", "1", "--request-batch", "16", "--request-batch-delay-ms", "0")

    with Client(by_batches.target) as other:
        together = await asyncio.to_thread(other.generate, some)

    assert [answer(result) for result in together] == [answer(result) for result in client.generate(some)]


async def test_a_call_that_is_given_up_leaves_a_batch_that_fills(for_ever: tuple[ServerProcess, Any]) -> None:
    process, stub = for_ever
    call = stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text="Bonjour.")] * 3), timeout=60)
    code = asyncio.ensure_future(call.code())
    await asyncio.to_thread(process.scrape_until, lambda samples: samples["beamline_queued_rows"] > 0)

    call.cancel()

    assert await code == grpc.StatusCode.CANCELLED
    assert (await asyncio.to_thread(process.samples_when_idle))['beamline_requests_total{outcome="cancelled"}'] == 1


async def test_a_deadline_passes_while_a_batch_fills(for_ever: tuple[ServerProcess, Any]) -> None:
    process, stub = for_ever

    call = stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text="Bonjour.")]), timeout=0.2)

    assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    samples = await asyncio.to_thread(process.samples_when_idle)
    assert samples['beamline_requests_total{outcome="ok"}'] == 0
    assert samples["beamline_queued_rows"] == 0


async def test_a_full_batch_does_not_wait(for_ever: tuple[ServerProcess, Any]) -> None:
    _, stub = for_ever
    inputs, greedy = [pb.Input(text="Bonjour.")] * 50, pb.SearchOptions(beam_size=1, max_new_tokens=4)

    calls = [stub.Generate(pb.GenerateRequest(inputs=inputs, search=greedy), timeout=60) for _ in range(2)]

    assert [len((await call).results) for call in calls] == [50, 50]
