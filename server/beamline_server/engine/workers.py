"""Gives engine cores their threads, and is the engine that others see."""

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from beamline_server.engine.admission import Admission, Capacity, Continuous, check_fits
from beamline_server.engine.backend import Backend
from beamline_server.engine.errors import (
    EngineError,
    EngineStopped,
    QueueFull,
    RequestTooLarge,
    SourceTooLong,
    WouldBeLate,
)
from beamline_server.engine.ledger import Ledger
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import Deliver, Event, Failed, GenerationRequest, Piece, RequestId, prompted
from beamline_server.engine.step import Clock, EngineCore, ModelRules, logged_failure

WORKER_THREADS = "engine"
"""What the names of the workers' threads begin with."""
SUSPECT_FAILURES = 3
"""So many failures of the model in a row make a worker suspect."""
_LAST_STEP_S = 1.0
"""Time for a worker to end the step that it is in when it has to stop."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """How a worker is.

    Attributes:
        alive: Whether it takes requests; one that is not will not do so again.
        suspect: Whether its model has failed several times in a row.
        round: Number of the step that it is in; None while it has nothing to do.
    """

    alive: bool = True
    suspect: bool = False
    round: int | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine holds at a moment."""

    queued_requests: int
    queued_rows: int
    running_requests: int
    running_rows: int
    row_capacity: int
    queue_limit_rows: int
    last_step_at: float | None
    workers: tuple[WorkerState, ...] = (WorkerState(),)

    @property
    def alive(self) -> bool:
        """Whether all workers are."""
        return all(worker.alive for worker in self.workers)


@dataclass(frozen=True, slots=True)
class _Submit:
    requests: tuple[GenerationRequest, ...]


@dataclass(frozen=True, slots=True)
class _Cancel:
    ids: frozenset[RequestId]
    wished_at: float


@dataclass(frozen=True, slots=True)
class _Stop:
    """Finish what was accepted until this time, then end the rest."""

    until: float


_Message = _Submit | _Cancel | _Stop
_Bury = Callable[["_Worker", EngineError], None]


class _Worker:
    """One thread that owns one core: takes messages, steps, delivers."""

    def __init__(self, name: str, core: EngineCore, deliver: Deliver, bury: _Bury, clock: Clock) -> None:
        self.core = core
        self.mailbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self.alive = True
        self._round = 0
        self._in_a_step = False
        self._deliver = deliver
        self._bury = bury
        self._clock = clock
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> WorkerState:
        return WorkerState(self.alive, self.suspect, self._round if self._in_a_step else None)

    @property
    def suspect(self) -> bool:
        return self.core.failures >= SUSPECT_FAILURES

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end for so many seconds; returns whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(max(timeout_s, 0.0))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._stop_at is None or not self.core.idle:
                self._receive()
                if self._stop_at is not None and self._clock() >= self._stop_at:
                    break
                self._round, self._in_a_step = self._round + 1, True
                events = self.core.step()
                if not self.alive:  # it has been given up, and nobody waits for these
                    return
                self._tell(events)
                self._in_a_step = False
            self._tell(self.core.fail_all(EngineStopped))
        except BaseException as error:  # the last line of defence: nobody may be left waiting
            self._bury(self, logged_failure(error, "a worker"))

    def _receive(self) -> None:
        """Take what has come; wait if there is nothing else to do, or nothing yet."""
        if self.core.idle and self._stop_at is None:
            self._handle(self.mailbox.get())
        elif (rest_s := self._rest_s()) > 0:
            with suppress(queue.Empty):
                self._handle(self.mailbox.get(timeout=rest_s))
        self._receive_all()

    def _rest_s(self) -> float:
        """How long nothing has to be done unless a message comes, in seconds."""
        until = self.core.rests_until
        if until == -math.inf:
            return 0.0
        if self._stop_at is not None:
            until = min(until, self._stop_at)
        return min(until - self._clock(), threading.TIMEOUT_MAX)

    def _receive_all(self) -> None:
        while True:
            try:
                self._handle(self.mailbox.get_nowait())
            except queue.Empty:
                return

    def _handle(self, message: _Message) -> None:
        match message:
            case _Submit(requests):
                self.core.accept(requests)
            case _Cancel(ids, wished_at):
                self.core.cancel(ids, wished_at)
            case _Stop(until):
                self._stop_at = until

    def _tell(self, events: Sequence[Event]) -> None:
        if events:
            self._deliver(events)


class Engine:
    """Continuous-batched beam search behind a bounded queue. Thread-safe.

    Args:
        backends: One per worker; they may be the same object.
        rules: What the model fixes.
        capacity: Rows and cache slots of each worker.
        queue_rows: Rows that may wait, all workers together.
        deliver: Receives events; called on engine threads.
        observer: Is told what each step did; called on engine threads.
        clock: Monotonic seconds; deadlines are times of this clock.
        admission: When requests may start.
    """

    def __init__(  # noqa: PLR0913 - what an engine stands on; nothing of it belongs together
        self,
        backends: Sequence[Backend],
        rules: ModelRules,
        capacity: Capacity,
        *,
        queue_rows: int,
        deliver: Deliver,
        observer: StepObserver,
        clock: Clock = time.monotonic,
        admission: Admission = Continuous(),  # noqa: B008 - a frozen value
    ) -> None:
        self._backends = backends
        self._rules = rules
        self._capacity = capacity
        self._queue_rows = queue_rows
        self._deliver = deliver
        self._clock = clock
        self._workers = [
            _Worker(
                f"{WORKER_THREADS}-{i}",
                EngineCore(backend, rules, capacity, clock=clock, observer=observer, admission=admission),
                self._settle,
                self._bury,
                clock,
            )
            for i, backend in enumerate(backends)
        ]
        # The only state that RPC threads and workers share.
        self._lock = threading.Lock()
        self._ledger = Ledger([worker.core.pace for worker in self._workers], capacity.rows, queue_rows, clock())
        self._stopping = False

    @property
    def row_capacity(self) -> int:
        """Rows that can run at a time, all workers together."""
        return self._capacity.rows * len(self._workers)

    def warm_up(self, check: Callable[[Backend], None]) -> None:
        """Let a check run every distinct backend once, before the first request does."""
        for backend in {id(backend): backend for backend in self._backends}.values():
            check(backend)

    def start(self) -> None:
        """Start the workers."""
        for worker in self._workers:
            worker.start()

    def stop(self, grace_s: float) -> None:
        """Refuse new requests, finish what was accepted for up to `grace_s` seconds, fail the rest. Blocks."""
        with self._lock:
            self._stopping = True
        until = self._clock() + grace_s
        for worker in self._workers:
            worker.mailbox.put(_Stop(until))
        ends = time.monotonic() + grace_s + _LAST_STEP_S
        for worker in self._workers:
            if not worker.join(ends - time.monotonic()):
                self._bury(worker, EngineStopped())
        with self._lock:
            never_started = list(self._ledger.requests)
        self._fail(never_started, EngineStopped())

    def give_up(self, number: int) -> None:
        """Give a worker that makes no progress nothing more, and fail what it has."""
        stuck = TimeoutError(f"worker {number} is in one step for too long")
        self._bury(self._workers[number], logged_failure(stuck, "a worker"))

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Accept all requests, of one caller and priority, or none. Never blocks for long.

        Raises:
            SourceTooLong: a source has more tokens than the model has positions.
            RequestTooLarge: a request could never run here, or all of them could never wait here.
            QueueFull: there is no room for all of them now.
            WouldBeLate: one of them has a deadline that cannot be met now.
            EngineStopped: the engine is stopping or its workers have died.
        """
        requests = self._fitting(requests)
        wanted, ledger = sum(request.options.beam_size for request in requests), self._ledger
        if wanted > ledger.room:
            raise RequestTooLarge("rows", wanted, ledger.room)
        shares: dict[int, list[GenerationRequest]] = {}
        with self._lock:
            if self._stopping or not self._to_choose_from():
                raise EngineStopped
            first = requests[0]
            if full := ledger.full(first.caller, wanted, len(requests), self._clock(), first.priority):
                raise full
            for request in requests:
                worker = self._next_worker()
                ledger.hold(request, worker)
                shares.setdefault(worker, []).append(request)
            if late := ledger.late(requests, self._clock()):
                for request in requests:
                    ledger.let_go(request.id)
                raise late
            # Inside the lock, so that a cancellation cannot arrive before what it cancels.
            for worker, share in shares.items():
                self._workers[worker].mailbox.put(_Submit(tuple(share)))

    def _fitting(self, requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """The requests as the model takes them, if each could run here."""
        for request in requests:
            if len(request.source) > self._rules.max_source_tokens:
                raise SourceTooLong(len(request.source), self._rules.max_source_tokens)
        if not self._backends[0].has_encoder:
            requests = [prompted(request) for request in requests]
        for request in requests:
            check_fits(request, self._capacity)
        return requests

    def foreseen_refusal(self, caller: str, remaining_s: float, ahead: int = 0) -> QueueFull | WouldBeLate | None:
        """Why a request would be refused now, of which nothing is known yet; None if it may be accepted.

        Args:
            caller: Who asks.
            remaining_s: The time that there is for it.
            ahead: Requests that will have been submitted before it.
        """
        with self._lock:
            if self._stopping or not self._to_choose_from():
                return None
            return self._ledger.foreseen(self._next_worker(), caller, remaining_s, ahead, self._clock())

    def _to_choose_from(self) -> list[int]:
        """The workers that a request may go to: a suspect one gets one at a time, which shows whether it works."""
        alive = [i for i, worker in enumerate(self._workers) if worker.alive]
        return [i for i in alive if not self._workers[i].suspect or self._ledger.rows_of(i) == 0] or alive

    def _next_worker(self) -> int:
        """The one with the fewest rows, the first of equals."""
        return min(self._to_choose_from(), key=self._ledger.rows_of)

    def cancel(self, ids: Sequence[RequestId]) -> None:
        """Drop requests at their next step; each then ends with `Failed(RequestCancelled)`. Unknown ids have ended."""
        with self._lock:
            for worker in {self._ledger.worker_of(number) for number in ids}:
                if worker is not None:
                    self._workers[worker].mailbox.put(_Cancel(frozenset(ids), self._clock()))

    def load(self) -> EngineLoad:
        """What the engine holds now."""
        cores = [worker.core for worker in self._workers if worker.alive]
        steps = [core.last_step_at for core in cores if core.last_step_at is not None]
        return EngineLoad(
            queued_requests=sum(core.queued_requests for core in cores),
            queued_rows=sum(core.queued_rows for core in cores),
            running_requests=sum(core.running_requests for core in cores),
            running_rows=sum(core.running_rows for core in cores),
            row_capacity=self.row_capacity,
            queue_limit_rows=self._queue_rows,
            last_step_at=max(steps, default=None),
            workers=tuple(worker.state for worker in self._workers),
        )

    def check(self) -> None:
        """Recount rows and slots of every living worker; only while nothing runs. AssertionError if any is lost."""
        for worker in self._workers:
            if worker.alive:
                worker.core.check()
        self._ledger.check()

    def _settle(self, events: Sequence[Event]) -> None:
        """Give back the rows of what has ended, then tell.

        What has ended already is told no more: a worker may come back after it has been given up.
        """
        with self._lock:
            told = [event for event in events if self._is_news(event)]
            if ended := sum(not isinstance(event, Piece) for event in told):
                self._ledger.ended(ended, self._clock())
        if told:
            self._deliver(told)

    def _is_news(self, event: Event) -> bool:
        if isinstance(event, Piece):
            return self._ledger.worker_of(event.id) is not None
        return self._ledger.let_go(event.id)

    def _bury(self, dead: _Worker, failure: EngineError) -> None:
        """A worker has died: give it nothing more, and fail whatever it has, wherever in its life that was.

        Its own core could not tell: what it was just starting, ending or reading is in none of its lists.
        """
        with self._lock:
            dead.alive = False
            number = self._workers.index(dead)
            left = [request for request in self._ledger.requests if self._ledger.worker_of(request) == number]
        self._fail(left, failure)

    def _fail(self, ids: Sequence[RequestId], error: EngineError) -> None:
        if ids:
            self._settle([Failed(number, error) for number in ids])
