"""Refuses calls before they are read, while the engine could not take them whatever they ask for; few send at a time.

A refusal has to cost next to nothing: at ten times the load that a server can bear, nine of ten calls are refused.

Nobody knows how much a call will send, or when. So calls are bounded by number: those that are open, of each method,
and those that are let in and have not sent their message. Most send it at once. Who has had a place for a while gives
it up to those who wait for one.
"""

import asyncio
import itertools
import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from beamline_server.engine.errors import DeadlineExceeded, QueueFull, WouldBeLate
from beamline_server.metrics import Clock, MethodMetrics, Metrics
from beamline_server.rpc.call import end_call
from beamline_server.rpc.desk import Desk
from beamline_server.rpc.errors import RpcStatus, ServerFull, rpc_status_of, stretched
from beamline_server.rpc.interceptors import caller_of, identity
from beamline_server.rpc.unread import refused_metadata

_STATUSES_KEPT = 4096
_LONGEST_LAG_S = 2.0
PLACES = 64
"""Calls that may send their messages at a time."""
_MANY_PLACES = 8
"""Of one caller; whoever has more gives one up sooner."""
_TIME_TO_SEND_S, _LITTLE_TIME_S = 5.0, 1.0
"""For which a call keeps its place though others wait for one, in seconds; and the call of somebody who has many."""
_LOOK_EVERY_S = 0.1
_COME_AGAIN_S = 1.0
_PLACE = "place-in-doorway"
"""Key under which a call keeps its place, where its trailing metadata will be: until a handler sets them, they are the
one thing of a call that the gate can write and the handler can read."""


@dataclass(slots=True)
class _Sending:
    """A call that may send its message.

    Attributes:
        since: When it got its place.
        caller: Who makes it.
        path: Of its method.
        context: Of the call.
    """

    since: float
    caller: str
    path: bytes
    context: Any


class Gate:
    """What calls come to first.

    Args:
        desk: Tells what the engine would refuse.
        methods: The series of the methods that generate, by their paths.
        most_open: Calls of a method that may be open at a time,
        except_for: but for some methods, by their paths.
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
        most_open: int,
        except_for: Mapping[bytes, int],
        max_duration_s: float,
        caller_key: str | None,
        jitter: random.Random,
        clock: Clock,
    ) -> None:
        self._desk = desk
        self._methods = methods
        self._metrics = metrics
        self._most_open = most_open
        self._except_for = except_for
        self._max_duration_s = max_duration_s
        self._caller_key = caller_key
        self._jitter = jitter
        self._clock = clock
        self._statuses: dict[tuple[str, int], RpcStatus] = {}
        self._too_late = rpc_status_of(DeadlineExceeded("transport"), stretch=1)
        self._doorway: dict[int, float] = {}  # when those came whom nobody handles yet, by their place
        self._numbers = itertools.count()
        self._sending: dict[int, _Sending] = {}
        self._free_places = PLACES
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._looking: asyncio.TimerHandle | None = None
        self._open: Counter[bytes] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lag_s = 0.0

    def __call__(self, path: bytes | None, context: Any) -> RpcStatus | None:
        """How to end a call that has just come, of a method that is served or None; None to let it in."""
        method = None if path is None else self._methods.get(path)
        if too_large := refused_metadata(context.invocation_metadata() or ()):
            status = rpc_status_of(too_large, stretch=1)
            return status if method is None else self._counted(method, status)
        if path is None:
            return None
        if self._open[path] >= self._except_for.get(path, self._most_open):
            return self._refused(method, context, self._status(_TOO_MANY_OPEN))
        if method is None:
            self._admit(context)
            return None
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            return self._refused(method, context, self._too_late)
        in_time = remaining_s is not None and remaining_s <= self._max_duration_s
        caller = caller_of(context, self._caller_key)
        now = self._clock()
        while self._doorway and next(iter(self._doorway.values())) < now - _LONGEST_LAG_S:
            self._pass(next(iter(self._doorway)))
        # As long as it takes to come in, it takes to go out.
        lag_s = self._lag_s if self._doorway else 0.0
        left_s = (remaining_s if in_time else self._max_duration_s) - 2 * lag_s
        error = self._desk.foreseen_refusal(caller, left_s, len(self._doorway))
        if error is None:
            self._doorway[self._admit(context)] = now
            return None
        return self._refused(method, context, self._status(error))

    def is_to_decide(self, path: bytes) -> bool:
        """Whether calls of a path may be refused for what comes at the same time."""
        return path in self._methods

    def too_late(self, path: bytes) -> None:
        """A call has not been decided by its deadline."""
        self._counted(self._methods[path], self._too_late)

    async def place(self, path: bytes, context: Any) -> None:
        """Wait until a call that was let in may send its message."""
        if self._free_places:
            self._free_places -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            self._look_now_and_then()
            await turn
        caller = caller_of(context, self._caller_key)
        self._sending[_number_of(context)] = _Sending(self._clock(), caller, path, context)

    def _free(self, number: int) -> None:
        """A call needs its place no more, if it has one."""
        if self._sending.pop(number, None) is None:
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free_places += 1

    def _look_now_and_then(self) -> None:
        """As long as somebody waits for a place, look for those who have had theirs for too long."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        self._looking = None
        while self._waiting and (slow := self._too_slow()) is not None:
            self._put_out(slow)
        if self._waiting:
            self._look_now_and_then()

    def _too_slow(self) -> int | None:
        """The oldest call of the caller who has most places, if it has to give its place up."""
        if not self._sending:
            return None
        [(caller, places)] = Counter(sending.caller for sending in self._sending.values()).most_common(1)
        number, first = next(found for found in self._sending.items() if found[1].caller == caller)
        time_s = _LITTLE_TIME_S if places > _MANY_PLACES else _TIME_TO_SEND_S
        return number if self._clock() - first.since >= time_s else None

    def _admit(self, context: Any) -> int:
        """Let a call in; returns its number, which it keeps."""
        number = next(self._numbers)
        context.set_trailing_metadata(((_PLACE, str(number)),))
        return number

    def _put_out(self, number: int) -> None:
        """End a call that has not sent its message."""
        slow = self._sending[number]
        self._free(number)
        status = self._status(_TOO_SLOW)
        method = self._methods.get(slow.path)
        if method is not None:
            self._counted(method, status)
        task = asyncio.get_running_loop().create_task(end_call(slow.context, status.code, status.text, status.trailers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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

    def entered(self, path: str, context: Any) -> float:
        """A call has sent its message and is now being handled; returns when it came."""
        self._open[path.encode()] += 1
        now, place = self._clock(), _number_of(context)
        self._free(place)
        came = self._doorway.get(place)
        if came is None:  # it has not come this way, or took so long that it was passed
            return now
        self._lag_s = now - came
        self._pass(place)
        return came

    def left(self, path: str) -> None:
        """A call is being handled no more."""
        self._open[path.encode()] -= 1

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


_TOO_MANY_OPEN = ServerFull("too many calls of this method are open", _COME_AGAIN_S)
_TOO_SLOW = ServerFull("the request has taken too long to come, and others wait to send theirs", _COME_AGAIN_S)


def _number_of(context: Any) -> int:
    """The number of a call that was let in; -1 for others."""
    return int(dict(context.trailing_metadata() or ()).get(_PLACE, -1))
