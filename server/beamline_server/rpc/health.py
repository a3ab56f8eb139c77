"""The standard health service, and who decides what it says.

The names "" and "beamline.v1.GenerationService" tell whether the server is ready for requests; "live" tells whether
restarting it would help.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamline_server.engine.workers import WorkerState
from beamline_server.metrics import Clock, Metrics
from beamline_server.rpc.desk import EngineLike

SERVICE = "beamline.v1.GenerationService"
READINESS_NAMES = ("", SERVICE)
LIVENESS_NAME = "live"

STALL_S = 25.0
LOOK_EVERY_S = 1.0

_Response = health_pb2.HealthCheckResponse
_Servicer: Any = health_pb2_grpc.HealthServicer
_log = logging.getLogger(__name__)


class Health(_Servicer):  # type: ignore[misc]  # grpc has no type information
    """The health service, and what it says: not ready, but alive, until told otherwise.

    Telling it something never waits. grpcio-health-checking's own servicer waits for the slowest of its watchers: one
    that takes no messages would keep a server from becoming ready, and from stopping.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._statuses: dict[str, int] = {}
        self._watchers: set[asyncio.Event] = set()
        self._metrics = metrics
        self.set_ready(False)
        self.set_alive(True)

    def set_ready(self, ready: bool) -> None:
        """Tell whether requests should come here."""
        self._set(READINESS_NAMES, ready)
        self._metrics.ready.set(ready)

    def set_alive(self, alive: bool) -> None:
        """Tell whether a restart would help (False) or not."""
        self._set((LIVENESS_NAME,), alive)

    @property
    def ready(self) -> bool:
        """Whether it says so."""
        return bool(self._statuses[SERVICE] == _Response.SERVING)

    def _set(self, names: tuple[str, ...], serving: bool) -> None:
        self._statuses |= dict.fromkeys(names, _Response.SERVING if serving else _Response.NOT_SERVING)
        for changed in self._watchers:
            changed.set()

    async def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        """The status of a name; NOT_FOUND for a name that is not known."""
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return _Response(status=self._statuses[request.service])

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status of a name now and whenever it has changed; what a slow watcher misses is only what is past."""
        del context
        known: int | None = None
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                status = self._statuses.get(request.service, _Response.SERVICE_UNKNOWN)
                if status != known:
                    known = status
                    yield _Response(status=status)
                await changed.wait()
        finally:
            self._watchers.discard(changed)


class Condition(Enum):
    """How an engine is, the worst last."""

    WORKING = "working"
    SUSPECT = "suspect"
    """The model has failed several times in a row in a worker."""
    STALLED = "stalled"
    """A worker has been given up, since it made no progress, or is suspect for long; restarting would help."""
    DEAD = "dead"
    """A worker has died; it will not recover."""


class Judgement(NamedTuple):
    """How an engine is, and whether requests should come to it: if a worker has been given up, to the others."""

    condition: Condition
    ready: bool


class EngineWatch:
    """Judges an engine, looked at every now and then, and gives up workers that make no progress.

    Time counts only as far as somebody looks, so that a process that was halted has not stalled.

    Args:
        engine: Is looked at.
        clock: Monotonic seconds.
        stall_s: Time in one step, or suspect, after which a worker counts as stalled, in seconds.
        look_every_s: How often somebody looks.
    """

    def __init__(
        self, engine: EngineLike, clock: Clock, *, stall_s: float = STALL_S, look_every_s: float = LOOK_EVERY_S
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._stall_s = stall_s
        self._look_every_s = look_every_s
        self._looked_at = clock()
        self._before: tuple[WorkerState, ...] = ()
        self._in_a_step_s: dict[int, float] = {}
        self._suspect_s: dict[int, float] = {}
        self._given_up: set[int] = set()

    def look(self) -> Judgement:
        """How the engine is now."""
        workers, now = self._engine.load().workers, self._clock()
        passed = min(now - self._looked_at, 2 * self._look_every_s)
        for number, worker in enumerate(workers):
            before = self._before[number] if self._before else WorkerState()
            goes_on = worker.round is not None and worker.round == before.round
            self._in_a_step_s[number] = self._in_a_step_s.get(number, 0.0) + passed if goes_on else 0.0
            self._suspect_s[number] = self._suspect_s.get(number, 0.0) + passed if worker.suspect else 0.0
            if worker.alive and self._in_a_step_s[number] >= self._stall_s:
                self._given_up.add(number)
                self._engine.give_up(number)
        self._before, self._looked_at = workers, now
        ready = any(w.alive for w in workers) and not any(w.suspect for w in workers)
        return Judgement(self._condition(workers), ready)

    def _condition(self, workers: Sequence[WorkerState]) -> Condition:
        if any(not worker.alive and number not in self._given_up for number, worker in enumerate(workers)):
            return Condition.DEAD
        if self._given_up or max(self._suspect_s.values(), default=0.0) >= self._stall_s:
            return Condition.STALLED
        return Condition.SUSPECT if any(worker.suspect for worker in workers) else Condition.WORKING


async def watch_engine(watch: EngineWatch, told: Health, *, look_every_s: float = LOOK_EVERY_S) -> None:
    """Keep the health service up to date, which says that the engine is ready; returns when the engine is dead."""
    before = Judgement(Condition.WORKING, True)
    while True:
        now = watch.look()
        if now.condition is not before.condition:
            fields = {"event": "engine_condition", "condition": now.condition.value}
            _log.warning("the engine's condition", extra=fields)
        if now != before:
            told.set_ready(now.ready)
            told.set_alive(now.condition in (Condition.WORKING, Condition.SUSPECT))
        if now.condition is Condition.DEAD:
            return
        before = now
        await asyncio.sleep(look_every_s)
