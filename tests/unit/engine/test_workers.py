"""The engine with its threads: nobody waits for ever, nobody is told twice. Nothing here sleeps."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import Backend
from beamline_server.engine.errors import (
    DeadlineExceeded,
    EngineError,
    EngineStopped,
    QueueFull,
    RequestCancelled,
    RequestTooLarge,
    SourceTooLong,
    StepFailed,
    WouldBeLate,
)
from beamline_server.engine.observer import NullObserver, StepObserver
from beamline_server.engine.request import Completed, Failed, GenerationRequest, Piece, RequestId, SearchOptions
from beamline_server.engine.step import Clock
from beamline_server.engine.workers import Engine
from doubles.core import request
from doubles.engine import (
    Faults,
    Gate,
    Inbox,
    ManualClock,
    RandomTable,
    TableBackend,
    run_alone,
    table_rules,
)
from doubles.memory import Tokens

RULES = table_rules(8, max_source_tokens=50)
TABLE = RandomTable(8)
FOR_EVER = 100_000
"""Tokens that nobody waits for."""


def backend(*, gate: Gate | None = None, faults: Faults | None = None) -> TableBackend:
    return TableBackend(TABLE, RULES, gate=gate, faults=faults)


@dataclass
class Running:
    """A started engine and what it tells."""

    engine: Engine
    inbox: Inbox

    def submit(self, *requests: GenerationRequest) -> None:
        self.engine.submit(requests)

    def outcome(self, number: int) -> Completed | Failed:
        return self.inbox.wait_for(RequestId(number))

    def error(self, number: int) -> EngineError:
        outcome = self.outcome(number)
        assert isinstance(outcome, Failed)
        return outcome.error

    def finish(self) -> dict[RequestId, Completed | Failed]:
        """Let the engine finish its work and stop; the outcome of every request, which must be one."""
        self.engine.stop(1e9)
        self.engine.check()
        return self.inbox.outcomes()


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts engines and leaves no thread behind."""
    gates: list[Gate] = []
    engines: list[Engine] = []

    def started(
        *backends: TableBackend,
        gate: Gate | None = None,
        rows: int = 64,
        queue_rows: int = 64,
        clock: Clock | None = None,
        observer: StepObserver | None = None,
    ) -> Running:
        inbox = Inbox()
        engine = Engine(
            backends or [backend(gate=gate)],
            RULES,
            Capacity(rows, 1 << 30),
            queue_rows=queue_rows,
            deliver=inbox,
            observer=observer or NullObserver(),
            clock=clock or ManualClock(),
        )
        gates.extend([gate] if gate else [])
        engines.append(engine)
        engine.start()
        return Running(engine, inbox)

    yield started
    for gate in gates:
        gate.open()
    for engine in engines:
        engine.stop(0)


def tokens_of(outcome: Completed | Failed) -> Tokens:
    assert isinstance(outcome, Completed)
    return outcome.hypotheses[0].tokens


def tokens_alone(asked: GenerationRequest) -> Tokens:
    return tokens_of(run_alone(backend(), RULES, asked))


# -- submitting -------------------------------------------------------------------------------------------------------


def test_a_request_is_answered(start: Start) -> None:
    running = start()
    running.submit(request(1, beams=4))
    assert tokens_of(running.outcome(1)) == tokens_alone(request(1, beams=4))
    assert list(running.finish()) == [1]


def test_an_engine_that_was_idle_serves_again(start: Start) -> None:
    running = start()
    for number in range(5):
        running.submit(request(number))
        assert isinstance(running.outcome(number), Completed)
    assert len(running.finish()) == 5


def test_a_stream_tells_its_pieces_before_its_end(start: Start) -> None:
    running = start()
    running.submit(request(1, stream=True))
    best = tokens_of(running.outcome(1))
    assert running.inbox.pieces(RequestId(1)) == [(token,) for token in best[:-1]]


@pytest.mark.parametrize(
    ("refused", "error"),
    [
        pytest.param(request(2, source_tokens=51), SourceTooLong(51, 50), id="source"),
        pytest.param(request(2, beams=9), RequestTooLarge("rows", 9, 8), id="rows"),
    ],
)
def test_one_request_that_could_never_run_refuses_all(
    start: Start, refused: GenerationRequest, error: EngineError
) -> None:
    running = start(rows=8)
    with pytest.raises(type(error)) as caught:
        running.submit(request(1), refused, request(3))
    assert caught.value == error
    assert running.finish() == {}


def test_more_than_the_queue_could_ever_hold_is_too_large_and_not_too_early(start: Start) -> None:
    """Who is told to come back later must have a chance then."""
    running = start(rows=4, queue_rows=4)
    with pytest.raises(RequestTooLarge) as caught:
        running.submit(*(request(number) for number in range(9)))
    assert caught.value == RequestTooLarge("rows", 9, 8)
    running.submit(*(request(number) for number in range(8)))
    assert len(running.finish()) == 8


def test_a_full_queue_refuses_at_once_and_as_a_whole(start: Start) -> None:
    gate = Gate()
    running = start(gate=gate, rows=4, queue_rows=4)
    running.submit(request(1, beams=4))
    running.submit(request(2, beams=3))
    with pytest.raises(QueueFull) as caught:
        running.submit(request(3), request(4))
    assert (caught.value.queued_rows, caught.value.limit_rows) == (3, 4)
    assert 0.02 <= caught.value.retry_after_s <= 5.0
    running.submit(request(5))
    gate.open()
    assert sorted(running.finish()) == [1, 2, 5]


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.5, 30.0, 1e6])
def test_the_advice_when_to_come_back_is_within_bounds_at_any_pace(start: Start, seconds: float) -> None:
    gate, clock = Gate(), ManualClock()
    gate.open()
    running = start(gate=gate, rows=4, queue_rows=0, clock=clock)
    for number in range(5):
        running.submit(request(number, beams=4))
        running.outcome(number)
        clock.advance(seconds)
    running.submit(request(10, beams=4, tokens=FOR_EVER))
    with pytest.raises(QueueFull) as caught:
        running.submit(request(11, beams=2))
    assert 0.02 <= caught.value.retry_after_s <= 5.0


def test_room_is_free_again_when_a_request_has_been_answered(start: Start) -> None:
    running = start(rows=4, queue_rows=0)
    for number in range(20):
        running.submit(request(number, beams=4))
        running.outcome(number)
    assert len(running.finish()) == 20


def test_load_tells_who_runs_and_who_waits(start: Start) -> None:
    gate = Gate()
    running = start(gate=gate, rows=4, queue_rows=10, clock=ManualClock(7.0))
    assert running.engine.load().last_step_at is None
    running.submit(request(1, beams=3), request(2, beams=2), request(3, beams=4))
    gate.wait_for_arrival()
    load = running.engine.load()
    assert (load.running_requests, load.running_rows) == (1, 3)
    assert (load.queued_requests, load.queued_rows) == (2, 6)
    assert (load.row_capacity, load.queue_limit_rows) == (4, 10)
    assert load.alive
    gate.open()
    running.finish()
    load = running.engine.load()
    assert (load.running_rows, load.queued_rows, load.last_step_at) == (0, 0, 7.0)


# -- workers ----------------------------------------------------------------------------------------------------------


def test_workers_share_the_load(start: Start) -> None:
    """A wide request goes to one worker, the narrow ones after it to the other."""
    first, second = backend(), backend()
    running = start(first, second)
    assert running.engine.row_capacity == 128
    running.submit(request(1, beams=4), *(request(number) for number in range(2, 6)))
    assert len(running.finish()) == 5
    assert [source[-1] for batch in first.encoded for source in batch] == [1]
    assert [source[-1] for batch in second.encoded for source in batch] == [2, 3, 4, 5]


def test_workers_may_share_one_backend(start: Start) -> None:
    shared = backend()
    running = start(shared, shared)
    asked = [request(number, beams=1 + number % 5) for number in range(30)]
    for one in asked:
        running.submit(one)
    outcomes = running.finish()
    assert {one.id: tokens_of(outcomes[one.id]) for one in asked} == {one.id: tokens_alone(one) for one in asked}


def test_warming_up_runs_each_distinct_backend_once(start: Start) -> None:
    shared, other = backend(), backend()
    running = start(shared, shared, other)
    checked: list[Backend] = []
    running.engine.warm_up(checked.append)
    assert checked == [shared, other]


# -- cancelling -------------------------------------------------------------------------------------------------------


def test_cancelled_requests_end_at_the_next_step(start: Start) -> None:
    gate = Gate()
    running = start(gate=gate, rows=1)
    running.submit(request(1, tokens=FOR_EVER), request(2, tokens=FOR_EVER), request(3))
    gate.wait_for_arrival()
    running.engine.cancel([RequestId(1), RequestId(2)])
    # The step that runs, and the next one, which is without them.
    gate.let_pass(2)
    assert isinstance(running.error(1), RequestCancelled)
    assert isinstance(running.error(2), RequestCancelled)
    gate.open()
    assert isinstance(running.finish()[RequestId(3)], Completed)


class Releases(NullObserver):
    """After how many steps rows were given back."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def released(self, steps: int) -> None:
        self.steps.append(steps)


def test_the_step_that_runs_while_a_request_is_cancelled_counts_and_so_does_a_deadlines(start: Start) -> None:
    gate, clock, releases = Gate(), ManualClock(), Releases()
    running = start(gate=gate, clock=clock, observer=releases)
    running.submit(request(1, tokens=FOR_EVER), request(2, tokens=FOR_EVER, deadline=10.0), request(3, tokens=5))
    gate.wait_for_arrival()
    clock.advance(1.0)
    running.engine.cancel([RequestId(1)])
    clock.advance(1.0)
    # The step that runs, and the next one, which is without it.
    gate.let_pass(2)
    assert isinstance(running.error(1), RequestCancelled)
    assert releases.steps == [1]
    gate.wait_for_arrival()
    clock.advance(20.0)
    gate.let_pass(2)
    assert isinstance(running.error(2), DeadlineExceeded)
    assert releases.steps == [1, 1]
    gate.open()
    assert isinstance(running.finish()[RequestId(3)], Completed)


def test_one_call_cancels_at_all_workers(start: Start) -> None:
    running = start(backend(), backend())
    running.submit(request(1, tokens=FOR_EVER), request(2, tokens=FOR_EVER))
    running.engine.cancel([RequestId(1), RequestId(2)])
    assert isinstance(running.error(1), RequestCancelled)
    assert isinstance(running.error(2), RequestCancelled)
    assert len(running.finish()) == 2


def test_cancelling_what_nobody_knows_changes_nothing(start: Start) -> None:
    running = start()
    running.engine.cancel([RequestId(77)])
    running.submit(request(1))
    assert isinstance(running.finish()[RequestId(1)], Completed)


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_stopping_with_grace_finishes_what_was_accepted(start: Start) -> None:
    gate = Gate()
    running = start(gate=gate, rows=4)
    running.submit(*(request(number, beams=2) for number in range(6)))
    gate.wait_for_arrival()
    gate.open()
    outcomes = running.finish()
    assert len(outcomes) == 6
    assert {type(outcome) for outcome in outcomes.values()} == {Completed}


def test_stopping_without_grace_fails_the_rest_once(start: Start) -> None:
    running = start(backend(), backend(), rows=4)
    running.submit(*(request(number, beams=2, tokens=FOR_EVER) for number in range(6)))
    running.engine.stop(0)
    running.engine.check()
    outcomes = running.inbox.outcomes()
    assert len(outcomes) == 6
    assert {type(running.error(number)) for number in outcomes} == {EngineStopped}


class TickingClock:
    """A clock on which every look takes a second."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        self._now += 1
        return self._now


def test_grace_comes_to_an_end(start: Start) -> None:
    running = start(rows=2, clock=TickingClock())
    running.submit(request(1, tokens=FOR_EVER), request(2, tokens=4), request(3, tokens=FOR_EVER))
    running.engine.stop(1000)
    running.engine.check()
    assert sorted(running.inbox.outcomes()) == [1, 2, 3]
    assert isinstance(running.outcome(2), Completed)
    assert isinstance(running.error(1), EngineStopped)
    assert isinstance(running.error(3), EngineStopped)


def test_a_stopped_engine_refuses(start: Start) -> None:
    running = start()
    running.engine.stop(0)
    with pytest.raises(EngineStopped):
        running.submit(request(1))
    running.engine.cancel([RequestId(1)])
    running.engine.stop(0)
    assert running.inbox.outcomes() == {}


def test_an_engine_that_never_started_can_be_stopped() -> None:
    inbox = Inbox()
    engine = Engine([backend()], RULES, Capacity(8, 1 << 20), queue_rows=8, deliver=inbox, observer=NullObserver())
    engine.submit([request(1), request(2)])
    engine.stop(10)
    engine.check()
    assert {type(end.error) for end in inbox.outcomes().values() if isinstance(end, Failed)} == {EngineStopped}
    assert len(inbox.outcomes()) == 2


# -- dying ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(step={0: SystemExit()}), id="in a step"),
        pytest.param(Faults(step={3: SystemExit()}), id="in a later step"),
        pytest.param(Faults(encode={0: SystemExit()}), id="in the encoder"),
    ],
)
def test_the_death_of_a_worker_reaches_every_waiter(start: Start, faults: Faults) -> None:
    """Who runs, who is being started, who waits in the queue or still in the mailbox."""
    gate = Gate()
    running = start(backend(gate=gate, faults=faults), gate=gate, rows=2)
    running.submit(*(request(number) for number in range(4)))
    gate.open()
    assert {type(running.error(number)) for number in range(4)} == {StepFailed}
    assert not running.engine.load().alive
    with pytest.raises(EngineStopped):
        running.submit(request(9))
    assert len(running.finish()) == 4


def test_what_a_dying_worker_finds_in_its_mailbox_fails_too(start: Start) -> None:
    gate = Gate()
    running = start(backend(gate=gate, faults=Faults(step={0: SystemExit()})), gate=gate)
    running.submit(request(1))
    gate.wait_for_arrival()
    running.submit(request(2))
    running.engine.cancel([RequestId(1)])
    gate.open()
    assert isinstance(running.error(1), StepFailed)
    assert isinstance(running.error(2), StepFailed)
    assert len(running.finish()) == 2


def test_the_other_workers_go_on_when_one_has_died(start: Start) -> None:
    running = start(backend(faults=Faults(step={0: SystemExit()})), backend())
    running.submit(request(1))
    assert isinstance(running.error(1), StepFailed)
    running.submit(*(request(number) for number in range(2, 6)))
    outcomes = running.finish()
    assert {number for number, outcome in outcomes.items() if isinstance(outcome, Completed)} == {2, 3, 4, 5}
    assert not running.engine.load().alive


def test_a_dead_worker_holds_no_room(start: Start) -> None:
    running = start(backend(faults=Faults(step={0: SystemExit()})), backend(), rows=4, queue_rows=0)
    running.submit(request(1, beams=4))
    running.error(1)
    load = running.engine.load()
    assert (load.running_rows, load.queued_rows) == (0, 0)


def test_a_failed_step_is_no_death(start: Start) -> None:
    running = start(backend(faults=Faults(step={0: RuntimeError()}, encode={1: RuntimeError()})))
    for number in (1, 2):
        running.submit(request(number))
        assert isinstance(running.error(number), StepFailed)
    running.submit(request(3))
    assert isinstance(running.outcome(3), Completed)
    assert running.engine.load().alive


# -- everything at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_submit_and_cancel_and_everybody_gets_one_outcome(start: Start, seed: int) -> None:
    running = start(backend(), backend(), rows=16, queue_rows=24)
    accepted: set[int] = set()

    def caller(numbers: Sequence[int]) -> None:
        rng = random.Random(seed * 1000 + numbers[0])
        for number in numbers:
            try:
                running.submit(request(number, beams=rng.randint(1, 8), tokens=rng.randint(1, 12)))
            except QueueFull:
                continue
            accepted.add(number)
            if rng.random() < 0.3:
                running.engine.cancel([RequestId(number)])

    callers = [threading.Thread(target=caller, args=(range(40 * i, 40 * i + 40),)) for i in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    outcomes = running.finish()
    assert set(outcomes) == accepted
    assert {type(end.error) for end in outcomes.values() if isinstance(end, Failed)} <= {RequestCancelled}


# -- workers that do not come back, and such whose model fails ---------------------------------------------------------


def test_a_worker_that_does_not_come_back_is_given_up_and_the_others_serve_on(start: Start) -> None:
    gate = Gate()
    running = start(backend(gate=gate), backend(), gate=gate)
    running.submit(request(1))
    gate.wait_for_arrival()
    assert running.engine.load().workers[0].round is not None

    running.engine.give_up(0)

    assert isinstance(running.error(1), StepFailed)
    assert [worker.alive for worker in running.engine.load().workers] == [False, True]
    running.submit(request(2), request(3, beams=4))
    assert tokens_of(running.outcome(2)) == tokens_alone(request(2))
    assert tokens_of(running.outcome(3)) == tokens_alone(request(3, beams=4))
    gate.open()
    assert sorted(running.finish()) == [1, 2, 3]


def test_what_a_worker_that_was_given_up_still_tells_is_told_to_nobody(start: Start) -> None:
    """It may come to an answer in the very moment in which it is given up."""
    gate = Gate()
    running = start(backend(gate=gate), backend(), gate=gate)
    running.submit(request(1, stream=True))
    gate.wait_for_arrival()
    running.engine.give_up(0)
    running.engine._settle([Piece(RequestId(1), (3,)), Failed(RequestId(1), RequestCancelled())])
    gate.open()
    assert isinstance(running.finish()[RequestId(1)], Failed)
    assert isinstance(running.error(1), StepFailed)
    assert running.inbox.pieces(RequestId(1)) == []


def test_without_a_worker_nothing_is_accepted(start: Start) -> None:
    gate = Gate()
    running = start(gate=gate)
    running.submit(request(1))
    gate.wait_for_arrival()
    running.engine.give_up(0)
    with pytest.raises(EngineStopped):
        running.submit(request(2))


def test_a_stop_does_not_wait_for_a_worker_that_does_not_come_back(start: Start) -> None:
    gate = Gate()
    running = start(backend(gate=gate), backend(), gate=gate)
    running.submit(request(1))
    gate.wait_for_arrival()
    running.engine.stop(0.0)
    assert isinstance(running.error(1), EngineStopped)
    gate.open()


def test_a_worker_whose_model_keeps_failing_gets_one_request_at_a_time_until_it_works(start: Start) -> None:
    failing = backend(faults=Faults(encode={number: RuntimeError("broken") for number in range(4)}))
    running = start(failing, backend())

    def suspect() -> bool:
        return running.engine.load().workers[0].suspect

    for number in (1, 2, 3):
        assert not suspect()
        running.submit(request(number))
        assert isinstance(running.error(number), StepFailed)
    assert suspect()
    running.submit(*(request(number) for number in range(10, 20)))
    outcomes = [running.outcome(number) for number in range(10, 20)]
    assert [isinstance(outcome, Failed) for outcome in outcomes] == [True] + [False] * 9
    assert suspect()
    running.submit(request(30))
    assert tokens_of(running.outcome(30)) == tokens_alone(request(30))
    assert not suspect()
    running.finish()


# -- who would be late -----------------------------------------------------------------------------------------------


class Paced:
    """A worker that takes no step, and is known to be this fast: a row-step takes a second, and so does a step."""

    def __init__(self, start: Start, *, rows: int = 4) -> None:
        self.gate, self.clock = Gate(), ManualClock(100.0)
        self.running = start(gate=self.gate, rows=rows, queue_rows=400, clock=self.clock)
        self.engine = self.running.engine
        pace = self.engine._workers[0].core.pace
        for _ in range(50):
            pace.stepped(1, 1.0)

    def submit(self, number: int, *, within_s: float | None = None, steps: int = 2) -> None:
        """A request of four rows."""
        deadline = None if within_s is None else self.clock() + within_s
        self.running.submit(request(number, beams=4, tokens=steps, deadline=deadline))


def test_who_cannot_be_answered_in_time_is_refused_and_holds_nothing(start: Start) -> None:
    paced = Paced(start)
    paced.submit(1)
    paced.gate.wait_for_arrival()
    # All rows are taken. Who comes next has eight row-steps ahead of it, its own among them, and takes two steps; the
    # margin is 0.6 s.
    with pytest.raises(WouldBeLate) as caught:
        paced.submit(2, within_s=10.5)
    assert caught.value.expected_s == pytest.approx(10)
    assert caught.value.remaining_s == pytest.approx(10.5)
    paced.submit(3, within_s=10.7)
    with pytest.raises(WouldBeLate):
        paced.submit(4, within_s=10.7)
    paced.submit(5)
    paced.gate.open()
    assert sorted(paced.running.finish()) == [1, 3, 5]


def test_what_would_be_refused_is_foreseen_before_it_is_read(start: Start) -> None:
    paced = Paced(start)
    assert paced.engine.foreseen_refusal("", 0.001) is None
    paced.submit(1)
    assert paced.engine.foreseen_refusal("", 0.001) is None
    paced.submit(2)
    refusal = paced.engine.foreseen_refusal("", 8.5)
    assert isinstance(refusal, WouldBeLate)
    assert refusal.expected_s == pytest.approx(8)
    assert refusal.remaining_s == 8.5
    assert paced.engine.foreseen_refusal("", 8.7) is None
    pace = paced.engine._workers[0].core.pace
    pace.answered(GenerationRequest(RequestId(0), (5, 6), SearchOptions(beam_size=4)), steps=2)
    assert isinstance(paced.engine.foreseen_refusal("", 8.7), WouldBeLate)
    assert paced.engine.foreseen_refusal("", 8.7 + 2) is None
    assert isinstance(paced.engine.foreseen_refusal("", 8.7 + 2, ahead=1), WouldBeLate)
    assert paced.engine.foreseen_refusal("", 8.7 + 2 + 8, ahead=1) is None
    for number in range(3, 102):
        paced.submit(number)
    assert isinstance(paced.engine.foreseen_refusal("", 1e9), QueueFull)
    paced.engine.stop(0.0)
    assert paced.engine.foreseen_refusal("", 1e9) is None
    paced.gate.open()


def test_a_caller_with_less_than_its_share_finds_room_where_others_have_taken_all(start: Start) -> None:
    gate = Gate()
    running = start(gate=gate, rows=4, queue_rows=16)
    for number in range(5):
        running.submit(replace(request(number, beams=4), caller="greedy"))
    with pytest.raises(QueueFull):
        running.submit(replace(request(10, beams=4), caller="greedy"))
    assert isinstance(running.engine.foreseen_refusal("greedy", 1e9), QueueFull)
    assert running.engine.foreseen_refusal("polite", 0.001) is None
    running.submit(replace(request(11, beams=4), caller="polite"))
    running.submit(replace(request(12, beams=4), caller="polite"))
    with pytest.raises(QueueFull):
        running.submit(replace(request(13, beams=4), caller="polite"))
    gate.open()
    assert sorted(running.finish()) == [0, 1, 2, 3, 4, 11, 12]


def test_those_who_are_refused_are_told_different_times(start: Start) -> None:
    """As far apart as requests end, so that each finds room."""
    gate, clock = Gate(), ManualClock()
    gate.open()
    running = start(gate=gate, rows=4, queue_rows=0, clock=clock)
    for number in range(20):
        running.submit(request(number, beams=4))
        running.outcome(number)
        clock.advance(0.1)
    running.submit(request(100, beams=4, tokens=FOR_EVER))
    told = []
    for number in range(101, 111):
        with pytest.raises(QueueFull) as caught:
            running.submit(request(number, beams=4))
        told.append(caught.value.retry_after_s)
    assert told == sorted(told)
    assert np.diff(told) == pytest.approx(0.1, rel=0.2)


def test_whoever_is_next_and_will_be_late_leaves_the_queue(start: Start) -> None:
    """Beside one that goes on, when another one has ended: half of a busy worker's pace."""
    paced = Paced(start, rows=8)
    paced.submit(1, steps=50)
    paced.submit(2)
    paced.gate.wait_for_arrival()
    paced.submit(3, within_s=300)
    paced.submit(4)
    paced.clock.advance(299.5)
    paced.gate.open()
    assert paced.running.error(3) == DeadlineExceeded("queueing")
    assert sorted(paced.running.finish()) == [1, 2, 3, 4]
