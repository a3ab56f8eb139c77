"""How a server ends: it says so first, finishes what it has accepted, and loses nothing."""

import asyncio
import itertools
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_client.channel import SERVICE_CONFIG
from beamline_server.process import ServerProcess

Serve = Callable[..., ServerProcess]
Status = health_pb2.HealthCheckResponse

# A second or more of work on two cores.
LONG = pb.GenerateRequest(
    inputs=[pb.Input(text="Il fait beau aujourd'hui.")] * 4,
    search=pb.SearchOptions(beam_size=16, min_new_tokens=255, max_new_tokens=256),
)
ONE_ATTEMPT = [("grpc.enable_retries", 0)]


def request_for(text: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(inputs=[pb.Input(text=text)])


class Calls:
    """The methods of one server for asyncio, one attempt per call, and its health."""

    def __init__(self, channel: Any) -> None:
        self._stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        self._health = health_pb2_grpc.HealthStub(channel)

    async def generate(self, request: pb.GenerateRequest) -> grpc.StatusCode:
        """Sends a request; returns how it ended."""
        code: grpc.StatusCode = await self._stub.Generate(request, timeout=60).code()
        return code

    async def health(self) -> AsyncIterator[int]:
        """What the server says of itself, from now on."""
        async for status in self._health.Watch(health_pb2.HealthCheckRequest()):
            yield status.status


async def accepted(server: ServerProcess, requests: int) -> None:
    """Wait until the engine has accepted so many requests, as a log at debug level tells."""
    await asyncio.to_thread(server.log.wait_for, "request_accepted", times=requests)


async def ended(server: ServerProcess) -> int:
    return await asyncio.to_thread(server.wait)


def timed(server: ServerProcess, event: str) -> float:
    """When a server wrote an event into its log, in seconds since 1970."""
    return datetime.fromisoformat(server.log.wait_for(event)["time"]).timestamp()


async def test_what_was_accepted_is_answered(serve: Serve, sentences: Sequence[str]) -> None:
    server = serve("--max-rows", "32", "--log-level", "debug")
    requests = [*map(request_for, sentences[:100]), LONG]
    async with grpc.aio.insecure_channel(server.target, options=ONE_ATTEMPT) as channel:
        calls = Calls(channel)
        health = calls.health()
        assert await anext(health) == Status.SERVING
        waiting = asyncio.gather(*map(calls.generate, requests))
        await accepted(server, len(requests))

        server.send(signal.SIGTERM)

        assert await anext(health) == Status.NOT_SERVING
        codes = await waiting
        assert await ended(server) == 0
        assert await calls.generate(request_for("Trop tard.")) == grpc.StatusCode.UNAVAILABLE

    assert set(codes) == {grpc.StatusCode.OK}
    assert server.log.wait_for("draining")["in_flight"] > 0
    phases = [timed(server, event) for event in ("draining", "stopping", "stopped")]
    assert phases == sorted(phases)
    print(f"drained {server.log.wait_for('draining')['in_flight']} inputs in {phases[2] - phases[0]:.2f} s")


async def test_callers_who_go_on_calling_see_answers_and_then_unavailable(
    serve: Serve, sentences: Sequence[str]
) -> None:
    """One address and no retries: nothing hangs, and nothing that the server has accepted is lost."""
    server = serve("--log-level", "debug")
    texts = itertools.cycle(sentences)
    codes: Counter[grpc.StatusCode] = Counter()

    async def caller(calls: Calls) -> None:
        while True:
            code = await calls.generate(request_for(next(texts)))
            codes[code] += 1
            if code != grpc.StatusCode.OK:
                return

    async with grpc.aio.insecure_channel(server.target, options=ONE_ATTEMPT) as channel:
        callers = [asyncio.create_task(caller(Calls(channel))) for _ in range(16)]
        await asyncio.to_thread(
            server.scrape_until, lambda samples: samples['beamline_requests_total{outcome="ok"}'] >= 100
        )
        server.send(signal.SIGTERM)
        await asyncio.gather(*callers)
    assert await ended(server) == 0

    outcomes = Counter(record["outcome"] for record in server.log.records("request_ended"))
    # CANCELLED is what gRPC makes of a call that comes in the very moment in which it closes; see docs/api.md.
    assert codes.keys() <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert codes.total() == codes[grpc.StatusCode.OK] + 16
    assert outcomes["ok"] == codes[grpc.StatusCode.OK] == len(server.log.records("request_accepted"))
    assert outcomes.keys() <= {"ok", "unavailable"}


async def test_callers_who_follow_health_do_not_notice(serve: Serve, sentences: Sequence[str]) -> None:
    """Two replicas, one of which leaves, and callers set up as docs/deploy.md advises."""
    leaving, staying = serve("--lame-duck-s", "0.3"), serve()
    follow_health = {"healthCheckConfig": {"serviceName": "beamline.v1.GenerationService"}}
    options = [("grpc.service_config", json.dumps({**SERVICE_CONFIG, **follow_health}))]
    texts = itertools.cycle(sentences)
    codes: Counter[grpc.StatusCode] = Counter()
    done = asyncio.Event()

    async def caller(calls: Calls) -> None:
        while not done.is_set():
            codes[await calls.generate(request_for(next(texts)))] += 1

    async def answered(server: ServerProcess, count: float) -> float:
        series = 'beamline_requests_total{outcome="ok"}'
        return (await asyncio.to_thread(server.scrape_until, lambda samples: samples[series] >= count))[series]

    target = f"ipv4:{leaving.target},{staying.target}"
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        callers = [asyncio.create_task(caller(Calls(channel))) for _ in range(16)]
        await answered(leaving, 50)
        leaving.send(signal.SIGTERM)
        status = await ended(leaving)
        await answered(staying, await answered(staying, 50) + 50)
        done.set()
        await asyncio.gather(*callers)

    assert status == 0
    assert codes.keys() == {grpc.StatusCode.OK}
    assert codes[grpc.StatusCode.OK] >= 150


async def test_a_lame_duck_still_answers(serve: Serve) -> None:
    server = serve("--lame-duck-s", "3600")
    async with grpc.aio.insecure_channel(server.target, options=ONE_ATTEMPT) as channel:
        calls = Calls(channel)
        health = calls.health()
        assert await anext(health) == Status.SERVING
        server.send(signal.SIGTERM)
        assert await anext(health) == Status.NOT_SERVING

        assert await calls.generate(request_for("Encore une.")) == grpc.StatusCode.OK
        assert server.samples()["beamline_draining"] == 1

        server.send(signal.SIGTERM)  # enough of waiting
        assert await ended(server) == 0


async def test_a_second_signal_ends_what_is_running(serve: Serve) -> None:
    server = serve("--drain-timeout-s", "3600", "--log-level", "debug")
    async with grpc.aio.insecure_channel(server.target, options=ONE_ATTEMPT) as channel:
        waiting = asyncio.ensure_future(Calls(channel).generate(LONG))
        await accepted(server, 1)
        server.send(signal.SIGTERM)
        await asyncio.to_thread(server.log.wait_for, "draining")
        began = time.monotonic()
        server.send(signal.SIGINT)

        assert await waiting == grpc.StatusCode.UNAVAILABLE
        assert await ended(server) == 0
        assert time.monotonic() - began < 3


async def test_draining_ends_in_time(serve: Serve) -> None:
    server = serve("--drain-timeout-s", "0.2", "--log-level", "debug")
    async with grpc.aio.insecure_channel(server.target, options=ONE_ATTEMPT) as channel:
        waiting = asyncio.ensure_future(Calls(channel).generate(LONG))
        await accepted(server, 1)
        began = time.monotonic()

        assert await asyncio.to_thread(server.stop) == 0
        assert await waiting == grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("event", ["device_chosen", "listening"])
def test_a_signal_before_the_model_is_ready_ends_the_server(slow_bundle: Path, event: str) -> None:
    with ServerProcess(slow_bundle) as starting:
        starting.log.wait_for(event)

        assert starting.stop() == 0
        assert starting.log.records("stopped")


def test_a_kill_is_unavailable_to_callers(serve: Serve) -> None:
    server = serve()
    with grpc.insecure_channel(server.target, options=ONE_ATTEMPT) as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        call = stub.Generate.future(LONG, timeout=60)
        server.scrape_until(lambda samples: samples["beamline_running_rows"] > 0)
        server.send(signal.SIGKILL)

        assert call.code() == grpc.StatusCode.UNAVAILABLE
        assert server.wait() == -signal.SIGKILL
