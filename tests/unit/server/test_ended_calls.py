"""What has been made of a call goes when it has ended: nothing waits for Python to find it."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import suppress

import grpc
import pytest
from grpc._cython import cygrpc

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.errors import QueueFull
from doubles.service import RunningService, failure_of, serving

CALLS = 20
PATH = "/beamline.v1.GenerationService/"
FINE = pb.GenerateRequest(inputs=[pb.Input(text="ab")]).SerializeToString()
INVALID = pb.GenerateRequest().SerializeToString()
LARGE = pb.GenerateRequest(inputs=[pb.Input(token_ids=pb.TokenIds(ids=[1] * 100_000))]).SerializeToString()
CASES = {
    "answered": ("Generate", FINE),
    "refused unread": ("Generate", FINE),
    "invalid": ("Generate", INVALID),
    "invalid and large": ("Generate", LARGE),
    "malformed": ("Generate", b"\xff" * 100),
    "invalid stream": ("GenerateStream", INVALID),
    "unknown": ("Nothing", FINE),
}


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is collected meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def calls_kept() -> int:
    """Calls that the server still has something of."""
    kinds = (cygrpc._ServicerContext, pb.GenerateRequest, pb.GenerateStreamRequest)
    return sum(type(found) in kinds for found in gc.get_objects())


async def call(service: RunningService, method: str, message: bytes) -> None:
    if method == "GenerateStream":
        await failure_of(service.channel.unary_stream(PATH + method)(message).read())
        return
    with suppress(grpc.aio.AioRpcError):
        await service.channel.unary_unary(PATH + method)(message)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("case", CASES)
async def test_nothing_is_kept_of_calls_that_have_ended(case: str) -> None:
    method, message = CASES[case]
    async with serving() as service:
        if case == "refused unread":
            service.engine.foreseen = QueueFull(9, 8, 0.5)
        before = calls_kept()
        for _ in range(CALLS):
            await call(service, method, message)
        for _ in range(10):  # the last one's task ends after its answer has come
            await asyncio.sleep(0)
        assert calls_kept() - before <= 2
