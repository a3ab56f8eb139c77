"""`beamline serve`: builds the server, runs it until it is told to stop, and stops it in the reverse order."""

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Never, Protocol, TypeVar

from prometheus_client import CollectorRegistry, disable_created_metrics

from beamline_server import logs
from beamline_server.allocator import Trimmer, give_back_freed, resident_bytes
from beamline_server.bundle import EXIT_BUNDLE, EXPORT_AGAIN, MOST_FOREIGN_TOLD, Bundle, BundleError, load_bundle
from beamline_server.engine.admission import Admission, Continuous, RequestLevel
from beamline_server.engine.compiled import is_off, keeping_folder, make_ready
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import Deliver
from beamline_server.engine.workers import WORKER_THREADS
from beamline_server.listening import PortError, allow_most_descriptors
from beamline_server.memory import require_memory
from beamline_server.metrics import Metrics
from beamline_server.metrics_server import MetricsServer
from beamline_server.models.load import (
    DeviceError,
    EngineOptions,
    build_engine,
    choose_device,
    most_bytes_of_workers,
    warm_up,
)
from beamline_server.rpc.aio_server import AioServer
from beamline_server.rpc.desk import Desk, EngineLike
from beamline_server.rpc.health import EngineWatch, Health, watch_engine
from beamline_server.rpc.info import ServedModel, versions
from beamline_server.rpc.server import Service, bind, build_server, most_bytes_of_callers
from beamline_server.rpc.text_work import TextWork
from beamline_server.settings import Command, Settings, SettingsError, number_of, read_command
from beamline_server.tokenizer import load_tokenizer

EXIT_STOPPED = 0
EXIT_PART_FAILED = 1
EXIT_SETTINGS = 2

_LAST_WORDS_S = 1.0
"""Time for the last answers to be sent once all of them are known."""

_SWITCH_S = 0.0005
"""How long a thread may keep the interpreter from another one that waits for it, in seconds. A worker needs it some
times in a step; with Python's own 5 ms, a busy event loop would leave it next to nothing (ADR 0014)."""
_TRIM_EVERY_S = 10.0
_THREADS = "beamline"
_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine, not started.

    Attributes:
        engine: Itself.
        device: Where it computes.
        warm_up: Shows that it computes right, or raises BundleError.
        most_bytes: Memory that it takes at most, beside what it has when it is warm.
    """

    engine: EngineLike
    device: str
    warm_up: Callable[[], None]
    most_bytes: int = 0


class BuildEngine(Protocol):
    """Builds the engine for a bundle. Blocks.

    Raises:
        BundleError: a graph cannot be loaded.
        DeviceError: the device cannot be used.
    """

    def __call__(self, bundle: Bundle, settings: Settings, *, deliver: Deliver, observer: StepObserver) -> BuiltEngine:
        """Build it, with these to tell its events and its steps to."""
        ...


class StopRequests:
    """The wishes to stop: the first one drains, the second one hurries."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def notify(self) -> None:
        """Somebody wishes the server to stop."""
        (self.second if self.first.is_set() else self.first).set()


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the server listens."""

    grpc_port: int
    metrics_port: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run `beamline serve` with these arguments; returns the exit status."""
    try:
        command = read_command(sys.argv[1:] if argv is None else argv, os.environ)
        logs.configure(command.settings.log_level)
        allow_most_descriptors()
        sys.setswitchinterval(_SWITCH_S)
        disable_created_metrics()  # type: ignore[no-untyped-call]  # has no type information
        return _leave(asyncio.run(_run_until_signalled(command)))
    except SettingsError as error:
        return _refuse(EXIT_SETTINGS, *error.problems)
    except (DeviceError, PortError) as error:
        return _refuse(EXIT_SETTINGS, str(error))
    except _StillWarmingUp as error:
        return _leave(_refuse(EXIT_BUNDLE, str(error)))
    except BundleError as error:
        return _refuse(EXIT_BUNDLE, str(error))


async def run(
    command: Command,
    *,
    build: BuildEngine,
    stop: StopRequests,
    listening: Callable[[Ports], None] = lambda _: None,
) -> int:
    """Serve until a stop is requested or the engine dies; returns the exit status.

    Args:
        command: What to serve, and how.
        build: Builds the engine.
        stop: The requests to stop.
        listening: Is told the ports once calls are answered, if only by "not ready yet".

    Raises:
        BundleError | DeviceError | PortError | SettingsError: the server cannot serve; nothing is left running.
    """
    try:
        status = await _serve(command, build, stop, listening)
    except _StoppedWhileLoading:
        status = EXIT_STOPPED
    _log.info("stopped", extra={"event": "stopped", "part_failed": status != EXIT_STOPPED})
    return status


async def _serve(command: Command, build: BuildEngine, stop: StopRequests, listening: Callable[[Ports], None]) -> int:
    began, settings, loop = time.monotonic(), command.settings, asyncio.get_running_loop()
    metrics = Metrics(CollectorRegistry())
    metrics.watch_log(logs.dropped)
    desk, health = Desk(loop), Health(metrics)
    part_failed = asyncio.Event()
    with ExitStack() as resources:
        told = partial(loop.call_soon_threadsafe, part_failed.set)
        metrics_port = resources.enter_context(_metrics_server(metrics, settings, told)).port
        bundle = await _unless_stopped(stop, _load, command.bundle)
        tokenizer = load_tokenizer(bundle)
        _tell_ignored_settings(bundle)
        build_it = partial(build, bundle, settings, deliver=desk.deliver, observer=metrics)
        built = await _unless_stopped(stop, build_it)
        model = ServedModel(settings.model_name or bundle.manifest.name, bundle, built.device)
        metrics.watch_load(built.engine.load, clock=time.monotonic)
        metrics.tell_constants(model.labels(), versions())

        text = resources.enter_context(TextWork())
        server = build_server(Service(desk, health, metrics, text), model, tokenizer, settings)
        ports = Ports(bind(server, settings.host, settings.grpc_port), metrics_port)
        await server.start()
        try:
            _log.info("listening", extra={"event": "listening", "host": settings.host, **_fields(ports)})
            listening(ports)
            await _warmed_up(stop, built, bundle, settings.warm_up_timeout_s)
            parts = {"when warm": resident_bytes(), "caches": built.most_bytes, **most_bytes_of_callers(settings)}
            metrics.memory_bound.set(require_memory(parts, number_of(settings.memory_limit)))
            built.engine.start()
            gc.collect()
            gc.freeze()  # what is there now stays: no collection needs to walk through it again
            metrics.model_load_seconds.set(time.monotonic() - began)
            desk.open(built.engine)
            health.set_ready(True)
            _log.info("serving", extra={"event": "serving", **model.labels()})
            watching = watch_engine(EngineWatch(built.engine, time.monotonic), health)
            await _first_of(stop.first.wait(), watching, server.ended(), part_failed.wait(), _trim_now_and_then())
            died = not stop.first.is_set()
            await _drain(_Draining(server, desk, built.engine, health, metrics), settings, stop, hurry=died)
        finally:
            await server.stop(None)
    return EXIT_PART_FAILED if died else EXIT_STOPPED


class _StoppedWhileLoading(Exception):
    """A stop was requested before there was anything to drain."""


async def _unless_stopped(stop: StopRequests, function: Callable[..., _Result], *arguments: object) -> _Result:
    """What a function that takes long comes to, on a thread that nobody waits for.

    Raises:
        _StoppedWhileLoading: a stop was requested meanwhile.
    """
    working = _in_a_thread(function, *arguments)
    await _first_of(stop.first.wait(), _end_of(working))
    if not working.done():
        raise _StoppedWhileLoading
    return working.result()


class _StillWarmingUp(BundleError):
    """The warm-up has not ended in time, and a thread still computes."""


async def _warmed_up(stop: StopRequests, built: BuiltEngine, bundle: Bundle, timeout_s: float) -> None:
    """Warm up, unless that takes too long: what a graph does is known when it ends.

    Raises:
        _StoppedWhileLoading: a stop was requested meanwhile.
        BundleError: it has not ended, or has shown something else.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await _unless_stopped(stop, built.warm_up)
    except TimeoutError as error:
        problem = f"its golden inputs and the warm-up have not ended within {timeout_s:g} s"
        raise _StillWarmingUp(bundle.path, problem, f"give them more (warm_up_timeout_s), or {EXPORT_AGAIN}") from error


def _in_a_thread(function: Callable[..., _Result], *arguments: object) -> asyncio.Future[_Result]:
    """Run a function on a thread that keeps no process from ending, whatever it waits for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def tell(setter: Callable[[Any], None], value: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if future.done() else setter(value))

    def work() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:  # whoever waits for it decides
            tell(future.set_exception, error)
        else:
            tell(future.set_result, result)

    threading.Thread(target=work, name=_THREADS, daemon=True).start()
    return future


async def _end_of(future: asyncio.Future[Any]) -> None:
    await asyncio.wait([future])


async def _trim_now_and_then() -> Never:
    """Give memory back that a burst has left behind."""
    trimmer = Trimmer()
    while True:
        await asyncio.sleep(_TRIM_EVERY_S)
        await _in_a_thread(trimmer.look)


def _tell_ignored_settings(bundle: Bundle) -> None:
    if ignored := bundle.manifest.generation_defaults.not_supported:
        message = "settings of the checkpoint would change answers and have no effect"
        _log.warning(message, extra={"event": "ignored_settings", "settings": ignored})


def _load(path: Path) -> Bundle:
    bundle = load_bundle(path)
    if foreign := bundle.foreign_files():
        told = {"event": "foreign_files", "files": foreign[:MOST_FOREIGN_TOLD], "count": len(foreign)}
        _log.warning("files beside the manifest that are no part of the bundle are ignored", extra=told)
    return bundle


@dataclass(frozen=True, slots=True)
class _Draining:
    server: AioServer
    desk: Desk
    engine: EngineLike
    health: Health
    metrics: Metrics


async def _drain(parts: _Draining, settings: Settings, stop: StopRequests, *, hurry: bool) -> None:
    """Become not ready, go on accepting for a while, then finish what was accepted. A hurry skips the waiting."""
    parts.metrics.draining.set(1)
    parts.health.set_ready(False)
    _log.info("draining", extra={"event": "draining", "in_flight": parts.desk.in_flight, "hurry": hurry})
    if not hurry:
        await _first_of(stop.second.wait(), timeout_s=settings.lame_duck_s)
    parts.desk.close()
    drain_s = 0.0 if hurry else settings.drain_timeout_s
    # Refuses connections and calls from now on; its own waiting would include health watchers, who never leave.
    closing = asyncio.create_task(parts.server.stop(drain_s + 2 * _LAST_WORDS_S))
    await _first_of(parts.desk.finished(), stop.second.wait(), timeout_s=drain_s)
    if parts.desk.has_finished:  # whoever takes no answer holds it up no longer than this
        await _first_of(parts.desk.drained(), stop.second.wait(), timeout_s=_LAST_WORDS_S)
    _log.info("stopping", extra={"event": "stopping", "in_flight": parts.desk.in_flight})
    await _in_a_thread(parts.engine.stop, 0.0)
    await parts.server.stop(_LAST_WORDS_S)
    await closing


async def _first_of(*waits: Coroutine[Any, Any, object], timeout_s: float | None = None) -> None:
    """Wait until one of them is done, or for so many seconds; what they raise is raised."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _leave(status: int) -> int:
    """End the process here and now if a thread still computes, which could not bear its end otherwise."""
    if any(thread.name.startswith((_THREADS, WORKER_THREADS)) for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(status)
    return status


async def _run_until_signalled(command: Command) -> int:
    loop, stop = asyncio.get_running_loop(), StopRequests()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.notify)
    return await run(command, build=build, stop=stop)


def build(bundle: Bundle, settings: Settings, *, deliver: Deliver, observer: StepObserver) -> BuiltEngine:
    """The real engine; a `BuildEngine`."""
    if is_off():
        raise SettingsError(["NUMBA_DISABLE_JIT is set, so that nothing is compiled; unset it"])
    manifest = bundle.manifest
    device = choose_device(settings.device, manifest.precision, decoder_only=manifest.dimensions.decoder_only)
    options = EngineOptions(
        device=device,
        workers=number_of(settings.workers),
        threads=number_of(settings.threads_per_worker),
        rows=settings.max_rows,
        slots=number_of(settings.kv_slots),
        queue_rows=settings.max_queue_rows,
        admission=admission(settings),
    )
    engine = build_engine(bundle, options, deliver=deliver, observer=observer)

    def warm_up_all() -> None:
        _make_loops_ready()
        engine.warm_up(lambda backend: warm_up(bundle, backend, options))
        # The largest batch is not the usual one: a server holds its caches when its traffic needs them.
        give_back_freed()

    return BuiltEngine(engine, device, warm_up_all, most_bytes_of_workers(bundle, options, device))


def _make_loops_ready() -> None:
    ready = make_ready(_tell_compiling)
    _log.info("the engine's loops are machine code", extra={"event": "engine_compiled", **asdict(ready)})


def _tell_compiling(functions: int) -> None:
    folder = keeping_folder()
    told = {"event": "engine_compiling", "functions": functions, "folder": folder}
    if folder is None:
        message = "compiling the engine's loops, as at every start: no folder can be written, see docs/deploy.md"
        _log.warning(message, extra=told)
    else:
        _log.info("compiling the engine's loops, which takes up to a minute and is done once", extra=told)


def admission(settings: Settings) -> Admission:
    """When requests may start."""
    if settings.request_batch is None or settings.request_batch_delay_ms is None:
        return Continuous()
    return RequestLevel(settings.request_batch, settings.request_batch_delay_ms / 1000)


def _metrics_server(metrics: Metrics, settings: Settings, failed: Callable[[], object]) -> MetricsServer:
    host, port = settings.host, settings.metrics_port
    try:
        return MetricsServer(metrics.registry, host, port, failed=failed)
    except (OSError, ValueError) as error:
        raise PortError(host, port, error, use=" for metrics") from error


def _fields(ports: Ports) -> dict[str, int]:
    return {"grpc_port": ports.grpc_port, "metrics_port": ports.metrics_port}


def _refuse(status: int, *problems: str) -> int:
    for problem in problems:
        sys.stderr.write(f"beamline serve: {problem}\n")
    return status
