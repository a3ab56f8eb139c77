"""What the health service says, and when."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from beamline_server.engine.workers import WorkerState
from beamline_server.metrics import Metrics
from beamline_server.rpc.health import (
    LIVENESS_NAME,
    SERVICE,
    Condition,
    EngineWatch,
    Health,
    Judgement,
    watch_engine,
)
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
        service.health.set_ready(True)
        assert [await said(service, name) for name in ("", SERVICE, "live")] == [SERVING, SERVING, SERVING]
        assert service.metrics.registry.get_sample_value("beamline_ready") == 1
        service.health.set_ready(False)
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
        service.health.set_ready(True)
        assert (await watch.read()).status == SERVING
        watch.cancel()


class Engine(ScriptedEngine):
    """An engine whose workers a test moves on."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__(lambda events: None, workers=(WorkerState(),) * workers)

    def change(self, number: int, **fields: Any) -> None:
        """Let a worker be so."""
        self.workers = tuple(replace(w, **fields) if i == number else w for i, w in enumerate(self.workers))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def looked(watch: EngineWatch, clock: ManualClock, seconds: int) -> Judgement:
    """The last judgement of so many looks, a second apart."""
    for _ in range(seconds):
        clock.now += 1
        watch.look()
    return watch.look()


GOOD = Judgement(Condition.WORKING, True)


async def test_an_idle_engine_never_stalls(clock: ManualClock) -> None:
    engine = Engine()
    assert looked(EngineWatch(engine, clock), clock, 1000) == GOOD


async def test_a_worker_that_is_in_one_step_for_long_is_given_up_and_the_others_serve_on(clock: ManualClock) -> None:
    engine = Engine(workers=2)
    watch = EngineWatch(engine, clock, stall_s=25)
    for step in range(100):
        engine.change(0, round=step)
        engine.change(1, round=7)
        judgement = looked(watch, clock, 1)
        assert (judgement.condition is Condition.STALLED) == (step >= 25)
        assert judgement.ready
    assert engine.given_up == [1]


async def test_steps_that_end_are_no_stall_however_long_they_take(clock: ManualClock) -> None:
    engine = Engine()
    watch = EngineWatch(engine, clock, stall_s=25)
    for step in range(10):
        engine.change(0, round=step)
        assert looked(watch, clock, 24) == GOOD
    engine.change(0, round=None)
    assert looked(watch, clock, 100) == GOOD


async def test_without_a_worker_it_is_not_ready(clock: ManualClock) -> None:
    engine = Engine()
    watch = EngineWatch(engine, clock, stall_s=25)
    engine.change(0, round=1)
    assert looked(watch, clock, 26) == Judgement(Condition.STALLED, False)


async def test_time_in_which_nobody_looked_is_not_counted(clock: ManualClock) -> None:
    """The process was halted, and so were its workers."""
    engine = Engine()
    watch = EngineWatch(engine, clock, stall_s=25)
    engine.change(0, round=1)
    looked(watch, clock, 2)
    clock.now += 1000
    assert looked(watch, clock, 1) == GOOD


async def test_a_suspect_worker_makes_the_process_unready_and_in_the_end_a_case_for_a_restart(
    clock: ManualClock,
) -> None:
    engine = Engine(workers=2)
    watch = EngineWatch(engine, clock, stall_s=25)
    engine.change(1, suspect=True)
    assert looked(watch, clock, 20) == Judgement(Condition.SUSPECT, False)
    engine.change(1, suspect=False)
    assert looked(watch, clock, 1) == GOOD
    engine.change(1, suspect=True)
    assert looked(watch, clock, 24) == Judgement(Condition.SUSPECT, False)
    assert looked(watch, clock, 2) == Judgement(Condition.STALLED, False)


async def test_a_dead_worker_is_death(clock: ManualClock) -> None:
    engine = Engine(workers=2)
    engine.change(1, alive=False)
    assert EngineWatch(engine, clock).look().condition is Condition.DEAD


async def test_health_follows_the_engine(clock: ManualClock) -> None:
    engine, told = Engine(workers=2), list[tuple[bool, bool]]()

    class Told(Health):
        def set_alive(self, alive: bool) -> None:
            super().set_alive(alive)
            told.append((self.ready, alive))

    health = Told(Metrics(CollectorRegistry()))
    health.set_ready(True)
    told.clear()
    watching = asyncio.create_task(watch_engine(EngineWatch(engine, clock), health, look_every_s=0))

    async def until(count: int) -> None:
        while len(told) < count:
            clock.now += 1
            await asyncio.sleep(0)

    engine.change(0, suspect=True)
    await until(1)
    engine.change(0, suspect=False)
    await until(2)
    engine.change(1, round=1)
    await until(3)
    engine.change(0, alive=False)
    await watching
    assert told == [(False, True), (True, True), (True, False), (False, False)]


async def test_a_dead_engine_ends_the_watch_and_liveness() -> None:
    async with serving() as service:
        service.engine.workers = (WorkerState(alive=False),)
        await watch_engine(EngineWatch(service.engine, ManualClock()), service.health)
        assert await said(service, LIVENESS_NAME) == NOT_SERVING
