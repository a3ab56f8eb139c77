"""What the health service says, and when."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from beamline_server.engine.workers import EngineLoad
from beamline_server.metrics import Metrics
from beamline_server.rpc.health import LIVENESS_NAME, SERVICE, Condition, EngineWatch, Health, watch_engine
from doubles.service import ManualClock, RunningService, ScriptedEngine, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def stub_of(service: RunningService) -> Any:
    return health_pb2_grpc.HealthStub(service.channel)  # type: ignore[no-untyped-call, unused-ignore]  # generated


async def said(service: RunningService, name: str) -> int:
    answer = await stub_of(service).Check(health_pb2.HealthCheckRequest(service=name))
    return int(answer.status)


async def test_readiness_follows_and_liveness_stays() -> None:
    async with serving(ready=False) as service:
        assert [await said(service, name) for name in ("", SERVICE, "live")] == [NOT_SERVING, NOT_SERVING, SERVING]
        await service.health.set_ready(True)
        assert [await said(service, name) for name in ("", SERVICE, "live")] == [SERVING, SERVING, SERVING]
        assert service.metrics.registry.get_sample_value("beamline_ready") == 1
        await service.health.set_ready(False)
        assert [await said(service, name) for name in ("", SERVICE, "live")] == [NOT_SERVING, NOT_SERVING, SERVING]
        assert service.metrics.registry.get_sample_value("beamline_ready") == 0


async def test_unknown_names_are_not_found() -> None:
    async with serving() as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await said(service, "nobody")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_watchers_are_told_of_changes() -> None:
    async with serving(ready=False) as service:
        watch = stub_of(service).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == NOT_SERVING
        await service.health.set_ready(True)
        assert (await watch.read()).status == SERVING
        watch.cancel()


class Load:
    """An engine's load that a test changes."""

    def __init__(self) -> None:
        self.rows = 0
        self.last_step_at: float | None = None
        self.alive = True

    def __call__(self) -> EngineLoad:
        return EngineLoad(0, 0, self.rows, self.rows, 128, 1024, self.last_step_at, self.alive)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def load() -> Load:
    return Load()


@pytest.fixture
def watch(load: Load, clock: ManualClock) -> EngineWatch:
    return EngineWatch(load, clock, stall_s=30)


def test_an_idle_engine_never_stalls(watch: EngineWatch, clock: ManualClock) -> None:
    clock.now += 1000
    assert watch.look() is Condition.WORKING


def test_work_without_a_step_for_long_is_a_stall(watch: EngineWatch, load: Load, clock: ManualClock) -> None:
    load.rows, load.last_step_at = 4, clock.now
    assert watch.look() is Condition.WORKING
    clock.now += 30
    assert watch.look() is Condition.WORKING
    clock.now += 1
    assert watch.look() is Condition.STALLED
    load.last_step_at = clock.now
    assert watch.look() is Condition.WORKING


def test_idle_time_before_the_work_does_not_count(watch: EngineWatch, load: Load, clock: ManualClock) -> None:
    load.last_step_at = clock.now - 1000
    load.rows = 4
    assert watch.look() is Condition.WORKING
    load.rows = 0
    clock.now += 1000
    assert watch.look() is Condition.WORKING
    load.rows = 4
    assert watch.look() is Condition.WORKING


def test_the_first_step_may_not_take_forever(watch: EngineWatch, load: Load, clock: ManualClock) -> None:
    load.rows = 1
    assert watch.look() is Condition.WORKING
    clock.now += 31
    assert watch.look() is Condition.STALLED


def test_a_dead_worker_is_death(watch: EngineWatch, load: Load) -> None:
    load.alive = False
    assert watch.look() is Condition.DEAD


async def test_liveness_follows_the_engine() -> None:
    health, clock, load = Health(Metrics(CollectorRegistry())), ManualClock(), Load()
    await health.begin()
    told: list[bool] = []
    changed = asyncio.Event()

    class Told(Health):
        async def set_alive(self, alive: bool) -> None:
            told.append(alive)
            changed.set()

    load.rows = 1
    watching = asyncio.create_task(
        watch_engine(EngineWatch(load, clock), Told(Metrics(CollectorRegistry())), look_every_s=0)
    )
    await asyncio.sleep(0)
    clock.now += 31
    await changed.wait()
    changed.clear()
    load.last_step_at = clock.now
    await changed.wait()
    changed.clear()
    load.alive = False
    await watching
    assert told == [False, True, False]


async def test_a_dead_engine_ends_the_watch_and_liveness() -> None:
    async with serving() as service:
        engine: ScriptedEngine = service.engine
        engine.alive = False
        await watch_engine(EngineWatch(engine.load, ManualClock()), service.health)
        assert await said(service, LIVENESS_NAME) == NOT_SERVING
