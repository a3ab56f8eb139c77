"""The standard health service, and who decides what it says.

The names "" and "beamline.v1.GenerationService" tell whether the server is ready for requests; "live" tells whether
restarting it would help.
"""

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from typing import Any

from grpc_health.v1 import health, health_pb2

from beamline_server.engine.workers import EngineLoad
from beamline_server.metrics import Clock, Metrics

SERVICE = "beamline.v1.GenerationService"
READINESS_NAMES = ("", SERVICE)
LIVENESS_NAME = "live"

STALL_S = 30.0
LOOK_EVERY_S = 1.0

_log = logging.getLogger(__name__)


class Health:
    """What the health service says. Not ready, but alive, until told otherwise.

    Attributes:
        servicer: To be added to the server.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.servicer: Any = health.aio.HealthServicer()  # type: ignore[attr-defined, unused-ignore]  # stubs lack aio
        self._metrics = metrics

    async def begin(self) -> None:
        """Say not ready and alive; to be called before the server starts."""
        await self.set_ready(False)
        await self.set_alive(True)

    async def set_ready(self, ready: bool) -> None:
        """Tell whether requests should come here."""
        # One name at a time: the servicer's own way to shut down would also deny that the process is alive.
        for name in READINESS_NAMES:
            await self.servicer.set(name, _status(ready))
        self._metrics.ready.set(ready)

    async def set_alive(self, alive: bool) -> None:
        """Tell whether a restart would help (False) or not."""
        await self.servicer.set(LIVENESS_NAME, _status(alive))


class Condition(Enum):
    """How an engine is."""

    WORKING = "working"
    STALLED = "stalled"
    """It has rows in work and has not made a step for long."""
    DEAD = "dead"
    """A worker has died; it will not recover."""


class EngineWatch:
    """Judges an engine by its load, looked at every now and then.

    Args:
        load: Tells the engine's load.
        clock: The engine's clock, monotonic seconds.
        stall_s: Time without a step after which work counts as stalled, in seconds.
    """

    def __init__(self, load: Callable[[], EngineLoad], clock: Clock, *, stall_s: float = STALL_S) -> None:
        self._load = load
        self._clock = clock
        self._stall_s = stall_s
        self._busy_since: float | None = None

    def look(self) -> Condition:
        """How the engine is now."""
        load, now = self._load(), self._clock()
        if not load.alive:
            return Condition.DEAD
        if load.running_rows == 0:
            self._busy_since = None
            return Condition.WORKING
        # The last step may be from before a long idle time, so the engine's time starts with the work.
        if self._busy_since is None:
            self._busy_since = now
        last_sign = max(self._busy_since, load.last_step_at or self._busy_since)
        return Condition.STALLED if now - last_sign > self._stall_s else Condition.WORKING


async def watch_engine(watch: EngineWatch, told: Health, *, look_every_s: float = LOOK_EVERY_S) -> None:
    """Keep "live" up to date in the health service that is told; returns when the engine is dead."""
    before = Condition.WORKING
    while True:
        condition = watch.look()
        if condition is not before:
            before = condition
            _log.warning("the engine's condition", extra={"event": "engine_condition", "condition": condition.value})
            await told.set_alive(condition is Condition.WORKING)
        if condition is Condition.DEAD:
            return
        await asyncio.sleep(look_every_s)


def _status(serving: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
