"""A call whose path is no text harms nobody, and a server whose loop ends says so."""

import asyncio
import logging
from typing import Any, cast

import grpc
import pytest
from grpc._cython import cygrpc

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.errors import QueueFull
from beamline_server.rpc import aio_server
from beamline_server.rpc.aio_server import AioServer, Undecided
from doubles.http2 import DATA, HEADERS, Connection
from doubles.service import EOS, RunningService, failure_of, make_completed, serving, silent

REQUEST = pb.GenerateRequest(inputs=[pb.Input(text="ab")])
PATHS = [b"/\xff", b"/beamline.v1.GenerationService/Generate\xff", b"\xc3\x28", b"/" + b"\xf0" * 100]
CALLS = 200
ENDS_WITHIN_S = 5


async def trailers_of(service: RunningService, path: bytes) -> bytes:
    """What a call of such a path ends with."""
    async with Connection.opened(int(service.address.rpartition(":")[2])) as connection:
        connection.call(path)
        async for frame in connection.frames():
            assert frame.kind != DATA
            if frame.kind == HEADERS:
                return frame.payload
    raise AssertionError("the connection has ended without an answer")


def unimplemented(service: RunningService) -> float:
    labels = dict(zip(("grpc_type", "grpc_service", "grpc_method"), ("unary", "unknown", "unknown"), strict=True))
    labels["grpc_code"] = "UNIMPLEMENTED"
    return service.metrics.registry.get_sample_value("grpc_server_handled_total", labels) or 0.0


@pytest.mark.parametrize("path", PATHS)
async def test_it_is_answered_as_any_other_method_that_there_is_not(
    path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(script=silent) as service:
        call = service.stub.Generate(REQUEST)
        [request] = await service.engine.submitted()
        assert b"there is no such method here" in await trailers_of(service, path)
        assert unimplemented(service) == 1
        service.engine.tell(make_completed(request.id, [65, EOS]))
        assert len((await call).results) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_callers_do_not_notice_that_somebody_does_it_again_and_again() -> None:
    async with serving() as service:
        done, answered = asyncio.Event(), 0

        async def call_until_done() -> None:
            nonlocal answered
            while not done.is_set():
                await service.stub.Generate(REQUEST, timeout=20)
                answered += 1

        callers = [asyncio.create_task(call_until_done()) for _ in range(4)]
        for number in range(CALLS):
            await trailers_of(service, PATHS[number % len(PATHS)])
        done.set()
        await asyncio.gather(*callers)
        assert unimplemented(service) == CALLS
        assert answered > CALLS


async def test_a_loop_that_ends_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise OSError("no more calls")

    server = AioServer()
    server.add_insecure_port("127.0.0.1:0")
    monkeypatch.setattr(aio_server._Tolerant, "_request_call", broken)
    await server.start()
    async with asyncio.timeout(ENDS_WITHIN_S):
        await server.ended()
    await server.stop(None)


@pytest.mark.parametrize("part", ["_request_call", "_request_registered_call"])
async def test_a_loop_that_ends_later_ends_the_server_too(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as service:
        assert len((await service.stub.Generate(REQUEST)).results) == 1

        async def broken(*_: object) -> None:
            raise OSError("no more calls")

        monkeypatch.setattr(aio_server._Tolerant, part, broken)
        # Those who are waited for already still come.
        last = [service.stub.Generate(REQUEST, timeout=ENDS_WITHIN_S) for _ in range(2 * aio_server._TAKEN_AT_A_TIME)]
        lost = asyncio.ensure_future(trailers_of(service, PATHS[0]))
        async with asyncio.timeout(ENDS_WITHIN_S):
            await service.server.ended()
        lost.cancel()
        for call in last:
            call.cancel()


async def test_a_gate_that_fails_refuses_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async with serving() as service:
        monkeypatch.setattr(service.engine, "foreseen_refusal", broken)
        for _ in range(2 * aio_server._TAKEN_AT_A_TIME):
            assert len((await service.stub.Generate(REQUEST)).results) == 1
    assert {getattr(record, "event", "") for record in caplog.records if record.levelno >= logging.ERROR} == {
        "gate_failed"
    }


async def test_another_grpcio_is_taken_as_it_is_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aio_server, "_PARTS", {cygrpc: ("_something_else",)})
    async with serving() as service:
        assert type(service.server._server) is cygrpc.AioServer
        assert len((await service.stub.Generate(REQUEST)).results) == 1
    [record] = [vars(record) for record in caplog.records if record.levelno == logging.WARNING]
    assert (record["event"], record["grpcio"]) == ("grpc_as_it_is", grpc.__version__)


class Coming:
    """A call of a number, as the server keeps it."""

    def __init__(self, number: int, *, is_late: bool = False) -> None:
        self.number, self.is_late = number, is_late


def numbers(undecided: Undecided) -> list[int]:
    return [cast(Coming, undecided.next()).number for _ in range(len(undecided))]


def test_the_newest_is_decided_first_and_every_eighth_is_the_oldest() -> None:
    undecided = Undecided()
    for number in range(16):
        assert undecided.add(cast(Any, Coming(number))) == []
    assert numbers(undecided) == [15, 14, 13, 12, 11, 10, 9, 0, 8, 7, 6, 5, 4, 3, 2, 1]


def test_the_oldest_are_dropped_when_their_time_is_over() -> None:
    undecided = Undecided()
    calls = [Coming(number) for number in range(5)]
    for call in calls[:4]:
        undecided.add(cast(Any, call))
    for call in (calls[0], calls[1], calls[3]):
        call.is_late = True
    assert [cast(Coming, late).number for late in undecided.add(cast(Any, calls[4]))] == [0, 1]
    assert numbers(undecided) == [4, 3, 2]


async def test_each_of_many_calls_at_once_has_one_outcome_refused_or_late() -> None:
    """Of so many some are decided late: those with no time left are dropped, and counted as the others."""
    async with serving() as service:
        service.engine.foreseen = QueueFull(9, 8, 0.5)
        calls = [service.stub.Generate(REQUEST, timeout=0.03 if number % 2 else 20) for number in range(600)]
        codes = [error.code for error in await asyncio.gather(*map(failure_of, calls))]
        assert set(codes) <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert set(codes[::2]) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert len((await service.stub.GetInfo(pb.GetInfoRequest())).model.name)


async def test_a_call_that_cannot_be_refused_harms_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as service:
        service.engine.foreseen = QueueFull(9, 8, 0.5)

        async def failing(*_: object) -> None:
            raise ValueError("no metadata")

        with monkeypatch.context() as broken:
            broken.setattr(aio_server, "end_call", failing)
            lost = service.stub.Generate(REQUEST, timeout=30)
            while "refusal_failed" not in [vars(record).get("event") for record in caplog.records]:  # noqa: ASYNC110
                await asyncio.sleep(0)
        lost.cancel()
        assert (await failure_of(service.stub.Generate(REQUEST))).code == grpc.StatusCode.RESOURCE_EXHAUSTED
