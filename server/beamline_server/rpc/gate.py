"""Refuses calls before they are read, while the engine could not take them whatever they ask for.

A refusal has to cost next to nothing: at ten times the load that a server can bear, nine of ten calls are refused.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from beamline_server.metrics import MethodMetrics, Metrics
from beamline_server.rpc.desk import Desk
from beamline_server.rpc.errors import RpcStatus, rpc_status_of, stretched
from beamline_server.rpc.interceptors import caller_of, identity


class Gate:
    """What calls come to first.

    Args:
        desk: Tells what the engine would refuse.
        methods: The series of the methods that generate, by their paths.
        metrics: Counts the requests.
        max_duration_s: Longest time for a request, in seconds.
        caller_key: Metadata key whose value names the caller.
        jitter: Spreads the delays that refused callers are advised.
    """

    def __init__(
        self,
        desk: Desk,
        methods: Mapping[bytes, MethodMetrics],
        metrics: Metrics,
        *,
        max_duration_s: float,
        caller_key: str | None,
        jitter: random.Random,
    ) -> None:
        self._desk = desk
        self._methods = methods
        self._metrics = metrics
        self._max_duration_s = max_duration_s
        self._caller_key = caller_key
        self._jitter = jitter

    def __call__(self, path: bytes, context: Any) -> RpcStatus | None:
        """How to end a call that has just come; None to let it in."""
        method = self._methods.get(path)
        if method is None:
            return None
        remaining_s = context.time_remaining()
        in_time = remaining_s is not None and remaining_s <= self._max_duration_s
        caller = caller_of(context, self._caller_key)
        error = self._desk.foreseen_refusal(caller, remaining_s if in_time else self._max_duration_s)
        if error is None:
            return None
        status = rpc_status_of(error, stretch=stretched(self._jitter))
        method.started()
        method.handled(status.code.name, 0.0)
        self._metrics.request_ended(status.outcome, 0.0)
        return replace(status, trailers=(*identity(context, self._metrics), *status.trailers))
