"""The requests that wait for an engine: first come, first served, but for those that nobody waits for any more.

Without overtaking: a wide request at the head waits for enough room and holds back what came after it. Letting narrow
ones pass would use a few more rows and let a stream of them starve it.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator

from beamline_server.engine.admission import cost
from beamline_server.engine.request import GenerationRequest, RequestId


class Queue:
    """Waiting requests with the time at which each came, in seconds of the engine's clock."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[GenerationRequest, float]] = deque()
        self.rows = 0
        """Rows that all of them ask for."""
        self.earliest_deadline = math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[GenerationRequest]:
        return (request for request, _ in self._waiting)

    @property
    def oldest_at(self) -> float:
        """When the head of the queue came."""
        return self._waiting[0][1]

    def append(self, request: GenerationRequest, now: float) -> None:
        """A request comes."""
        self._waiting.append((request, now))
        self.rows += cost(request).rows
        if request.deadline is not None:
            self.earliest_deadline = min(self.earliest_deadline, request.deadline)

    def take(self, count: int) -> list[tuple[GenerationRequest, float]]:
        """Take requests from the head, with the times at which they came."""
        taken = [self._waiting.popleft() for _ in range(count)]
        self.rows -= sum(cost(request).rows for request, _ in taken)
        return taken

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

    def clear(self) -> list[GenerationRequest]:
        """Take out all."""
        return self._take_out(lambda _: True)

    def _take_out(self, goes: Callable[[GenerationRequest], bool]) -> list[GenerationRequest]:
        leaving = [request for request in self if goes(request)]
        if leaving:
            self._waiting = deque(entry for entry in self._waiting if not goes(entry[0]))
            self.rows -= sum(cost(request).rows for request in leaving)
        return leaving
