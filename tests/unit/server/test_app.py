"""The life of a server: start, serve, drain, exit status."""

import asyncio
import logging
import socket
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import enable_created_metrics

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_server.app import BuiltEngine, Ports, StopRequests, admission, main, run
from beamline_server.bundle import Bundle, BundleError
from beamline_server.engine.admission import Continuous, RequestLevel
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import Deliver
from beamline_server.engine.workers import WorkerState
from beamline_server.listening import PortError
from beamline_server.metrics_server import MetricsServer
from beamline_server.models.load import DeviceError
from beamline_server.settings import Command, Settings, SettingsError
from doubles.http2 import HEADERS, INITIAL_WINDOW_SIZE, Connection, setting
from doubles.service import EOS, ScriptedEngine, failure_of, make_completed, silent, write_bundle

REQUEST = pb.GenerateRequest(inputs=[pb.Input(token_ids=pb.TokenIds(ids=[97, EOS]))])
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
STOPPED_WITHIN_S = 10
"""However long it may drain."""


@dataclass
class Builder:
    """A `BuildEngine` whose engine the test holds."""

    warm_up: Callable[[], None] = lambda: None
    failure: Exception | None = None
    engines: list[ScriptedEngine] = field(default_factory=list)

    def __call__(self, bundle: Bundle, settings: Settings, *, deliver: Deliver, observer: StepObserver) -> BuiltEngine:
        if self.failure is not None:
            raise self.failure
        self.engines.append(ScriptedEngine(deliver, silent))
        return BuiltEngine(self.engines[0], "cpu", self.warm_up)

    @property
    def engine(self) -> ScriptedEngine:
        return self.engines[0]


@dataclass
class App:
    """A running server, and a client of it."""

    task: asyncio.Task[int]
    stop: StopRequests
    engine: ScriptedEngine
    ports: Ports
    stub: Any
    health: Any

    async def until(self, name: str, status: int) -> None:
        """Wait until the health service says so."""
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service=name))
        while (await watch.read()).status != status:
            pass
        watch.cancel()

    async def scraped(self, name: str) -> float:
        """A sample of what is at /metrics."""
        url = f"http://127.0.0.1:{self.ports.metrics_port}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
        [line] = [line for line in text.splitlines() if line.startswith(name + " ")]
        return float(line.rpartition(" ")[2])


def command_of(folder: Path, *, bundle: Mapping[str, object] | None = None, **changes: Any) -> Command:
    write_bundle(folder, **(bundle or {}))
    return Command(folder, Settings(host="127.0.0.1", grpc_port=0, metrics_port=0, **changes))


@asynccontextmanager
async def running(folder: Path, builder: Builder | None = None, **changes: Any) -> AsyncIterator[App]:
    """A server that is ready. Leaving the block hurries it to its end."""
    builder, stop = builder or Builder(), StopRequests()
    ports: asyncio.Future[Ports] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(command_of(folder, **changes), build=builder, stop=stop, listening=ports.set_result))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{(await ports).grpc_port}") as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        health: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call, unused-ignore]  # generated
        app = App(task, stop, builder.engine, await ports, stub, health)
        await app.until("", SERVING)
        yield app
        stop.notify()
        stop.notify()
        await task


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("beamline_server")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)
    enable_created_metrics()  # type: ignore[no-untyped-call]  # has no type information


async def test_it_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    async with running(tmp_path) as app:
        call = app.stub.Generate(REQUEST)
        [request] = await app.engine.submitted()
        app.engine.tell(make_completed(request.id, [65, EOS]))
        assert len((await call).results) == 1
        assert await app.scraped("beamline_ready") == 1
        assert await app.scraped("beamline_row_capacity") == 128
        app.stop.notify()
        assert await app.task == 0
    assert app.engine.stopped_with == [0.0]


async def test_settings_without_effect_are_in_its_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ignored = {"no_repeat_ngram_size": "3", "tokenizer_config.json: do_lower_case": "true"}
    bundle = {"generation_defaults": {"max_new_tokens": 9, "not_supported": ignored}}
    async with running(tmp_path, bundle=bundle):
        pass
    async with running(tmp_path):
        pass
    told = [vars(record) for record in caplog.records if vars(record).get("event") == "ignored_settings"]
    assert [(record["levelname"], record["settings"]) for record in told] == [("WARNING", ignored)]


async def test_draining_goes_on_accepting_then_refuses_then_finishes(tmp_path: Path) -> None:
    async with running(tmp_path, lame_duck_s=1000, drain_timeout_s=1000) as app:
        before = app.stub.Generate(REQUEST)
        [first] = await app.engine.submitted()
        app.stop.notify()

        await app.until("", NOT_SERVING)
        await app.until("beamline.v1.GenerationService", NOT_SERVING)
        assert await app.scraped("beamline_draining") == 1
        assert await app.scraped("beamline_ready") == 0
        during = app.stub.Generate(REQUEST)
        [second] = await app.engine.submitted()
        live = await app.health.Check(health_pb2.HealthCheckRequest(service="live"))
        assert live.status == SERVING

        app.engine.tell(make_completed(first.id, [65, EOS]))
        assert len((await before).results) == 1
        assert app.engine.stopped_with == []
        app.stop.notify()  # hurries: what is left fails
        failure = await failure_of(during)
        assert failure.code == grpc.StatusCode.UNAVAILABLE
        assert second.id != first.id
        assert await app.task == 0


async def test_what_was_accepted_is_finished_before_the_engine_stops(tmp_path: Path) -> None:
    async with running(tmp_path, drain_timeout_s=1000) as app:
        call = app.stub.Generate(REQUEST)
        [request] = await app.engine.submitted()
        watch = app.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        app.stop.notify()
        assert (await watch.read()).status == NOT_SERVING
        app.engine.tell(make_completed(request.id, [65, EOS]))
        assert len((await call).results) == 1
        assert await app.task == 0
        assert app.engine.stopped_with == [0.0]


async def test_after_the_drain_timeout_the_rest_fails_as_unavailable(tmp_path: Path) -> None:
    async with running(tmp_path, drain_timeout_s=0.05) as app:
        call = app.stub.Generate(REQUEST)
        await app.engine.submitted()
        app.stop.notify()
        failure = await failure_of(call)
        assert failure.code == grpc.StatusCode.UNAVAILABLE
        assert failure.text == "the engine is stopping"
        assert await app.task == 0


async def test_a_dead_engine_ends_the_server_with_status_1(tmp_path: Path) -> None:
    async with running(tmp_path, lame_duck_s=1000, drain_timeout_s=1000) as app:
        call = app.stub.Generate(REQUEST)
        await app.engine.submitted()
        app.engine.workers = (WorkerState(alive=False),)
        failure = await failure_of(call)
        assert failure.code == grpc.StatusCode.UNAVAILABLE
        assert await app.task == 1


async def test_a_stop_while_it_loads_ends_it_at_once_whatever_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop, waiting, go_on, stop = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), StopRequests()

    def warm_up() -> None:
        loop.call_soon_threadsafe(waiting.set)
        go_on.wait()

    with caplog.at_level(logging.INFO, "beamline_server"):
        task = asyncio.create_task(run(command_of(tmp_path), build=Builder(warm_up=warm_up), stop=stop))
        await waiting.wait()
        stop.notify()
        assert await task == 0
        go_on.set()
    assert [getattr(r, "event", "") for r in caplog.records if r.name == "beamline_server.app"] == [
        "listening",
        "stopped",
    ]


async def test_metrics_that_end_by_themselves_end_the_server_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, broken = asyncio.get_running_loop(), asyncio.Event()

    def accept(self: MetricsServer, listening: socket.socket) -> None:
        listening.accept()[0].close()
        loop.call_soon_threadsafe(broken.set)
        self._loop.stop()

    monkeypatch.setattr(MetricsServer, "_accept", accept)
    async with running(tmp_path, lame_duck_s=1000) as app:
        socket.create_connection(("127.0.0.1", app.ports.metrics_port)).close()
        await broken.wait()
        assert await app.task == 1


async def test_a_port_that_ends_by_itself_ends_the_server_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beamline_server.rpc.aio_server._PARTS", {object: ("_something_else",)})
    async with running(tmp_path, lame_duck_s=1000) as app, Connection.opened(app.ports.grpc_port) as connection:
        connection.call(b"/\xff")
        async with asyncio.timeout(STOPPED_WITHIN_S):
            assert await app.task == 1


async def test_who_takes_nothing_holds_up_neither_the_start_nor_the_stop(tmp_path: Path) -> None:
    """A health watcher and a reader of a stream, both without room for an answer, and a long time to drain."""
    loop, warm, watched = asyncio.get_running_loop(), threading.Event(), asyncio.Event()
    builder, stop = Builder(), StopRequests()
    builder.warm_up = warm.wait  # type: ignore[assignment]  # what it returns does not matter
    ports: asyncio.Future[Ports] = loop.create_future()
    command = command_of(tmp_path, drain_timeout_s=1000, lame_duck_s=0)
    task = asyncio.create_task(run(command, build=builder, stop=stop, listening=ports.set_result))
    port, no_room = (await ports).grpc_port, setting(INITIAL_WINDOW_SIZE, 0)
    async with AsyncExitStack() as opened:
        for name in (b"", b"live"):
            watcher = await opened.enter_async_context(Connection.opened(port, settings=no_room))
            request = health_pb2.HealthCheckRequest(service=name.decode()).SerializeToString()
            watcher.call(b"/grpc.health.v1.Health/Watch", request)
            async for frame in watcher.frames():
                if frame.kind == HEADERS:
                    watched.set()
                    break
        assert watched.is_set()
        warm.set()
        reader = await opened.enter_async_context(Connection.opened(port, settings=no_room))
        channel = await opened.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        health: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call, unused-ignore]  # generated
        watch = health.Watch(health_pb2.HealthCheckRequest())
        while (await watch.read()).status != SERVING:
            pass
        watch.cancel()
        stream = pb.GenerateStreamRequest(input=REQUEST.inputs[0])
        reader.call(b"/beamline.v1.GenerationService/GenerateStream", stream.SerializeToString())
        (request,) = await builder.engine.submitted()
        builder.engine.tell(make_completed(request.id, [65, EOS]))
        stop.notify()
        async with asyncio.timeout(STOPPED_WITHIN_S):
            assert await task == 0


async def test_until_warm_up_is_done_it_listens_and_is_not_ready(tmp_path: Path) -> None:
    loop, warm = asyncio.get_running_loop(), asyncio.Event()
    builder, stop = Builder(), StopRequests()
    builder.warm_up = lambda: asyncio.run_coroutine_threadsafe(warm.wait(), loop).result() and None
    ports: asyncio.Future[Ports] = loop.create_future()
    task = asyncio.create_task(run(command_of(tmp_path), build=builder, stop=stop, listening=ports.set_result))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{(await ports).grpc_port}") as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        failure = await failure_of(stub.Generate(REQUEST))
        assert failure.text == "the server is loading"
        health: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call, unused-ignore]  # generated
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest(service="live"))).status == SERVING
        warm.set()
        stop.notify()
        assert await task == 0


async def test_a_warm_up_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    """A graph may turn in a loop for ever."""
    ended = threading.Event()

    def warm_up() -> None:
        ended.wait()

    command = command_of(tmp_path, warm_up_timeout_s=0.01)
    told = r"its golden inputs and the warm-up have not ended within 0.01 s; give them more \(warm_up_timeout_s\), or "
    with pytest.raises(BundleError, match=told):
        await run(command, build=Builder(warm_up=warm_up), stop=StopRequests())
    ended.set()


def raising(error: Exception) -> Callable[[], None]:
    def warm_up() -> None:
        raise error

    return warm_up


@pytest.mark.parametrize(
    ("builder", "changes", "error"),
    [
        (Builder(failure=DeviceError("no cuda here")), {}, DeviceError),
        (Builder(failure=BundleError(Path("x"), "bad graph", "export again")), {}, BundleError),
        (Builder(warm_up=raising(BundleError(Path("x"), "differs", "export again"))), {}, BundleError),
        (Builder(), {"max_new_tokens": 100_000}, SettingsError),
        (Builder(), {"host": "203.0.113.1"}, PortError),
    ],
    ids=["device", "graph", "warm-up", "limits", "address"],
)
async def test_what_cannot_be_served_leaves_nothing_running(
    tmp_path: Path, builder: Builder, changes: dict[str, Any], error: type[Exception]
) -> None:
    write_bundle(tmp_path)
    settings = Settings(**{"host": "127.0.0.1", "grpc_port": 0, "metrics_port": 0, **changes})
    with pytest.raises(error):
        await run(Command(tmp_path, settings), build=builder, stop=StopRequests())


async def test_a_taken_grpc_port_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as app:
        settings = Settings(host="127.0.0.1", grpc_port=app.ports.grpc_port, metrics_port=0)
        with pytest.raises(PortError, match=f"127.0.0.1:{app.ports.grpc_port} cannot be listened on"):
            await run(Command(tmp_path, settings), build=Builder(), stop=StopRequests())


def test_settings_problems_are_told_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--grpc-port", "x", "--nope"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("beamline serve: ") for line in lines)


def test_a_bad_bundle_is_one_line_and_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--metrics-port", "0", "--grpc-port", "0"]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"beamline serve: {tmp_path}/manifest.json: cannot be read")


def test_a_taken_metrics_port_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([str(tmp_path), "--host", "127.0.0.1", "--metrics-port", str(port)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"beamline serve: 127.0.0.1:{port} cannot be listened on for metrics (")


def test_batching_is_continuous_unless_set_otherwise() -> None:
    assert admission(Settings()) == Continuous()
    assert admission(Settings(request_batch=32, request_batch_delay_ms=2.5)) == RequestLevel(32, 0.0025)
