"""Dynamic batching in front of whatever answers a batch at a time: how a peer comes behind Beamline's own service.

Not used by the server. Requests wait in one queue; an idle worker takes a batch when it is full or its first request
has waited for long enough, by the same decision as Beamline's own request-level batching.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from beamline_server.engine.admission import RequestLevel, Waiting
from beamline_server.engine.errors import (
    DeadlineExceeded,
    EngineStopped,
    QueueFull,
    RequestCancelled,
    RequestTooLarge,
    SourceTooLong,
)
from beamline_server.engine.request import (
    Completed,
    Deliver,
    Event,
    Failed,
    GenerationRequest,
    Hypothesis,
    RequestId,
    SearchOptions,
    Timing,
)
from beamline_server.engine.step import logged_failure
from beamline_server.engine.workers import EngineLoad, WorkerState

_RETRY_AFTER_S = 0.1


class Translate(Protocol):
    """Answers a batch; called by all workers."""

    def __call__(self, sources: Sequence[tuple[int, ...]], options: SearchOptions) -> Sequence[tuple[Hypothesis, ...]]:
        """The `n_best` hypotheses of each source, best first."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What can be asked for at a time.

    Attributes:
        rows: Hypotheses of running and waiting requests together.
        row_capacity: What to tell as the room for running ones.
        max_source_tokens: Longest source.
    """

    rows: int
    row_capacity: int
    max_source_tokens: int


@dataclass(frozen=True, slots=True)
class _Queued:
    request: GenerationRequest
    at: float


def parts(batch: Sequence[GenerationRequest], most: int | None) -> list[list[GenerationRequest]]:
    """What is translated at once: requests of equal options and similar lengths, the short ones first.

    Args:
        batch: Of requests.
        most: Requests in a part; None is all whose options are equal, in their order.
    """
    alike = [list(group) for _, group in groupby(sorted(batch, key=_options_key), key=_options_key)]
    if most is None:
        return alike
    by_length = [sorted(group, key=lambda request: len(request.source)) for group in alike]
    return [group[start : start + most] for group in by_length for start in range(0, len(group), most)]


def _options_key(request: GenerationRequest) -> str:
    return repr(request.options)


class DynamicBatching:
    """An `EngineLike` over a translator. Streams have no pieces before their end.

    Args:
        translate: Answers a batch.
        batching: When a worker takes how many requests.
        part: Requests that are translated at once, those of similar lengths together; None is the whole batch.
        workers: Threads.
        limits: What is refused.
        deliver: Receives events; called on the threads, and on those of who cancels.
        clock: Monotonic seconds; deadlines are times of this clock.
    """

    def __init__(  # noqa: PLR0913 - what an engine stands on; nothing of it belongs together
        self,
        translate: Translate,
        batching: RequestLevel,
        *,
        part: int | None,
        workers: int,
        limits: Limits,
        deliver: Deliver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._translate = translate
        self._batching = batching
        self._part = part
        self._limits = limits
        self._deliver = deliver
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[_Queued] = deque()
        self._running: dict[RequestId, GenerationRequest] = {}
        self._rows = 0  # of those in the queue and those that run
        self._cancelled: set[RequestId] = set()
        self._stop_at = math.inf
        self._last_batch_at: float | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"batching-{number}", daemon=True) for number in range(workers)
        ]
        self._started = False

    def start(self) -> None:
        """See `EngineLike`."""
        self._started = True
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """See `EngineLike`."""
        limits = self._limits
        for request in requests:
            if len(request.source) > limits.max_source_tokens:
                raise SourceTooLong(len(request.source), limits.max_source_tokens)
        wanted = _rows(requests)
        if wanted > limits.rows:
            raise RequestTooLarge("rows", wanted, limits.rows)
        with self._changed:
            if self._stop_at < math.inf:
                raise EngineStopped
            if self._rows + wanted > limits.rows:
                queued = self._rows - _rows(self._running.values())
                raise QueueFull(queued, limits.rows - limits.row_capacity, _RETRY_AFTER_S)
            self._rows += wanted
            now = self._clock()
            self._queue.extend(_Queued(request, now) for request in requests)
            self._changed.notify_all()

    def foreseen_refusal(self, caller: str, remaining_s: float, ahead: int) -> None:
        """Nothing is refused before it is read."""

    def cancel(self, ids: Sequence[RequestId]) -> None:
        """See `EngineLike`. A batch that runs goes on to its end."""
        wanted = frozenset(ids)
        with self._changed:
            self._cancelled |= wanted & self._running.keys()
            gone = self._unqueue(lambda queued: queued.request.id in wanted)
        self._tell([Failed(request.id, RequestCancelled()) for request in gone])

    def load(self) -> EngineLoad:
        """See `EngineLike`."""
        with self._changed:
            queued, running = [each.request for each in self._queue], list(self._running.values())
            return EngineLoad(
                queued_requests=len(queued),
                queued_rows=_rows(queued),
                running_requests=len(running),
                running_rows=_rows(running),
                row_capacity=self._limits.row_capacity,
                queue_limit_rows=self._limits.rows - self._limits.row_capacity,
                last_step_at=self._last_batch_at,
                workers=tuple(WorkerState(alive=self._is_well(thread)) for thread in self._threads),
            )

    def _is_well(self, thread: threading.Thread) -> bool:
        return not self._started or self._stop_at < math.inf or thread.is_alive()

    def give_up(self, number: int) -> None:
        """See `EngineLike`. Its states tell no step, so nobody finds a worker stuck."""
        raise NotImplementedError(number)

    def stop(self, grace_s: float) -> None:
        """See `EngineLike`. A batch that runs is waited for."""
        with self._changed:
            self._stop_at = min(self._stop_at, self._clock() + grace_s)
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        with self._changed:
            left = [*(each.request.id for each in self._queue), *self._running]
            self._queue.clear()
            self._running.clear()
            self._rows = 0
        self._tell([Failed(number, EngineStopped()) for number in left])

    def _run(self) -> None:
        while batch := self._next_batch():
            queued_at = {each.request.id: each.at for each in batch}
            for part in parts([each.request for each in batch], self._part):
                if self._clock() >= self._stop_at:
                    return
                self._answer(part, queued_at)

    def _next_batch(self) -> list[_Queued]:
        """Wait for a batch; none when there will be no other."""
        while True:
            with self._changed:
                now = self._clock()
                if now >= self._stop_at or (self._stop_at < math.inf and not self._queue):
                    return []
                late = self._unqueue_late(now)
                batch = self._take(now)
                if not late and not batch:
                    self._changed.wait(self._rest_s(now))
                    continue
            self._tell([Failed(request.id, DeadlineExceeded("queueing")) for request in late])
            if batch:
                return batch

    def _unqueue_late(self, now: float) -> list[GenerationRequest]:
        return self._unqueue(lambda queued: _is_late(queued.request, now))

    def _take(self, now: float) -> list[_Queued]:
        if not self._queue or now < self._opens_at():
            return []
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._batching.max_batch))]
        self._running |= {each.request.id: each.request for each in batch}
        if self._queue:
            self._changed.notify_all()  # there may be another batch in it, for another worker
        return batch

    def _opens_at(self) -> float:
        # Who runs at another worker holds up nobody here.
        return self._batching.opens_at(Waiting(len(self._queue), self._queue[0].at, running=0))

    def _rest_s(self, now: float) -> float | None:
        """How long there is nothing to do if nothing changes, in seconds; None is for ever."""
        deadlines = [each.request.deadline for each in self._queue if each.request.deadline is not None]
        until = min(self._stop_at, self._opens_at() if self._queue else math.inf, *deadlines)
        return None if until == math.inf else min(until - now, threading.TIMEOUT_MAX)

    def _unqueue(self, goes: Callable[[_Queued], bool]) -> list[GenerationRequest]:
        gone = [queued.request for queued in self._queue if goes(queued)]
        if gone:
            self._queue = deque(queued for queued in self._queue if not goes(queued))
            self._rows -= _rows(gone)
        return gone

    def _answer(self, part: Sequence[GenerationRequest], queued_at: dict[RequestId, float]) -> None:
        began = self._clock()
        events: list[Event]
        try:
            answers = self._translate([request.source for request in part], part[0].options)
            now = self._clock()
            events = [
                _outcome(request, hypotheses, began - queued_at[request.id], began, now)
                for request, hypotheses in zip(part, answers, strict=True)
            ]
        except Exception as error:  # whatever it was, every waiter must hear of it
            failure = logged_failure(error, "a batch")
            events = [Failed(request.id, failure) for request in part]
        with self._changed:
            self._last_batch_at = self._clock()
            self._rows -= _rows(part)
            for number, request in enumerate(part):
                del self._running[request.id]
                if request.id in self._cancelled:
                    self._cancelled.discard(request.id)
                    events[number] = Failed(request.id, RequestCancelled())
        self._tell(events)

    def _tell(self, events: Sequence[Event]) -> None:
        if events:
            self._deliver(events)


def _outcome(
    request: GenerationRequest, hypotheses: tuple[Hypothesis, ...], queue_s: float, began: float, now: float
) -> Event:
    if _is_late(request, now):
        return Failed(request.id, DeadlineExceeded("decoding"))
    steps = max(len(hypothesis.tokens) for hypothesis in hypotheses)
    return Completed(request.id, hypotheses, Timing(queue_s, 0.0, now - began, steps))


def _is_late(request: GenerationRequest, now: float) -> bool:
    return request.deadline is not None and request.deadline <= now


def _rows(requests: Iterable[GenerationRequest]) -> int:
    return sum(request.options.beam_size for request in requests)
