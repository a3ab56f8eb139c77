"""The desk: every request has one outcome, and the engine is never kept waiting."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from beamline_server.engine.errors import QueueFull, RequestCancelled
from beamline_server.engine.request import Completed, Event, Failed, Piece, RequestId, SearchOptions
from beamline_server.rpc.call import Call
from beamline_server.rpc.desk import Desk, Source
from beamline_server.rpc.errors import NotAccepting
from doubles.service import ScriptedEngine, make_completed, silent

CALL = Call(arrived_s=0, deadline_s=10)
SOURCES = [
    Source((1, 2), truncated=False, options=SearchOptions()),
    Source((3,), truncated=False, options=SearchOptions(max_new_tokens=9), target_prefix=(7, 8)),
]


@pytest.fixture
async def desk() -> Desk:
    return Desk(asyncio.get_running_loop())


@pytest.fixture
async def engine(desk: Desk) -> ScriptedEngine:
    engine = ScriptedEngine(desk.deliver, silent)
    desk.open(engine)
    return engine


async def test_answers_come_in_the_order_of_the_sources(desk: Desk, engine: ScriptedEngine) -> None:
    asked = asyncio.create_task(desk.ask(SOURCES, CALL))
    first, second = await engine.submitted()
    assert (first.source, second.source, first.deadline) == ((1, 2), (3,), 10)
    assert (first.target_prefix, second.target_prefix) == ((), (7, 8))
    assert (first.options, second.options) == (SearchOptions(), SearchOptions(max_new_tokens=9))
    engine.tell(make_completed(second.id, [20]))
    engine.tell(make_completed(first.id, [10]))
    assert [answer.hypotheses[0].tokens for answer in await asked] == [(10,), (20,)]
    assert desk.in_flight == 0


async def test_ids_are_never_used_twice(desk: Desk, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [make_completed(request.id, [1])]
    await asyncio.gather(*(desk.ask(SOURCES, CALL) for _ in range(10)))
    ids = [request.id for _ in range(10) for request in await engine.submitted()]
    assert len(set(ids)) == 20


async def test_events_of_one_step_take_one_call_to_the_loop(engine: ScriptedEngine) -> None:
    calls = 0

    class Loop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *arguments: object, **options: object) -> asyncio.Handle:
            nonlocal calls
            calls += 1
            return super().call_soon_threadsafe(*arguments, **options)  # type: ignore[arg-type]  # passed through

    loop = Loop()
    Desk(loop).deliver([Piece(RequestId(i), (1,)) for i in range(100)])
    loop.close()
    assert calls == 1


async def test_events_may_come_from_any_thread(desk: Desk, engine: ScriptedEngine) -> None:
    asked = asyncio.create_task(desk.ask(SOURCES[:1], CALL))
    [request] = await engine.submitted()
    thread = threading.Thread(target=engine.tell, args=[make_completed(request.id, [5])])
    thread.start()
    assert (await asked)[0].hypotheses[0].tokens == (5,)
    thread.join()


async def test_events_after_the_end_of_the_loop_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    Desk(loop).deliver([Failed(RequestId(1), RequestCancelled())])


async def test_outcomes_of_strangers_and_second_outcomes_change_nothing(desk: Desk, engine: ScriptedEngine) -> None:
    asked = asyncio.create_task(desk.ask(SOURCES[:1], CALL))
    [request] = await engine.submitted()
    stranger = RequestId(request.id + 1000)
    engine.tell(make_completed(stranger, [1]), make_completed(request.id, [5]), make_completed(request.id, [6]))
    assert (await asked)[0].hypotheses[0].tokens == (5,)


async def test_what_the_engine_refuses_is_not_in_flight(desk: Desk, engine: ScriptedEngine) -> None:
    engine.refusal = QueueFull(1, 1, 0.1)
    with pytest.raises(QueueFull):
        await desk.ask(SOURCES, CALL)
    assert desk.in_flight == 0


async def test_a_cancelled_call_cancels_its_requests_and_leaves_the_answered_ones(
    desk: Desk, engine: ScriptedEngine
) -> None:
    asked = asyncio.create_task(desk.ask(SOURCES, CALL))
    first, second = await engine.submitted()
    engine.tell(make_completed(first.id, [1]))
    await asyncio.sleep(0)  # the loop routes the event
    asked.cancel()
    assert await engine.cancelled() == [second.id]
    with pytest.raises(asyncio.CancelledError):
        await asked


async def test_a_slow_reader_gets_pieces_merged(desk: Desk, engine: ScriptedEngine) -> None:
    with desk.stream(SOURCES[0], CALL) as tokens:
        [request] = await engine.submitted()
        for token in range(1000):
            engine.tell(Piece(request.id, (token,)))
        assert await tokens.next() == tuple(range(1000))
        engine.tell(Piece(request.id, (1000,)))
        engine.tell(make_completed(request.id, range(1001)))
        await asyncio.sleep(0)  # the loop routes both
        assert isinstance(await tokens.next(), Completed)


async def test_a_stream_that_ended_is_not_cancelled(desk: Desk, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [make_completed(request.id, [1])]
    with desk.stream(SOURCES[0], CALL) as tokens:
        await tokens.next()
    engine.cancel([])
    assert await engine.cancelled() == []


async def test_a_closed_desk_refuses_and_drains(desk: Desk, engine: ScriptedEngine) -> None:
    asked = asyncio.create_task(desk.ask(SOURCES[:1], CALL))
    [request] = await engine.submitted()
    desk.close()
    with pytest.raises(NotAccepting, match="draining"):
        await desk.ask(SOURCES, CALL)
    drained = asyncio.create_task(desk.drained())
    await asyncio.sleep(0)
    assert not drained.done()
    engine.tell(make_completed(request.id, [1]))
    await asked
    await drained


async def test_draining_waits_for_the_engine_to_let_go_of_what_was_cancelled(
    desk: Desk, engine: ScriptedEngine
) -> None:
    class Late(ScriptedEngine):
        def cancel(self, ids: Sequence[RequestId]) -> None:
            pass

    late = Late(desk.deliver, silent)
    desk.open(late)
    asked = asyncio.create_task(desk.ask(SOURCES[:1], CALL))
    [request] = await late.submitted()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    desk.close()
    assert desk.in_flight == 1
    outcome: Event = Failed(request.id, RequestCancelled())
    late.tell(outcome)
    await desk.drained()
