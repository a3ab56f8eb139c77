"""Calls that the engine could not take are refused before they are read, and told and counted as any other."""

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.errors import QueueFull, WouldBeLate
from beamline_server.metrics import MethodName, Outcome
from beamline_server.rpc.gate import MOST_OPEN, OTHER_PLACES, PLACES, Gate
from beamline_server.settings import Settings
from doubles.service import ManualClock, RunningService, failure_of, serving, silent

CODE = grpc.StatusCode
REQUEST = pb.GenerateRequest(inputs=[pb.Input(text="ab")])
UNREAD = b"\xff" * 100
"""No message at all."""
MOST_GENERATING = 300
FORESEEN = [(QueueFull(9, 8, 0.5), "QUEUE_FULL"), (WouldBeLate(2.0, 1.0, 0.5), "DEADLINE_UNREACHABLE")]


def counted(service: RunningService, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(("foreseen", "reason"), FORESEEN)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_call_that_would_be_refused_is_not_read(
    foreseen: QueueFull | WouldBeLate, reason: str, method: str
) -> None:
    async with serving() as service:
        service.engine.foreseen = foreseen
        kind = service.channel.unary_stream if method == "GenerateStream" else service.channel.unary_unary
        call = kind(f"/beamline.v1.GenerationService/{method}")(UNREAD, metadata=[("x-request-id", "abc")])
        error = await failure_of(call.read() if method == "GenerateStream" else call)
        assert error.code == CODE.RESOURCE_EXHAUSTED
        assert error.detail(error_details_pb2.ErrorInfo).reason == reason
        assert 400 <= error.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() <= 600
        assert 400 <= int(error.trailers["grpc-retry-pushback-ms"]) <= 600
        assert error.trailers["x-request-id"] == "abc"
        assert counted(service, "beamline_requests_total", outcome=Outcome.QUEUE_FULL) == 1
        labels = {"grpc_service": "beamline.v1.GenerationService", "grpc_method": method}
        labels["grpc_type"] = "server_stream" if method == "GenerateStream" else "unary"
        assert counted(service, "grpc_server_started_total", **labels) == 1
        assert counted(service, "grpc_server_handled_total", **labels, grpc_code="RESOURCE_EXHAUSTED") == 1


async def test_other_methods_are_let_in() -> None:
    async with serving() as service:
        service.engine.foreseen = QueueFull(9, 8, 0.5)
        assert (await service.stub.GetInfo(pb.GetInfoRequest())).model.name == "test-model"


async def test_calls_are_let_in_again_when_there_is_room() -> None:
    async with serving() as service:
        for foreseen in (None, QueueFull(9, 8, 0.5), None):
            service.engine.foreseen = foreseen
            if foreseen is None:
                assert len((await service.stub.Generate(REQUEST)).results) == 1
            else:
                await failure_of(service.stub.Generate(REQUEST))


@pytest.mark.parametrize(("timeout_s", "expected_s"), [(None, 30), (1e4, 30), (10, 10)])
async def test_the_engine_is_told_how_much_time_there_is(timeout_s: float | None, expected_s: float) -> None:
    async with serving(settings=Settings(max_duration_s=30)) as service:
        await service.stub.Generate(REQUEST, timeout=timeout_s)
        assert service.engine.remaining_s == [pytest.approx(expected_s, abs=2)]


@pytest.mark.parametrize(
    ("key", "caller"), [(None, "ipv4:127.0.0.1:"), ("x-team", "blue"), ("x-other", "ipv4:127.0.0.1:")]
)
async def test_the_engine_is_told_who_asks(key: str | None, caller: str) -> None:
    async with serving(settings=Settings(caller_metadata=key), script=silent) as service:
        call = service.stub.Generate(REQUEST, metadata=[("x-team", "blue")])
        [request] = await service.engine.submitted()
        assert request.caller.startswith(caller)
        assert service.engine.callers == [request.caller]
        call.cancel()


async def test_a_call_that_comes_after_its_deadline_is_counted_as_late_and_not_as_refused() -> None:
    async with serving() as service:
        gate = gate_of(service, ManualClock())
        status = gate(b"/x", At(0.0))
        assert status is not None
        assert (status.code, status.outcome) == (CODE.DEADLINE_EXCEEDED, Outcome.DEADLINE)
        assert counted(service, "beamline_requests_total", outcome=Outcome.DEADLINE) == 1
        assert service.engine.remaining_s == []


def gate_of(service: RunningService, clock: ManualClock) -> Gate:
    """A gate in front of a method "/x"."""
    methods = {b"/x": service.metrics.method(MethodName("a", "b", "unary"))}
    jitter = random.Random(0)
    return Gate(
        service.desk,
        methods,
        service.metrics,
        most_generating=MOST_GENERATING,
        most_open={b"/few": 1},
        max_duration_s=30,
        caller_key=None,
        jitter=jitter,
        clock=clock,
    )


class At:
    """A context of a call with so much time."""

    def __init__(self, remaining_s: float, metadata: Sequence[tuple[str, str]] = (), *, caller: int = 1) -> None:
        self._caller = caller
        self._remaining_s = remaining_s
        self._metadata = metadata
        self._trailers: tuple[tuple[str, str], ...] = ()
        self.ended_with: tuple[grpc.StatusCode, str] | None = None

    async def abort(self, code: grpc.StatusCode, text: str, trailers: object) -> None:
        del trailers
        self.ended_with = (code, text)

    def time_remaining(self) -> float:
        return self._remaining_s

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._metadata

    def peer(self) -> str:
        return f"ipv4:10.0.0.1:{self._caller}"

    def set_trailing_metadata(self, trailers: tuple[tuple[str, str], ...]) -> None:
        self._trailers = trailers

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._trailers


async def test_who_is_in_the_doorway_counts_as_ahead_and_how_long_the_last_one_was_there_as_time_that_is_gone() -> None:
    clock = ManualClock()
    async with serving() as service:
        gate = gate_of(service, clock)
        calls = [At(10) for _ in range(6)]
        came = []
        for call in calls[:3]:
            assert gate(b"/x", call) is None
            came.append(clock.now)
            clock.now += 0.25
        assert gate.entered("/x", calls[0]) == came[0]
        assert gate(b"/x", calls[3]) is None
        clock.now += 0.25
        assert gate.entered("/x", calls[1]) == came[1]
        assert gate(b"/x", calls[4]) is None
        clock.now += 100
        assert gate(b"/x", calls[5]) is None
        assert service.engine.ahead == [0, 1, 2, 2, 2, 0]
        assert service.engine.remaining_s == pytest.approx([10, 10, 10, 8.5, 8.5, 10])
        assert gate(b"/y", At(0)) is None


async def test_who_never_enters_takes_nobodys_time() -> None:
    """A caller may begin a call and send no message."""
    clock = ManualClock()
    async with serving() as service:
        gate = gate_of(service, clock)
        stays_away, slow = At(10), At(10)
        assert gate(b"/x", stays_away) is None
        assert gate(b"/x", slow) is None
        for _ in range(3):
            clock.now += 1
            call = At(1)
            assert gate(b"/x", call) is None
            assert gate.entered("/x", call) == clock.now
        assert gate.entered("/x", slow) == clock.now
        assert service.engine.ahead == [0, 1, 2, 0, 0]
        assert service.engine.remaining_s == pytest.approx([10, 10, 1, 1, 1])


async def test_who_has_no_time_left_is_ahead_of_nobody_and_leaves_its_place() -> None:
    """gRPC has ended such a call, and tells nobody, if it has not sent its message."""
    clock = ManualClock()
    async with serving() as service:
        gate = gate_of(service, clock)
        slow, gone = At(1), [At(1 if number else 1.5, caller=number) for number in range(PLACES)]
        await at_places(gate, [slow])
        clock.now += 0.9
        gate.entered("/x", slow)
        await at_places(gate, gone)
        clock.now += 1.0
        assert gate(b"/x", At(1)) is None
        assert service.engine.ahead[-1] == 1
        assert gate.turn(b"/x") is None
        clock.now += 0.5
        assert gate(b"/x", At(1)) is None
        assert service.engine.ahead[-1] == 1
        assert service.engine.remaining_s[-1] == pytest.approx(1)


async def test_how_long_one_was_in_the_doorway_says_nothing_when_as_long_has_passed_since() -> None:
    clock = ManualClock()
    async with serving() as service:
        gate = gate_of(service, clock)
        slow, silent_one = At(10), At(10)
        assert gate(b"/x", slow) is None
        clock.now += 0.5
        assert gate.entered("/x", slow) == clock.now - 0.5
        assert gate(b"/x", silent_one) is None
        for after_s in (0.4, 0.2):
            clock.now += after_s
            assert gate(b"/x", At(1)) is None
        assert service.engine.remaining_s == pytest.approx([10, 10, 0, 1])


async def test_who_has_not_come_by_the_gate_comes_when_it_enters() -> None:
    clock = ManualClock()
    async with serving() as service:
        assert gate_of(service, clock).entered("/x", At(1)) == clock.now


async def test_a_call_that_sends_nothing_leaves_no_trace_for_the_next() -> None:
    async with serving() as service:
        unfinished = service.channel.stream_unary("/beamline.v1.GenerationService/Generate")(timeout=30)
        while not service.engine.ahead:  # noqa: ASYNC110 - the gate has no event
            await asyncio.sleep(0)
        unfinished.cancel()
        for _ in range(3):
            assert len((await service.stub.Generate(REQUEST, timeout=5)).results) == 1
        assert service.engine.ahead == [0, 1, 0, 0]


async def at_places(gate: Gate, calls: Sequence[At]) -> None:
    """Let some calls in, up to where they may send."""
    for call in calls:
        assert gate(b"/x", call) is None
        if (turn := gate.turn(b"/x")) is not None:
            await turn
        gate.may_send(b"/x", call)


async def test_as_many_as_there_are_places_send_at_a_time() -> None:
    clock = ManualClock()
    async with serving() as service:
        gate = gate_of(service, clock)
        sending = [At(10, caller=number) for number in range(PLACES)]
        await at_places(gate, sending)
        coming = asyncio.create_task(at_places(gate, [At(10), At(10)]))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not coming.done()
        gate.entered("/x", sending[7])
        gate.entered("/x", sending[1])
        await coming
        assert {call.ended_with for call in sending} == {None}


@pytest.mark.parametrize(("callers", "time_to_send_s"), [(PLACES, 5.0), (2, 1.0)])
async def test_who_has_taken_long_gives_its_place_up_to_others(callers: int, time_to_send_s: float) -> None:
    clock = ManualClock()
    async with serving() as service:
        gate = gate_of(service, clock)
        sending = [At(100, caller=number % callers) for number in range(PLACES)]
        await at_places(gate, sending[:1])
        clock.now += 0.5
        await at_places(gate, sending[1:])
        clock.now += time_to_send_s - 0.5
        await at_places(gate, [At(100, caller=99)])
        clock.now += 0.49
        coming = asyncio.create_task(at_places(gate, [At(100, caller=99)]))
        for _ in range(3):
            await asyncio.sleep(0)
        assert [call.ended_with is not None for call in sending] == [True] + [False] * (PLACES - 1)
        assert sending[0].ended_with == (
            CODE.RESOURCE_EXHAUSTED,
            "the request has taken too long to come, and others wait to send theirs",
        )
        assert counted(service, "beamline_requests_total", outcome=Outcome.CANCELLED) == 1
        assert not coming.done()
        gate.entered("/x", sending[1])
        await coming


async def calls_that_send_nothing(service: RunningService, number: int) -> list[Any]:
    """So many, all of which have been let in."""
    method = service.channel.stream_unary("/beamline.v1.GenerationService/Generate")
    calls = [method(timeout=30) for _ in range(number)]
    while len(service.engine.ahead) < number:  # noqa: ASYNC110 - the gate has no event
        await asyncio.sleep(0)
    return calls


async def test_calls_that_send_nothing_hold_others_up_for_a_moment_only(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as service:
        silent_ones = await calls_that_send_nothing(service, PLACES)
        assert len((await service.stub.Generate(REQUEST, timeout=20)).results) == 1
        [ended] = [call for call in silent_ones if call.done()]
        error = await failure_of(ended)
        assert error.code == CODE.RESOURCE_EXHAUSTED
        assert error.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        for call in silent_ones:
            call.cancel()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_health_checks_do_not_wait_for_those_who_send_nothing() -> None:
    """Nor do refusals: whoever decides does not wait for places."""
    async with serving() as service:
        silent_ones = await calls_that_send_nothing(service, PLACES + 100)
        check = health_pb2_grpc.HealthStub(service.channel).Check
        for _ in range(2 * OTHER_PLACES):
            assert (
                await check(health_pb2.HealthCheckRequest(), timeout=5)
            ).status == health_pb2.HealthCheckResponse.SERVING
        service.engine.foreseen = QueueFull(9, 8, 0.5)
        assert (await failure_of(service.stub.Generate(REQUEST, timeout=5))).text.startswith("the queue is full")
        for call in silent_ones:
            call.cancel()


async def test_one_who_has_most_places_does_not_keep_theirs_for_others() -> None:
    clock = ManualClock()
    async with serving() as service:
        gate = gate_of(service, clock)
        silent_ones = [At(100, caller=number) for number in range(PLACES - 9)]
        await at_places(gate, silent_ones)
        clock.now += 5
        await at_places(gate, [At(100, caller=1000) for _ in range(9)])
        await at_places(gate, [At(100, caller=1000)])
        await asyncio.sleep(0)
        assert silent_ones[0].ended_with is not None
        assert silent_ones[1].ended_with is None


async def test_a_call_that_is_put_out_is_not_handled_as_well() -> None:
    clock = ManualClock()
    async with serving() as service:
        gate = gate_of(service, clock)
        calls = [At(100, caller=number) for number in range(PLACES)]
        await at_places(gate, calls)
        clock.now += 5
        turn = gate.turn(b"/x")
        assert turn is not None
        turn.add_done_callback(lambda _: entered.append(gate.entered("/x", calls[0])))
        entered: list[float | None] = []
        await turn
        assert entered == [None]


async def test_a_server_that_stops_says_so_before_a_request_is_read() -> None:
    async with serving() as service:
        service.desk.close()
        error = await failure_of(service.channel.unary_unary("/beamline.v1.GenerationService/Generate")(UNREAD))
        assert error.code == CODE.UNAVAILABLE
        assert error.detail(error_details_pb2.ErrorInfo).reason == "DRAINING"


async def test_of_each_method_so_many_calls_are_open_at_a_time() -> None:
    async with serving() as service:
        gate = gate_of(service, ManualClock())
        for path, most in ((b"/x", MOST_GENERATING), (b"/y", MOST_OPEN), (b"/few", 1)):
            calls = [At(10) for _ in range(most)]
            for call in calls:
                assert gate(path, call) is None
                gate.entered(path.decode(), call)
            status = gate(path, At(10))
            assert status is not None
            assert status.code == CODE.RESOURCE_EXHAUSTED
            assert status.text == "too many calls of this method are open"
            gate.left(path.decode())
            assert gate(path, At(10)) is None


LARGE = [(f"k{number}", "v" * 1000) for number in range(20)]


async def test_metadata_that_is_too_large_is_refused_by_any_method() -> None:
    """Also of callers whom gRPC does not stop, because they do not acknowledge its limit."""
    async with serving() as service:
        gate = gate_of(service, ManualClock())
        for path in (b"/x", b"/y", None):
            status = gate(path, At(10, LARGE))
            assert status is not None
            assert (status.code, status.outcome) == (CODE.INVALID_ARGUMENT, Outcome.INVALID)
        assert counted(service, "beamline_requests_total", outcome=Outcome.INVALID) == 1
        assert service.engine.remaining_s == []
        assert gate(b"/x", At(10, LARGE[:10])) is None


async def test_a_server_that_is_not_ready_says_so_itself() -> None:
    async with serving(ready=False) as service:
        assert (await failure_of(service.stub.Generate(REQUEST))).code == CODE.UNAVAILABLE
