"""Refuses calls before they are read, while the engine could not take them whatever they ask for.

A refusal has to cost next to nothing: at ten times the load that a server can bear, nine of ten calls are refused.
"""

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from beamline_server.engine.errors import DeadlineExceeded, QueueFull, WouldBeLate
from beamline_server.metrics import Clock, MethodMetrics, Metrics
from beamline_server.rpc.desk import Desk
from beamline_server.rpc.errors import RpcStatus, rpc_status_of, stretched
from beamline_server.rpc.interceptors import caller_of, identity
from beamline_server.rpc.unread import refused_metadata

_STATUSES_KEPT = 4096
_LONGEST_LAG_S = 2.0
_PLACE = "place-in-doorway"
"""Key under which a call keeps its place, where its trailing metadata will be: until a handler sets them, they are the
one thing of a call that the gate can write and the handler can read."""


class Gate:
    """What calls come to first.

    Args:
        desk: Tells what the engine would refuse.
        methods: The series of the methods that generate, by their paths.
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
        max_duration_s: float,
        caller_key: str | None,
        jitter: random.Random,
        clock: Clock,
    ) -> None:
        self._desk = desk
        self._methods = methods
        self._metrics = metrics
        self._max_duration_s = max_duration_s
        self._caller_key = caller_key
        self._jitter = jitter
        self._clock = clock
        self._statuses: dict[tuple[str, int], RpcStatus] = {}
        self._too_late = rpc_status_of(DeadlineExceeded("transport"), stretch=1)
        self._doorway: dict[int, float] = {}  # when those came whom nobody handles yet, by their place
        self._places = itertools.count()
        self._lag_s = 0.0

    def __call__(self, path: bytes | None, context: Any) -> RpcStatus | None:
        """How to end a call that has just come, of a method that is served or None; None to let it in."""
        method = None if path is None else self._methods.get(path)
        if too_large := refused_metadata(context.invocation_metadata() or ()):
            status = rpc_status_of(too_large, stretch=1)
            return status if method is None else self._counted(method, status)
        if method is None:
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
            place = next(self._places)
            self._doorway[place] = now
            context.set_trailing_metadata(((_PLACE, str(place)),))
            return None
        return self._refused(method, context, self._status(error))

    def _refused(self, method: MethodMetrics, context: Any, status: RpcStatus) -> RpcStatus:
        """The status of a call, which is counted and has its id."""
        self._counted(method, status)
        own = identity(context, self._metrics)
        return RpcStatus(status.code, status.text, (*own, *status.trailers), status.outcome)

    def _counted(self, method: MethodMetrics, status: RpcStatus) -> RpcStatus:
        method.started()
        method.handled(status.code.name, 0.0)
        self._metrics.request_ended(status.outcome, 0.0)
        return status

    def entered(self, context: Any) -> float:
        """A call that was let in is now being handled; returns when it came."""
        now = self._clock()
        place = int(dict(context.trailing_metadata() or ()).get(_PLACE, -1))
        came = self._doorway.get(place)
        if came is None:  # it has not come this way, or took so long that it was passed
            return now
        self._lag_s = now - came
        self._pass(place)
        return came

    def _pass(self, place: int) -> None:
        """Forget one who is in the doorway, and those before it: they hold up nobody, as their callers send nothing."""
        for number in list(itertools.takewhile(lambda number: number <= place, self._doorway)):
            del self._doorway[number]

    def _status(self, error: QueueFull | WouldBeLate) -> RpcStatus:
        """The status of an error, with an advised delay of whole fiftieths of a second, so that few are to be made."""
        fiftieths = round(50 * error.retry_after_s * stretched(self._jitter))
        key = (str(error), fiftieths)
        if key not in self._statuses:
            if len(self._statuses) >= _STATUSES_KEPT:
                self._statuses.clear()
            self._statuses[key] = rpc_status_of(replace(error, retry_after_s=fiftieths / 50), stretch=1)
        return self._statuses[key]
