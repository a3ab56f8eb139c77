"""What holds for every call: ids, malformed bytes, faults that leak nothing, and counting."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from prometheus_client import CollectorRegistry

from beamline.v1 import generation_pb2 as pb
from beamline_server.languages import NOTHING_AROUND, Around
from beamline_server.metrics import Metrics, Outcome
from beamline_server.rpc.call import Call, current_call, generates
from beamline_server.rpc.errors import MethodNotFound
from beamline_server.rpc.interceptors import Guard, _LostCallers, printable
from beamline_server.rpc.server import bind
from doubles.service import ByteTokenizer, ManualClock, RunningService, failure_of, serving

CODE = grpc.StatusCode
GENERATE = "/beamline.v1.GenerationService/Generate"
REQUEST = pb.GenerateRequest(inputs=[pb.Input(text="hello")])
LABELS = ("grpc_type", "grpc_service", "grpc_method")


class Broken(ByteTokenizer):
    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        raise ValueError(f"secret {text}")


class BrokenAtTheEnd(ByteTokenizer):
    def decode(self, ids: Sequence[int]) -> str:
        raise ValueError("secret")


def sent_raw(service: RunningService, path: str, raw: bytes) -> Any:
    return service.channel.unary_unary(path)(raw)


def handled(service: RunningService, service_name: str, method: str, code: str, kind: str = "unary") -> float | None:
    labels = {"grpc_type": kind, "grpc_service": service_name, "grpc_method": method, "grpc_code": code}
    return service.metrics.registry.get_sample_value("grpc_server_handled_total", labels)


@pytest.mark.parametrize("path", [GENERATE, "/grpc.health.v1.Health/Check"])
@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x12\x05ab"], ids=["no field", "cut off"])
async def test_malformed_bytes_are_the_callers_fault(path: str, raw: bytes) -> None:
    async with serving() as service:
        error = await failure_of(sent_raw(service, path, raw))
    assert (error.code, error.text) == (CODE.INVALID_ARGUMENT, "malformed protobuf message")


async def test_text_that_is_not_utf8_is_malformed() -> None:
    raw = REQUEST.SerializeToString().replace(b"hello", b"h\xff\xfelo")
    async with serving() as service:
        error = await failure_of(sent_raw(service, GENERATE, raw))
        assert handled(service, "beamline.v1.GenerationService", "Generate", "INVALID_ARGUMENT") == 1
    assert (error.code, error.text) == (CODE.INVALID_ARGUMENT, "malformed protobuf message")


async def test_malformed_messages_of_a_request_stream() -> None:
    async with serving() as service:
        call = service.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")()
        await call.write(b"\xff\xff\xff")
        error = await failure_of(call.read())
    assert (error.code, error.text) == (CODE.INVALID_ARGUMENT, "malformed protobuf message")


@pytest.mark.parametrize("tokenizer", [Broken(), BrokenAtTheEnd()], ids=["before", "after"])
async def test_faults_of_ours_leak_nothing_but_an_id(
    tokenizer: ByteTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tokenizer=tokenizer) as service:
        error = await failure_of(service.stub.Generate(REQUEST))
        assert service.desk.in_flight == 0
    error_id = error.trailers["x-error-id"]
    assert error.code == CODE.INTERNAL
    assert error.text == f"internal error {error_id}"
    assert set(error.trailers) == {"x-request-id", "x-error-id"}
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.error_id == error_id  # type: ignore[attr-defined]  # from extra
    assert "ValueError: secret" in caplog.text


async def test_faults_in_a_stream_leak_nothing_but_an_id() -> None:
    async with serving(tokenizer=Broken()) as service:
        call = service.stub.GenerateStream(pb.GenerateStreamRequest(input=pb.Input(text="a")))
        error = await failure_of(call.read())
    assert error.code == CODE.INTERNAL
    assert error.text.startswith("internal error ")


async def trailing(service: RunningService, metadata: Sequence[tuple[str, str]]) -> dict[str, Any]:
    call = service.stub.Generate(REQUEST, metadata=metadata)
    await call
    assert len(await call.initial_metadata()) == 0
    return dict(await call.trailing_metadata())


async def test_request_ids_are_echoed_at_the_end() -> None:
    async with serving() as service:
        assert (await trailing(service, [("x-request-id", "abc")]))["x-request-id"] == "abc"
        assert (await trailing(service, [("x-request-id", "a" * 200)]))["x-request-id"] == "a" * 128
        assert len((await trailing(service, []))["x-request-id"]) == 16
        service.engine.refusal = RuntimeError()
        error = await failure_of(service.stub.Generate(REQUEST, metadata=[("x-request-id", "abc")]))
        assert error.trailers["x-request-id"] == "abc"


@pytest.mark.parametrize(
    ("value", "expected"), [("a\r\nb", "ab"), ("é\x1b[31mx", "[31mx"), (b"ab\xff", "ab"), ("\u2028", "")]
)
def test_request_ids_are_printable(value: str | bytes, expected: str) -> None:
    assert printable(value) == expected


async def test_failed_requests_are_logged_without_their_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "beamline_server")
    async with serving() as service:
        await service.stub.Generate(REQUEST)
        request = pb.GenerateRequest(inputs=[pb.Input(text="hello")], search=pb.SearchOptions(beam_size=0))
        await failure_of(service.stub.Generate(request))
    ended = [record for record in caplog.records if getattr(record, "event", "") == "request_ended"]
    assert [(record.levelname, vars(record)["outcome"]) for record in ended] == [("DEBUG", "ok"), ("INFO", "invalid")]
    assert "hello" not in str([vars(record) for record in caplog.records])


UNKNOWN_PATHS = ("/beamline.v1.GenerationService/Nope", "/x.Y/Z", "/x.Y/W", "/x.Y/W", "/")


async def test_unknown_methods_share_one_label() -> None:
    async with serving() as service:
        for path in UNKNOWN_PATHS:
            await failure_of(sent_raw(service, path, b""))
        assert handled(service, "unknown", "unknown", "UNIMPLEMENTED") == len(UNKNOWN_PATHS)


async def test_an_unknown_method_is_refused_as_everything_else_is() -> None:
    async with serving() as service:
        error = await failure_of(
            service.channel.unary_unary("/x.Y/Z")(b"a request", metadata=[("x-request-id", "abc")])
        )
    assert error.code == CODE.UNIMPLEMENTED
    assert error.text.startswith("there is no such method here; ")
    assert error.trailers["x-request-id"] == "abc"
    assert error.detail(error_details_pb2.ErrorInfo).reason == "METHOD_NOT_FOUND"


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_an_unknown_method_of_every_kind_is_unimplemented(kind: str) -> None:
    async def not_yet() -> AsyncIterator[bytes]:
        """A caller who is still sending when the answer comes gets "Internal error from Core" from its own gRPC."""
        await asyncio.Event().wait()
        yield b""

    async with serving() as service:
        request = b"x" if kind.startswith("unary") else not_yet()
        call = getattr(service.channel, kind)("/x.Y/Z")(request)
        assert await call.code() == CODE.UNIMPLEMENTED


def test_there_are_no_methods_but_those_that_callers_of_others_are_told_of() -> None:
    names = [method.name for method in pb.DESCRIPTOR.services_by_name["GenerationService"].methods]
    assert str(MethodNotFound()).endswith(f"has {', '.join(names[:-1])} and {names[-1]}")


async def test_a_caller_of_unknown_methods_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as service:
        for path in UNKNOWN_PATHS:
            await failure_of(sent_raw(service, path, b""))
    told = [vars(record) for record in caplog.records if vars(record).get("event") == "unknown_method"]
    assert [record["further_ones_are_told"] for record in told] == [True]


async def test_callers_of_unknown_methods_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    callers = _LostCallers()
    for number in range(150):
        for port in (1, 2):
            callers.note(f"ipv6:%5B::{number:x}%5D:{port}")
    told = [vars(record) for record in caplog.records if vars(record).get("event") == "unknown_method"]
    assert [record["further_ones_are_told"] for record in told] == [True] * 99 + [False]


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "generates"])
@pytest.mark.parametrize(("timeout_s", "expected_s"), [(None, 30), (1e4, 30), (10, 10)])
async def test_a_further_method_of_the_service_has_its_call_too(
    marked: bool, timeout_s: float | None, expected_s: float
) -> None:
    """Whatever methods there will be: their handlers can ask since when and until when, and are counted."""
    calls: list[Call] = []

    async def rescore(request: bytes, context: Any) -> bytes:
        calls.append(current_call.get())
        return request

    metrics = Metrics(CollectorRegistry())
    server = grpc.aio.server(interceptors=[Guard(metrics, max_duration_s=30, clock=ManualClock(1000))])
    handler = grpc.unary_unary_rpc_method_handler(generates(rescore) if marked else rescore)
    name = "beamline.v1.GenerationService"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {"Rescore": handler})])
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert await channel.unary_unary(f"/{name}/Rescore")(b"x", timeout=timeout_s) == b"x"
    finally:
        await server.stop(None)

    assert [call.arrived_s for call in calls] == [1000]
    assert [call.deadline_s for call in calls] == pytest.approx([1000 + expected_s], abs=2)
    counted = metrics.registry.get_sample_value("beamline_requests_total", {"outcome": "ok"})
    assert counted == (1 if marked else 0)


async def test_every_call_is_counted() -> None:
    async with serving() as service:
        for _ in range(3):
            await service.stub.Generate(REQUEST)
        await service.stub.GetInfo(pb.GetInfoRequest())
        await failure_of(service.stub.Generate(pb.GenerateRequest()))
        assert handled(service, "beamline.v1.GenerationService", "Generate", "OK") == 3
        assert handled(service, "beamline.v1.GenerationService", "Generate", "INVALID_ARGUMENT") == 1
        assert handled(service, "beamline.v1.GenerationService", "GetInfo", "OK") == 1
        assert service.metrics.registry.get_sample_value("beamline_request_duration_seconds_count") == 4


async def test_retries_of_grpc_are_counted() -> None:
    async with serving() as service:
        await trailing(service, [("grpc-previous-rpc-attempts", "1")])
        assert service.metrics.registry.get_sample_value("beamline_retries_seen_total") == 1


async def test_a_method_that_yields_its_responses_can_generate_too() -> None:
    @generates
    async def rescore(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield str(current_call.get().deadline_s).encode()

    async def continuation(details: object) -> Any:
        return grpc.unary_stream_rpc_method_handler(rescore)

    metrics = Metrics(CollectorRegistry())
    guard = Guard(metrics, max_duration_s=30, clock=ManualClock(1000))
    handler = await guard.intercept_service(continuation, SimpleNamespace(method="/x.Y/Z"))
    context = Context(remaining_s=None)
    await handler.unary_stream(b"", context)

    assert context.written == [b"1030"]
    assert metrics.registry.get_sample_value("beamline_requests_total", {"outcome": "ok"}) == 1


class Context:
    """A server's context for one call, as far as the guard uses it."""

    def __init__(self, remaining_s: float | None) -> None:
        self.remaining_s = remaining_s
        self.aborted: tuple[Any, ...] = ()
        self.written: list[bytes] = []

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> None:
        return None

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    def time_remaining(self) -> float | None:
        return self.remaining_s

    async def write(self, response: bytes) -> None:
        self.written.append(response)

    async def abort(self, *arguments: Any) -> None:
        self.aborted = arguments
        raise grpc.aio.AbortError


@pytest.mark.parametrize(
    ("whole_s", "left_s", "outcome"),
    [
        (10, 0, Outcome.DEADLINE),
        (10, 0.09, Outcome.DEADLINE),
        (10, 0.11, Outcome.CANCELLED),
        (0.5, 0.04, Outcome.DEADLINE),
        (0.5, 0.06, Outcome.CANCELLED),
        (None, None, Outcome.CANCELLED),
    ],
)
async def test_who_gives_up_at_its_deadline_by_its_own_clock_is_counted_as_late(
    whole_s: float | None, left_s: float | None, outcome: Outcome
) -> None:
    clock, context = ManualClock(), Context(remaining_s=whole_s)

    @generates
    async def behaviour(request: object, at: object) -> None:
        clock.now += 1 if whole_s is None or left_s is None else whole_s - left_s
        context.remaining_s = left_s
        raise asyncio.CancelledError

    async def continuation(details: object) -> Any:
        return grpc.unary_unary_rpc_method_handler(behaviour)

    metrics = Metrics(CollectorRegistry())
    guard = Guard(metrics, max_duration_s=30, clock=clock)
    handler = await guard.intercept_service(continuation, SimpleNamespace(method=GENERATE))
    with pytest.raises(asyncio.CancelledError):
        await handler.unary_unary(REQUEST, context)
    assert metrics.registry.get_sample_value("beamline_requests_total", {"outcome": outcome.value}) == 1


async def test_a_request_that_comes_too_late_is_not_begun() -> None:
    begun = False

    @generates
    async def behaviour(request: object, context: object) -> None:
        nonlocal begun
        begun = True

    async def continuation(details: object) -> Any:
        return grpc.unary_unary_rpc_method_handler(behaviour)

    guard = Guard(Metrics(CollectorRegistry()), max_duration_s=30, clock=ManualClock())
    handler = await guard.intercept_service(continuation, SimpleNamespace(method=GENERATE))
    context = Context(remaining_s=0.0)
    await handler.unary_unary(REQUEST, context)
    assert context.aborted[0] == CODE.DEADLINE_EXCEEDED
    assert not begun
