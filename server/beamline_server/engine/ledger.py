"""Who holds how much of an engine; so, who takes the next request, and who has to come back, and when.

Bookkeeping alone: no thread, no lock, no clock of its own. Times are in seconds of the engine's clock.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from beamline_server.engine.errors import QueueFull, WouldBeLate
from beamline_server.engine.pace import Pace
from beamline_server.engine.request import GenerationRequest, Priority, RequestId

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.02, 5.0
_WAIT_MARGIN, _SERVICE_MARGIN, _MOST_MARGIN_S = 2.0, 0.3, 0.6
"""How much longer than expected may be waited, and computed, if an answer is to be in time: parts of what is expected,
and no more than so many seconds. A short queue is enough to keep a worker busy, and a long one makes everybody late at
the least disturbance (ADR 0014)."""
_FAIRLY = 1.5
"""How much more than there is room for may be held, by callers who have less than their share."""


@dataclass(slots=True)
class _Held:
    """What a worker, a caller or a request holds: rows, and the row-steps that are expected of them."""

    rows: int = 0
    work: float = 0.0

    def add(self, share: "_Held", times: int) -> None:
        self.rows += times * share.rows
        self.work += times * share.work


class _Entry(NamedTuple):
    """Who has a request, whose it is, what it holds, and whether others go first."""

    worker: int
    caller: str
    share: _Held
    priority: Priority


class Ledger:
    """What all requests hold that have been accepted and have not ended.

    Args:
        paces: How fast each worker is, as it learns it.
        worker_rows: Rows that a worker can run at a time.
        queue_rows: Rows that may wait, all workers together.
        now: The time.
    """

    def __init__(self, paces: Sequence[Pace], worker_rows: int, queue_rows: int, now: float) -> None:
        self._paces = paces
        self._worker_rows = worker_rows
        self._queue_rows = queue_rows
        self._requests: dict[RequestId, _Entry] = {}
        self._workers = [_Held() for _ in paces]
        self._batch = [_Held() for _ in paces]  # of which others go first
        self._callers: dict[str, _Held] = {}
        self._ended_per_s = 0.0
        self._last_ended_at = self._promised_until = now

    @property
    def room(self) -> int:
        """Rows that can be held at a time."""
        return len(self._workers) * self._worker_rows + self._queue_rows

    @property
    def requests(self) -> Collection[RequestId]:
        """All that hold something."""
        return self._requests.keys()

    def check(self) -> None:
        """Raise AssertionError unless nobody holds anything."""
        assert not self._requests, "requests without an outcome"
        assert not self._callers, "callers who hold something without a request"
        assert not any(held.rows for held in (*self._workers, *self._batch)), "rows held by nobody"

    def worker_of(self, number: RequestId) -> int | None:
        """Who has a request; None if it holds nothing (any more)."""
        entry = self._requests.get(number)
        return None if entry is None else entry.worker

    def rows_of(self, worker: int) -> int:
        """Rows that a worker holds."""
        return self._workers[worker].rows

    def hold(self, request: GenerationRequest, worker: int) -> None:
        """A worker takes a request."""
        # Those of its beams: what a prefix takes beyond them comes back when it has been fed.
        share = _Held(request.options.beam_size, self._paces[worker].work(request))
        self._workers[worker].add(share, 1)
        self._callers.setdefault(request.caller, _Held()).add(share, 1)
        if request.priority is Priority.BATCH:
            self._batch[worker].add(share, 1)
        self._requests[request.id] = _Entry(worker, request.caller, share, request.priority)

    def let_go(self, number: RequestId) -> bool:
        """A request ends; returns whether it held anything."""
        entry = self._requests.pop(number, None)
        if entry is None:
            return False
        self._workers[entry.worker].add(entry.share, -1)
        if entry.priority is Priority.BATCH:
            self._batch[entry.worker].add(entry.share, -1)
        of_caller = self._callers[entry.caller]
        of_caller.add(entry.share, -1)
        if of_caller.rows == 0:
            del self._callers[entry.caller]
        return True

    def ended(self, requests: int, now: float) -> None:
        """So many requests have ended together."""
        elapsed, self._last_ended_at = max(now - self._last_ended_at, 1e-6), now
        weight = min(1.0, elapsed)
        self._ended_per_s += weight * (requests / elapsed - self._ended_per_s)

    def full(
        self, caller: str, rows: int, requests: int, now: float, priority: Priority = Priority.NORMAL
    ) -> QueueFull | None:
        """What to say to a caller of some requests with so many rows, if there is no room for them.

        A caller who has less than a fair share of what can be held finds room for it although others have taken more.
        What others go before finds room in half of the queue.
        """
        held = sum(held.rows for held in self._workers)
        room = self.room - (0 if priority is Priority.NORMAL else self._queue_rows // 2)
        if held + rows <= room:
            return None
        own = self._callers.get(caller, _Held()).rows
        share = room // (1 + len(self._callers.keys() - {caller}))
        if own + rows <= share and held + rows <= _FAIRLY * room:
            return None
        queued = max(0, held - len(self._workers) * self._worker_rows)
        return QueueFull(queued, self._queue_rows, self._retry_after_s(requests, now))

    def late(self, requests: Sequence[GenerationRequest], now: float) -> WouldBeLate | None:
        """What to say if one of these, which hold their rows already, is expected to be late."""
        for request in requests:
            if request.deadline is not None:
                worker = self._requests[request.id].worker
                service_s = self._busy(worker) * self._paces[worker].service_s(request)
                wait_s, remaining_s = self._wait_s(worker, request.caller, request.priority), request.deadline - now
                if not _in_time(wait_s, service_s, remaining_s):
                    return WouldBeLate(wait_s + service_s, remaining_s, self._retry_after_s(len(requests), now))
        return None

    def foreseen(
        self, worker: int, caller: str, remaining_s: float, ahead: int, now: float
    ) -> QueueFull | WouldBeLate | None:
        """What to say to a caller of a request of which nothing is known, if it would be refused.

        Args:
            worker: Who would take it.
            caller: Who asks.
            remaining_s: The time that there is for it.
            ahead: Requests that will have been accepted before it.
            now: The time.
        """
        if full := self.full(caller, 1 + ahead, 1, now):
            return full
        pace = self._paces[worker]
        wait_s = self._wait_s(worker, caller, Priority.NORMAL) + pace.wait_s(
            ahead / len(self._workers) * pace.work_per_answer
        )
        service_s = self._busy(worker) * pace.usual_service_s
        if _in_time(wait_s, service_s, remaining_s):
            return None
        return WouldBeLate(wait_s + service_s, remaining_s, self._retry_after_s(1, now))

    def _busy(self, worker: int) -> float:
        """How much of its rows a worker has to do with: steps of few rows are shorter than those that it remembers."""
        return min(1.0, self._workers[worker].rows / self._worker_rows)

    def _wait_s(self, worker: int, caller: str, priority: Priority) -> float:
        """How long a caller's newcomer waits at a worker: until what is queued before it has ended.

        That is no more than the caller itself has there, for each caller: shares are fair.
        """
        held, batch, pace = self._workers[worker], self._batch[worker], self._paces[worker]
        queued = max(0, held.rows - self._worker_rows)
        if priority is Priority.BATCH:
            return pace.wait_s(held.work * queued / held.rows) if queued else 0.0
        rows, work = held.rows - batch.rows, held.work - batch.work
        queued = min(queued, rows)
        if not queued:
            return 0.0
        own = self._callers.get(caller, _Held())
        fair = own.work / len(self._workers) * len(self._callers)
        return pace.wait_s(min(work * queued / rows, fair))

    def _retry_after_s(self, requests: int, now: float) -> float:
        """When as many requests could be taken, at the rate of the last second or so, behind all who were told before.

        Who is refused gets a time of its own: otherwise all would come back at once, and most of them in vain.
        """
        if self._ended_per_s <= 0:
            return _LONGEST_RETRY_S
        self._promised_until = max(self._promised_until, now) + requests / self._ended_per_s
        if self._promised_until > now + _LONGEST_RETRY_S:  # the earliest again, or everybody would be told the longest
            self._promised_until = now
        return min(max(self._promised_until - now, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)


def _in_time(wait_s: float, service_s: float, remaining_s: float) -> bool:
    """Whether there is time for as long as it is expected to wait and to compute, and a margin; for nothing, always."""
    expected_s = wait_s + service_s
    margin_s = min(_WAIT_MARGIN * wait_s + _SERVICE_MARGIN * service_s, _MOST_MARGIN_S)
    return expected_s == 0 or expected_s + margin_s <= remaining_s
