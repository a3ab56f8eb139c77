"""Dynamic batching in front of a peer: who is translated together, and that everybody gets one outcome."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from dynamic_batching import DynamicBatching, Limits, Translate, parts

from beamline_server.engine.admission import RequestLevel
from beamline_server.engine.errors import (
    DeadlineExceeded,
    EngineStopped,
    QueueFull,
    RequestCancelled,
    RequestTooLarge,
    SourceTooLong,
    StepFailed,
)
from beamline_server.engine.request import (
    Completed,
    Failed,
    Finish,
    GenerationRequest,
    Hypothesis,
    RequestId,
    SearchOptions,
)
from doubles.engine import Inbox, ManualClock

LONG_S = 1e6
"""A delay that no test waits for."""


def request(number: int, *, beams: int = 1, source_tokens: int = 3, deadline: float | None = None) -> GenerationRequest:
    options = SearchOptions(beam_size=beams)
    return GenerationRequest(RequestId(number), (*range(source_tokens - 1), number), options, deadline)


def answer_to(source: tuple[int, ...]) -> Hypothesis:
    return Hypothesis(tuple(reversed(source)), -0.5, (-0.5,) * len(source), Finish.LENGTH)


class Mirror:
    """Answers sources with themselves backwards, when it is let; remembers what came together."""

    def __init__(self, *, held: bool = False, error: Exception | None = None) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self.began = threading.Semaphore(0)
        self.leave = threading.Event()
        self._error = error
        if not held:
            self.leave.set()

    def __call__(self, sources: Sequence[tuple[int, ...]], options: SearchOptions) -> Sequence[tuple[Hypothesis, ...]]:
        self.batches.append(list(sources))
        self.began.release()
        assert self.leave.wait(30)
        if self._error is not None:
            raise self._error
        return [(answer_to(source),) for source in sources]


@dataclass
class Running:
    engine: DynamicBatching
    inbox: Inbox
    clock: ManualClock

    def submit(self, *requests: GenerationRequest) -> None:
        self.engine.submit(requests)

    def outcome(self, number: int) -> Completed | Failed:
        return self.inbox.wait_for(RequestId(number))

    def error(self, number: int) -> Exception:
        outcome = self.outcome(number)
        assert isinstance(outcome, Failed)
        return outcome.error


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts engines and leaves no thread behind."""
    engines: list[DynamicBatching] = []
    held: list[Mirror] = []

    def started(
        translate: Translate,
        *,
        max_batch: int = 1,
        max_delay_s: float = LONG_S,
        workers: int = 1,
        part: int | None = None,
        rows: int = 1000,
        clock: Callable[[], float] | None = None,
    ) -> Running:
        inbox, manual = Inbox(), ManualClock()
        engine = DynamicBatching(
            translate,
            RequestLevel(max_batch, max_delay_s),
            part=part,
            workers=workers,
            limits=Limits(rows, min(rows, 16), max_source_tokens=50),
            deliver=inbox,
            clock=clock or manual,
        )
        engines.append(engine)
        held.extend([translate] if isinstance(translate, Mirror) else [])
        engine.start()
        return Running(engine, inbox, manual)

    yield started
    for mirror in held:
        mirror.leave.set()
    for engine in engines:
        engine.stop(0)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_batch_of_equal_options_is_one_part_in_its_order() -> None:
    batch = [request(number, source_tokens=length) for number, length in enumerate([9, 3, 7, 1])]
    assert parts(batch, None) == [batch]


def test_parts_hold_similar_lengths_the_short_ones_first() -> None:
    lengths = [9, 3, 40, 1, 30]
    batch = [request(number, source_tokens=length) for number, length in enumerate(lengths)]
    assert [[len(each.source) for each in part] for part in parts(batch, 2)] == [[1, 3], [9, 30], [40]]


@pytest.mark.parametrize("most", [None, 3])
def test_parts_never_mix_options_and_lose_nobody(most: int | None) -> None:
    rng = random.Random(5)
    batch = [request(n, beams=rng.choice([1, 2, 4]), source_tokens=rng.randint(1, 9)) for n in range(20)]
    cut = parts(batch, most)
    assert all(len({each.options for each in part}) == 1 for part in cut)
    assert sorted(each.id for part in cut for each in part) == list(range(20))
    assert most is None or max(map(len, cut)) <= most


# -- batches ----------------------------------------------------------------------------------------------------------


def test_a_full_batch_is_translated_together(start: Start) -> None:
    mirror = Mirror()
    running = start(mirror, max_batch=3)
    running.submit(request(1), request(2))
    running.submit(request(3))
    for number in (1, 2, 3):
        outcome = running.outcome(number)
        assert isinstance(outcome, Completed)
        assert outcome.hypotheses == (answer_to(request(number).source),)
    assert [len(batch) for batch in mirror.batches] == [3]


def test_a_batch_that_does_not_fill_is_translated_when_the_delay_is_over(start: Start) -> None:
    running = start(Mirror(), max_batch=3, max_delay_s=0.001, clock=time.monotonic)
    running.submit(request(1))
    assert isinstance(running.outcome(1), Completed)


def test_nobody_joins_a_batch_that_runs_and_the_next_one_follows(start: Start) -> None:
    mirror = Mirror(held=True)
    running = start(mirror, max_batch=2)
    running.submit(request(1), request(2))
    mirror.began.acquire()
    running.submit(request(3), request(4))
    load = running.engine.load()
    assert (load.running_requests, load.queued_requests, load.queued_rows) == (2, 2, 2)
    mirror.leave.set()
    assert isinstance(running.outcome(4), Completed)
    assert [len(batch) for batch in mirror.batches] == [2, 2]


def test_two_workers_run_two_batches(start: Start) -> None:
    mirror = Mirror(held=True)
    running = start(mirror, max_batch=2, workers=2)
    running.submit(*(request(number) for number in range(4)))
    mirror.began.acquire()
    mirror.began.acquire()
    assert sorted(map(len, mirror.batches)) == [2, 2]
    mirror.leave.set()
    assert isinstance(running.outcome(3), Completed)


def test_a_part_is_told_before_the_next_one_is_translated(start: Start) -> None:
    mirror = Mirror(held=True)
    running = start(mirror, max_batch=2, part=1)
    running.submit(request(1, source_tokens=9), request(2, source_tokens=2))
    mirror.began.acquire()
    assert mirror.batches == [[request(2, source_tokens=2).source]]
    mirror.leave.set()
    assert isinstance(running.outcome(1), Completed)
    assert isinstance(running.outcome(2), Completed)
    assert len(mirror.batches) == 2


def test_timing_tells_how_long_a_request_waited_and_ran(start: Start) -> None:
    mirror = Mirror(held=True)
    running = start(mirror, max_batch=2)
    running.submit(request(1))
    running.clock.advance(0.25)
    running.submit(request(2))
    mirror.began.acquire()
    running.clock.advance(0.5)
    mirror.leave.set()
    outcome = running.outcome(1)
    assert isinstance(outcome, Completed)
    assert (outcome.timing.queue_s, outcome.timing.decode_s, outcome.timing.steps) == (0.25, 0.5, 3)


# -- refusing, giving up, failing -------------------------------------------------------------------------------------


def test_what_could_never_run_is_refused(start: Start) -> None:
    running = start(Mirror(), rows=4)
    with pytest.raises(SourceTooLong):
        running.submit(request(1, source_tokens=51))
    with pytest.raises(RequestTooLarge):
        running.submit(request(1, beams=3), request(2, beams=2))
    assert running.inbox.outcomes() == {}


def test_a_full_queue_refuses_and_has_room_again_when_somebody_has_ended(start: Start) -> None:
    mirror = Mirror(held=True)
    running = start(mirror, rows=4)
    running.submit(request(1, beams=3))
    mirror.began.acquire()
    with pytest.raises(QueueFull):
        running.submit(request(2, beams=2))
    mirror.leave.set()
    running.outcome(1)
    running.submit(request(3, beams=4))
    assert isinstance(running.outcome(3), Completed)


def test_a_request_that_waits_can_be_cancelled(start: Start) -> None:
    running = start(Mirror(), max_batch=2, rows=2)
    running.submit(request(1, beams=2))
    running.engine.cancel([RequestId(1)])
    assert isinstance(running.error(1), RequestCancelled)
    running.submit(request(2), request(3))
    assert isinstance(running.outcome(3), Completed)


def test_a_request_that_runs_can_be_cancelled(start: Start) -> None:
    mirror = Mirror(held=True)
    running = start(mirror, max_batch=2)
    running.submit(request(1), request(2))
    mirror.began.acquire()
    running.engine.cancel([RequestId(1)])
    mirror.leave.set()
    assert isinstance(running.error(1), RequestCancelled)
    assert isinstance(running.outcome(2), Completed)


def test_a_deadline_passes_while_a_request_waits(start: Start) -> None:
    running = start(Mirror(), max_batch=2, clock=time.monotonic)
    running.submit(request(1, deadline=time.monotonic() + 0.001))
    assert running.error(1) == DeadlineExceeded("queueing")


def test_a_deadline_passes_while_a_request_runs(start: Start) -> None:
    mirror = Mirror(held=True)
    running = start(mirror)
    running.submit(request(1, deadline=3.0))
    mirror.began.acquire()
    running.clock.advance(3.0)
    mirror.leave.set()
    assert running.error(1) == DeadlineExceeded("decoding")


def test_a_translator_that_fails_fails_its_batch_and_the_next_is_served(start: Start) -> None:
    mirror = Mirror(error=RuntimeError("no"))
    running = start(mirror, max_batch=2)
    for numbers in ((1, 2), (3, 4)):
        running.submit(*map(request, numbers))
        assert {type(running.error(number)) for number in numbers} == {StepFailed}
    assert running.engine.load().alive


@pytest.mark.parametrize("max_delay_s", [LONG_S, math.inf])
def test_stopping_without_grace_fails_who_waits(start: Start, max_delay_s: float) -> None:
    running = start(Mirror(), max_batch=2, max_delay_s=max_delay_s)
    running.submit(request(1))
    running.engine.stop(0)
    assert isinstance(running.error(1), EngineStopped)
    with pytest.raises(EngineStopped):
        running.submit(request(2))
    running.engine.stop(0)


def test_an_engine_that_never_started_can_be_stopped() -> None:
    inbox = Inbox()
    limits = Limits(10, 10, 10)
    engine = DynamicBatching(Mirror(), RequestLevel(1, 0), part=None, workers=1, limits=limits, deliver=inbox)
    engine.submit([request(1)])
    engine.stop(10)
    assert isinstance(inbox.wait_for(RequestId(1)), Failed)


@pytest.mark.parametrize("seed", range(3))
def test_everybody_gets_one_outcome(start: Start, seed: int) -> None:
    rng = random.Random(seed)
    running = start(Mirror(), max_batch=5, max_delay_s=0.0005, workers=2, part=2, clock=time.monotonic)
    cancelled = {number for number in range(100) if rng.random() < 0.3}
    for number in range(100):
        running.submit(request(number, beams=rng.randint(1, 2), source_tokens=rng.randint(1, 20)))
        if number in cancelled:
            running.engine.cancel([RequestId(number)])
    running.engine.stop(60)
    ends = running.inbox.outcomes()
    assert sorted(ends) == list(range(100))
    for number, outcome in ends.items():
        assert isinstance(outcome, Completed) or number in cancelled
    load = running.engine.load()
    assert (load.queued_rows, load.running_rows) == (0, 0)
