"""Refuses calls before they are read, while the engine could not take them whatever they ask for; few send at a time.

A refusal has to cost next to nothing: at ten times the load that a server can bear, nine of ten calls are refused.

Calls are bounded by number, too: those that are open, of each method, and those that send their message (`places.py`).
"""

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from beamline_server.engine.errors import DeadlineExceeded, QueueFull, WouldBeLate
from beamline_server.metrics import Clock, MethodMetrics, Metrics, Outcome
from beamline_server.rpc.call import end_call
from beamline_server.rpc.desk import Desk
from beamline_server.rpc.errors import NotAccepting, RpcStatus, ServerFull, rpc_status_of, stretched
from beamline_server.rpc.interceptors import caller_of, identity
from beamline_server.rpc.places import Places, Sending
from beamline_server.rpc.unread import refused_metadata

_STATUSES_KEPT = 4096
_LONGEST_LAG_S = 2.0
PLACES = 64
"""Calls that may send their requests for generation at a time."""
OTHER_PLACES = 16
"""Those of methods that do not generate, such as health checks."""
MOST_OPEN = 1024
"""Calls of a method that may be open at a time, unless it is said otherwise."""
_GENERATING = b""
_PLACE = "place-in-doorway"
"""Key under which a call keeps its place, where its trailing metadata will be: until a handler sets them, they are the
one thing of a call that the gate can write and the handler can read."""


class Gate:
    """What calls come to first.

    Args:
        desk: Tells what the engine would refuse.
        methods: The series of the methods that generate, by their paths.
        most_generating: Calls that may generate at a time.
        most_open: Calls of other methods that may be open at a time, by their paths; of all others `MOST_OPEN`.
        metrics: Counts the requests.
        max_duration_s: Longest time for a request, in seconds.
        caller_key: Metadata key whose value names the caller.
        jitter: Spreads the delays that refused callers are advised.
        clock: Monotonic seconds.
    """

    def __init__(  # noqa: PLR0913 - what it asks, whom it lets in, and by what
        self,
        desk: Desk,
        methods: Mapping[bytes, MethodMetrics],
        metrics: Metrics,
        *,
        most_generating: int,
        most_open: Mapping[bytes, int],
        max_duration_s: float,
        caller_key: str | None,
        jitter: random.Random,
        clock: Clock,
    ) -> None:
        self._desk = desk
        self._methods = methods
        self._metrics = metrics
        self._most_open = {_GENERATING: most_generating, **most_open}
        self._max_duration_s = max_duration_s
        self._caller_key = caller_key
        self._jitter = jitter
        self._clock = clock
        self._statuses: dict[tuple[str, int], RpcStatus] = {}
        self.draining = rpc_status_of(NotAccepting("DRAINING"), stretch=1)
        """How calls end that come when there are no more to come."""
        self._too_late = rpc_status_of(DeadlineExceeded("transport"), stretch=1)
        self._doorway: dict[int, float] = {}  # when those came whom nobody handles yet, by their number
        self._ends: list[tuple[float, int, bool]] = []  # heap: until when a number is awaited; whether its time is over
        self._numbers = itertools.count()
        self._places = {True: Places(PLACES, self._put_out, clock), False: Places(OTHER_PLACES, self._put_out, clock)}
        self._ended: set[int] = set()  # those that have been put out, until that is done
        self._open: Counter[bytes] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lag_s, self._lag_until = 0.0, 0.0  # how long the last one took to come in; until when that counts

    def __call__(self, path: bytes | None, context: Any) -> RpcStatus | None:
        """How to end a call that has just come, of a method that is served or None; None to let it in."""
        method = None if path is None else self._methods.get(path)
        if too_large := refused_metadata(context.invocation_metadata() or ()):
            status = rpc_status_of(too_large, stretch=1)
            return status if method is None else self._counted(method, status)
        if path is None:
            return None
        if self._open[self._kind(path)] >= self._most_open.get(self._kind(path), MOST_OPEN):
            return self._refused(method, context, self._status(_TOO_MANY_OPEN))
        if method is None:
            self._admit(context)
            return None
        if self._desk.is_closed:
            return self._refused(method, context, self.draining)
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            return self._refused(method, context, self._too_late)
        in_time = remaining_s is not None and remaining_s <= self._max_duration_s
        caller = caller_of(context, self._caller_key)
        now = self._clock()
        self._forget_the_absent(now)
        # As long as it takes to come in, it takes to go out.
        lag_s = self._lag_s if self._doorway and now < self._lag_until else 0.0
        left_s = (remaining_s if in_time else self._max_duration_s) - 2 * lag_s
        error = self._desk.foreseen_refusal(caller, left_s, len(self._doorway))
        if error is None:
            number = self._admit(context)
            self._doorway[number] = now
            ends = remaining_s is not None and remaining_s <= _LONGEST_LAG_S
            heapq.heappush(self._ends, (now + (remaining_s if ends else _LONGEST_LAG_S), number, ends))
            return None
        return self._refused(method, context, self._status(error))

    def is_to_decide(self, path: bytes) -> bool:
        """Whether calls of a path may be refused for what comes at the same time."""
        return path in self._methods

    def too_late(self, path: bytes) -> None:
        """A call has not been decided by its deadline."""
        self._counted(self._methods[path], self._too_late)

    def turn(self, path: bytes) -> asyncio.Future[None] | None:
        """What a call that was let in has to wait for before it may send its message; None for nothing."""
        return self._places[path in self._methods].turn()

    def may_send(self, path: bytes, context: Any) -> None:
        """A call that has waited for its turn may send its message."""
        number, places = _number_of(context), self._places[path in self._methods]
        remaining_s = context.time_remaining()
        # Nobody would know when it has sent it, or that it never will.
        if number < 0 or (remaining_s is not None and remaining_s <= 0):
            places.give_back()
        else:
            places.take(number, path, caller_of(context, self._caller_key), context)

    def _admit(self, context: Any) -> int:
        """Let a call in; returns its number, which it keeps."""
        number = next(self._numbers)
        context.set_trailing_metadata(((_PLACE, str(number)),))
        return number

    def _put_out(self, number: int, slow: Sending) -> None:
        """End a call that has not sent its message."""
        # Nobody tells whether its caller has gone. Most who send nothing have.
        status = replace(self._status(_TOO_SLOW), outcome=Outcome.CANCELLED)
        if (method := self._methods.get(slow.path)) is not None:
            self._counted(method, status)
        self._ended.add(number)
        task = asyncio.get_running_loop().create_task(end_call(slow.context, status.code, status.text, status.trailers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._ended.discard(number))

    def _refused(self, method: MethodMetrics | None, context: Any, status: RpcStatus) -> RpcStatus:
        """The status of a call, which is counted and has its id."""
        if method is not None:
            self._counted(method, status)
        own = identity(context, self._metrics)
        return RpcStatus(status.code, status.text, (*own, *status.trailers), status.outcome)

    def _counted(self, method: MethodMetrics, status: RpcStatus) -> RpcStatus:
        method.started()
        method.handled(status.code.name, 0.0)
        self._metrics.request_ended(status.outcome, 0.0)
        return status

    def entered(self, path: str, context: Any) -> float | None:
        """A call has sent its message and is now being handled; returns when it came, or None if it has been ended."""
        now, place = self._clock(), _number_of(context)
        if place in self._ended:
            return None
        name = path.encode()
        self._open[self._kind(name)] += 1
        self._places[name in self._methods].leave(place)
        came = self._doorway.get(place)
        if came is None:  # it has not come this way, or took so long that it was passed
            return now
        self._lag_s, self._lag_until = now - came, now + (now - came)
        self._pass(place)
        return came

    def left(self, path: str) -> None:
        """A call is being handled no more."""
        self._open[self._kind(path.encode())] -= 1

    def _kind(self, path: bytes) -> bytes:
        """What calls of a method are counted as: all that generate are of one kind."""
        return _GENERATING if path in self._methods else path

    def _forget_the_absent(self, now: float) -> None:
        """Forget who has been in the doorway for too long, or has no time left: gRPC has ended it, and tells nobody."""
        while self._ends and self._ends[0][0] <= now:
            _, number, has_ended = heapq.heappop(self._ends)
            self._doorway.pop(number, None)
            if has_ended:
                self._places[True].leave(number)

    def _pass(self, place: int) -> None:
        """Forget one who is in the doorway, and those before it: they hold up nobody, as their callers send nothing."""
        for number in list(itertools.takewhile(lambda number: number <= place, self._doorway)):
            del self._doorway[number]

    def _status(self, error: QueueFull | WouldBeLate | ServerFull) -> RpcStatus:
        """The status of an error, with an advised delay of whole fiftieths of a second, so that few are to be made."""
        fiftieths = round(50 * error.retry_after_s * stretched(self._jitter))
        key = (str(error), fiftieths)
        if key not in self._statuses:
            if len(self._statuses) >= _STATUSES_KEPT:
                self._statuses.clear()
            self._statuses[key] = rpc_status_of(replace(error, retry_after_s=fiftieths / 50), stretch=1)
        return self._statuses[key]


_TOO_MANY_OPEN = ServerFull("too many calls of this method are open")
_TOO_SLOW = ServerFull("the request has taken too long to come, and others wait to send theirs")


def _number_of(context: Any) -> int:
    """The number of a call that was let in; -1 for others."""
    return int(dict(context.trailing_metadata() or ()).get(_PLACE, -1))
