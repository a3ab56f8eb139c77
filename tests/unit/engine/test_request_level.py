"""Request-level batching, which continuous batching is compared with: the same answers, in batches nobody joins."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_server.engine.admission import Admission, Capacity, Continuous, RequestLevel, Room, Waiting
from beamline_server.engine.errors import DeadlineExceeded, EngineStopped, RequestCancelled
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import Completed, Event, Failed, GenerationRequest, Piece, RequestId, SearchOptions
from beamline_server.engine.step import Clock, EngineCore
from beamline_server.engine.workers import Engine
from doubles.engine import (
    Inbox,
    ManualClock,
    RandomTable,
    TableBackend,
    run_alone,
    table_rules,
)

RULES = table_rules(8)
TABLE = RandomTable(8)
LONG_S = 1e6
"""A delay that no test waits for."""


def request(
    number: int, *, beams: int = 1, tokens: int = 6, source_tokens: int = 3, deadline: float | None = None
) -> GenerationRequest:
    """A request that generates exactly so many tokens; its source tells it from all others."""
    options = SearchOptions(beam_size=beams, n_best=beams, min_new_tokens=tokens, max_new_tokens=tokens)
    return GenerationRequest(RequestId(number), (*range(source_tokens - 1), number), options, deadline)


def outcomes(events: Sequence[Event]) -> dict[int, Completed | Failed]:
    ends = [event for event in events if not isinstance(event, Piece)]
    assert max(Counter(end.id for end in ends).values(), default=1) == 1, "a request has more than one outcome"
    return {end.id: end for end in ends}


def error_of(outcome: Completed | Failed) -> Exception:
    assert isinstance(outcome, Failed)
    return outcome.error


def assert_as_alone(outcome: Completed | Failed, asked: GenerationRequest) -> None:
    expected = run_alone(TableBackend(TABLE, RULES), RULES, asked)
    assert isinstance(outcome, Completed)
    assert isinstance(expected, Completed)
    assert outcome.hypotheses == expected.hypotheses


# -- the decision -----------------------------------------------------------------------------------------------------


def test_a_batch_that_is_not_full_waits_from_the_arrival_of_its_first() -> None:
    policy = RequestLevel(max_batch=4, max_delay_s=0.5)
    assert policy.opens_at(Waiting(queued=1, oldest_at=10.0, running=0)) == 10.5
    assert policy.opens_at(Waiting(queued=3, oldest_at=10.0, running=0)) == 10.5


def test_a_full_batch_waits_no_longer() -> None:
    policy = RequestLevel(max_batch=4, max_delay_s=0.5)
    assert policy.opens_at(Waiting(queued=4, oldest_at=10.0, running=0)) == -math.inf
    assert policy.opens_at(Waiting(queued=9, oldest_at=10.0, running=0)) == -math.inf


@pytest.mark.parametrize("queued", [1, 4, 99])
def test_nobody_joins_a_batch_that_runs(queued: int) -> None:
    assert RequestLevel(4, 0.5).opens_at(Waiting(queued, oldest_at=10.0, running=1)) == math.inf


def test_continuous_batching_never_waits() -> None:
    for running in (0, 3):
        assert Continuous().opens_at(Waiting(queued=1, oldest_at=10.0, running=running)) == -math.inf


def test_a_batch_is_encoded_together_however_long_its_sources_are() -> None:
    queue = [request(number, source_tokens=300) for number in range(9)]
    room = Room(64, 1 << 20)
    assert RequestLevel(8, 0.5).starters(queue, room, encode_tokens=1000) == queue[:8]
    assert Continuous().starters(queue, room, encode_tokens=1000) == queue[:3]


def test_a_batch_is_no_larger_than_there_is_room_for() -> None:
    queue = [request(number, beams=4) for number in range(9)]
    assert RequestLevel(8, 0.5).starters(queue, Room(12, 1 << 20), encode_tokens=1000) == queue[:3]


# -- one worker, stepped by hand --------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A core with what it stands on."""

    admission: Admission
    rows: int = 64
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        self.backend = TableBackend(TABLE, RULES)
        self.core = EngineCore(
            self.backend,
            RULES,
            Capacity(self.rows, 1 << 16),
            clock=self.clock,
            observer=NullObserver(),
            admission=self.admission,
        )

    def step(self, *, then_s: float = 0.0) -> list[Event]:
        events = self.core.step()
        self.core.check()
        self.clock.advance(then_s)
        return events


def test_an_empty_worker_waits_for_the_delay_and_no_longer() -> None:
    bench = Bench(RequestLevel(4, 0.5))
    bench.clock.advance(10.0)
    bench.core.accept([request(1)])
    assert bench.core.rests_until == 10.5
    assert bench.step(then_s=0.25) == []
    bench.core.accept([request(2)])
    assert bench.core.rests_until == 10.5
    assert bench.step(then_s=0.25) == []
    assert bench.backend.encoded == []
    bench.step()
    assert [len(batch) for batch in bench.backend.encoded] == [2]
    assert bench.core.rests_until == -math.inf


def test_an_empty_worker_starts_a_full_batch_at_once() -> None:
    bench = Bench(RequestLevel(4, LONG_S))
    bench.core.accept([request(number) for number in range(5)])
    assert bench.core.rests_until == -math.inf
    bench.step()
    assert (bench.core.running_requests, bench.core.queued_requests) == (4, 1)


def test_nobody_starts_before_all_of_a_batch_have_ended_and_their_rows_go_as_they_end() -> None:
    bench = Bench(RequestLevel(2, LONG_S))
    bench.core.accept([request(1, tokens=2), request(2, tokens=5), request(3, tokens=1), request(4, tokens=1)])
    told = [sorted(outcomes(bench.step())) for _ in range(6)]
    assert told == [[], [1], [], [], [2], [3, 4]]
    assert [step.rows for step in bench.backend.trace] == [2, 2, 1, 1, 1, 2]


def test_a_worker_with_nothing_to_do_rests_for_nothing() -> None:
    """`idle` tells that there is nothing; how long to wait for a message is then nobody's question."""
    assert Bench(RequestLevel(4, 0.5)).core.rests_until == -math.inf


def test_a_continuous_worker_never_rests() -> None:
    bench = Bench(Continuous())
    bench.core.accept([request(1)])
    assert bench.core.rests_until == -math.inf
    bench.step()
    assert bench.core.running_requests == 1


def test_a_request_can_be_cancelled_while_its_batch_fills() -> None:
    bench = Bench(RequestLevel(2, LONG_S))
    bench.core.accept([request(1)])
    bench.core.cancel([RequestId(1)])
    assert isinstance(error_of(outcomes(bench.step())[1]), RequestCancelled)
    assert bench.core.idle


def test_a_deadline_ends_a_request_while_its_batch_fills() -> None:
    bench = Bench(RequestLevel(2, LONG_S))
    bench.core.accept([request(1, deadline=3.0)])
    assert bench.core.rests_until == 3.0
    bench.clock.advance(3.0)
    assert error_of(outcomes(bench.step())[1]) == DeadlineExceeded("queueing")
    assert bench.core.idle


def test_a_deadline_of_one_who_is_gone_wakes_once() -> None:
    bench = Bench(RequestLevel(3, LONG_S))
    bench.core.accept([request(1, deadline=3.0), request(2)])
    bench.core.cancel([RequestId(1)])
    bench.step(then_s=3.0)
    assert bench.core.rests_until == 3.0
    assert bench.step() == []
    assert bench.core.rests_until == LONG_S


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[int, GenerationRequest]]:
    """Requests and the steps at which they come."""
    result = []
    for number in range(draw(st.integers(1, 14))):
        beams = draw(st.integers(1, 6))
        options = SearchOptions(beam_size=beams, n_best=beams, max_new_tokens=draw(st.sampled_from([1, 3, 8, 25])))
        source = (*range(draw(st.sampled_from([0, 2, 9, 70]))), number)
        result.append((draw(st.integers(0, 12)), GenerationRequest(RequestId(number), source, options)))
    return result


@given(traffic(), st.integers(1, 5), st.sampled_from([0.0, 2.0, LONG_S]))
@settings(max_examples=6 * settings().max_examples // 10)
def test_answers_are_those_of_continuous_batching(
    coming: list[tuple[int, GenerationRequest]], max_batch: int, max_delay_s: float
) -> None:
    def answered(admission: Admission) -> dict[int, Completed | Failed]:
        bench, events = Bench(admission, rows=24), list[Event]()
        for step in range(13):
            bench.core.accept([asked for at, asked in coming if at == step])
            events += bench.step(then_s=1.0)
        return outcomes(events + run_out(bench))

    by_batches, continuous = answered(RequestLevel(max_batch, max_delay_s)), answered(Continuous())
    assert sorted(by_batches) == sorted(continuous) == [asked.id for _, asked in coming]
    for number, outcome in by_batches.items():
        expected = continuous[number]
        assert isinstance(outcome, Completed)
        assert isinstance(expected, Completed)
        assert outcome.hypotheses == expected.hypotheses


def run_out(bench: Bench) -> list[Event]:
    """Step until nothing is left, letting time pass whenever a batch waits."""
    events: list[Event] = []
    while not bench.core.idle:
        if math.isfinite(bench.core.rests_until):
            bench.clock.advance(LONG_S)
        events += bench.step()
    return events


# -- with its thread --------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A started engine and what it tells."""

    engine: Engine
    inbox: Inbox
    clock: ManualClock

    def outcome(self, number: int) -> Completed | Failed:
        return self.inbox.wait_for(RequestId(number))


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts engines and leaves no thread behind."""
    engines: list[Engine] = []

    def started(admission: Admission, *, workers: int = 1, clock: Clock | None = None) -> Running:
        inbox, manual, backend = Inbox(), ManualClock(), TableBackend(TABLE, RULES)
        engine = Engine(
            [backend] * workers,
            RULES,
            Capacity(64, 1 << 20),
            queue_rows=1000,
            deliver=inbox,
            observer=NullObserver(),
            clock=clock or manual,
            admission=admission,
        )
        engines.append(engine)
        engine.start()
        return Running(engine, inbox, manual)

    yield started
    for engine in engines:
        engine.stop(0)


def test_a_worker_wakes_when_its_batch_is_full(start: Start) -> None:
    running = start(RequestLevel(2, LONG_S))
    running.engine.submit([request(1)])
    running.engine.submit([request(2)])
    assert_as_alone(running.outcome(1), request(1))
    assert_as_alone(running.outcome(2), request(2))


def test_a_worker_wakes_by_itself_when_the_delay_is_over(start: Start) -> None:
    running = start(RequestLevel(2, 0.001), clock=time.monotonic)
    running.engine.submit([request(1)])
    assert_as_alone(running.outcome(1), request(1))


def test_a_cancellation_reaches_a_worker_that_waits(start: Start) -> None:
    running = start(RequestLevel(2, LONG_S))
    running.engine.submit([request(1)])
    running.engine.cancel([RequestId(1)])
    assert isinstance(error_of(running.outcome(1)), RequestCancelled)


def test_a_deadline_passes_while_a_worker_waits(start: Start) -> None:
    running = start(RequestLevel(3, LONG_S))
    running.engine.submit([request(1, deadline=3.0), request(2)])
    running.clock.advance(3.0)
    running.engine.submit([request(3, deadline=LONG_S)])
    assert error_of(running.outcome(1)) == DeadlineExceeded("queueing")


def test_a_worker_wakes_by_itself_for_a_deadline(start: Start) -> None:
    running = start(RequestLevel(2, LONG_S), clock=time.monotonic)
    running.engine.submit([request(1, deadline=time.monotonic() + 0.001)])
    assert error_of(running.outcome(1)) == DeadlineExceeded("queueing")


@pytest.mark.parametrize("max_delay_s", [LONG_S, 1e12, math.inf])
def test_stopping_without_grace_ends_the_wait(start: Start, max_delay_s: float) -> None:
    running = start(RequestLevel(2, max_delay_s))
    running.engine.submit([request(1)])
    running.engine.stop(0)
    running.engine.check()
    assert isinstance(error_of(running.outcome(1)), EngineStopped)


def test_stopping_with_grace_lets_the_last_batch_start(start: Start) -> None:
    running = start(RequestLevel(8, 0.001), workers=2, clock=time.monotonic)
    asked = [request(number, beams=2) for number in range(10)]
    running.engine.submit(asked)
    running.engine.stop(60)
    running.engine.check()
    for each in asked:
        assert_as_alone(running.outcome(each.id), each)


@pytest.mark.parametrize("seed", range(3))
def test_everybody_gets_one_outcome(start: Start, seed: int) -> None:
    rng = random.Random(seed)
    running = start(RequestLevel(4, 0.0005), workers=2, clock=time.monotonic)
    asked = [request(number, beams=rng.randint(1, 8), tokens=rng.randint(1, 12)) for number in range(60)]
    cancelled = {each.id for each in asked if rng.random() < 0.3}
    for each in asked:
        running.engine.submit([each])
        if each.id in cancelled:
            running.engine.cancel([each.id])
    running.engine.stop(60)
    running.engine.check()
    ends = running.inbox.outcomes()
    assert sorted(ends) == [each.id for each in asked]
    for each in asked:
        outcome = ends[each.id]
        if isinstance(outcome, Failed):
            assert each.id in cancelled
            assert isinstance(outcome.error, RequestCancelled)
        else:
            assert_as_alone(outcome, each)
