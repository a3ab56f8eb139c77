"""The requests that wait for an engine: a fair share for every caller, and first come, first served within it.

Start-time fair queueing (Goyal, Vin, Cheng 1996): a request is due at the virtual time at which its caller's work
before it would have ended if every caller who waits had an equal share of the engine; who is due first is next. So a
caller with little work is not held up by one with much, however much that one has queued before. Requests of batch
priority are a queue of their own behind all others.

No narrow request overtakes a wide one that is next, which waits for enough room: it would use a few more rows, and let
a stream of narrow ones starve the wide one. Only callers who hold little pass those who wait for room, into a part of
the rows that is theirs (`shares.py`).
"""

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile

from beamline_server.engine.admission import cost
from beamline_server.engine.request import Account, GenerationRequest, Priority, RequestId


@dataclass(frozen=True, slots=True, order=True)
class _Queued:
    priority: int
    due: float
    number: int
    request: GenerationRequest = field(compare=False)


@dataclass(slots=True)
class _Clock:
    """The virtual time of a priority.

    Attributes:
        now: When the last one that started was due.
        ends: When all that a caller has asked for would have ended.
    """

    now: float = 0.0
    ends: dict[str, float] = field(default_factory=dict)

    def due(self, caller: str, work: float) -> float:
        """When a caller's next request is due, with so much work."""
        due = max(self.now, self.ends.get(caller, 0.0))
        self.ends[caller] = due + work
        return due

    def advance(self, due: float) -> None:
        """One that was due at this time starts."""
        self.now = max(self.now, due)
        self.ends = {caller: end for caller, end in self.ends.items() if end > self.now}


class Queue:
    """Waiting requests with the time at which each came, in seconds of the engine's clock."""

    def __init__(self) -> None:
        self._queued: list[_Queued] = []  # who is next comes first
        self._clocks = {priority.value: _Clock() for priority in Priority}
        self._came = 0
        self._came_at: dict[int, float] = {}  # of those who wait, by number, so the oldest first
        self.rows = 0
        """Rows that all of them ask for."""
        self.waiting = Counter[Account]()
        """How many of each account wait."""
        self.earliest_deadline = math.inf

    def __len__(self) -> int:
        return len(self._queued)

    def __iter__(self) -> Iterator[GenerationRequest]:
        return (waiting.request for waiting in self._queued)

    @property
    def oldest_at(self) -> float:
        """When the one came that waits for longest."""
        return next(iter(self._came_at.values()))

    def append(self, request: GenerationRequest, now: float, work: float = 1.0) -> None:
        """A request comes, with so much work, in any unit that is the same for all."""
        priority = request.priority.value
        due = self._clocks[priority].due(request.caller, work)
        self._came += 1
        self._came_at[self._came] = now
        insort(self._queued, _Queued(priority, due, self._came, request))
        self.rows += cost(request).rows
        self.waiting[request.account] += 1
        if request.deadline is not None:
            self.earliest_deadline = min(self.earliest_deadline, request.deadline)

    def take(self, requests: Sequence[GenerationRequest]) -> list[tuple[GenerationRequest, float]]:
        """Take those who start, which are here in this order, with the times at which they came."""
        taken: list[_Queued] = []
        kept: list[_Queued] = []
        for waiting in self._queued:
            if len(taken) == len(requests):
                break
            (taken if waiting.request is requests[len(taken)] else kept).append(waiting)
        self._queued[: len(taken) + len(kept)] = kept
        for priority, of_it in groupby(taken, key=lambda waiting: waiting.priority):
            self._clocks[priority].advance(max(waiting.due for waiting in of_it))
        return [(waiting.request, self._leave(waiting)) for waiting in taken]

    def cancel(self, ids: Collection[RequestId]) -> list[GenerationRequest]:
        """Take out requests by their ids; those that are not here are left out."""
        return self._take_out(lambda request: request.id in ids)

    def expire(self, now: float) -> list[GenerationRequest]:
        """Take out the requests whose deadline has come."""
        if now < self.earliest_deadline:
            return []
        late = self._take_out(lambda request: request.deadline is not None and request.deadline <= now)
        self.earliest_deadline = min((r.deadline for r in self if r.deadline is not None), default=math.inf)
        return late

    def give_up(self, hopeless: Callable[[GenerationRequest, float], bool], now: float) -> list[GenerationRequest]:
        """Take out those who are next and hopeless now."""
        gone = list(takewhile(lambda request: hopeless(request, now), self))
        return [request for request, _ in self.take(gone)] if gone else []

    def clear(self) -> list[GenerationRequest]:
        """Take out all."""
        return self._take_out(lambda _: True)

    def _take_out(self, goes: Callable[[GenerationRequest], bool]) -> list[GenerationRequest]:
        leaving = [waiting for waiting in self._queued if goes(waiting.request)]
        if leaving:
            self._queued = [waiting for waiting in self._queued if not goes(waiting.request)]
        for waiting in leaving:
            self._leave(waiting)
        return [waiting.request for waiting in leaving]

    def _leave(self, waiting: _Queued) -> float:
        """One waits no more; returns when it came."""
        self.rows -= cost(waiting.request).rows
        self.waiting[waiting.request.account] -= 1
        if not self.waiting[waiting.request.account]:
            del self.waiting[waiting.request.account]
        return self._came_at.pop(waiting.number)
