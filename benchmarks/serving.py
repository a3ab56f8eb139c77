"""What the service costs on top of its engine: same bundle, same sentences, one run.

    python benchmarks/serving.py [--precision int8] [--workers 2] [--repeat 3]

Interleaves, per repetition: the engine in process; the server over gRPC with 32 inputs per request; with one. Prints
sentences/s, their ratios, the share of the workers' step time outside `session.run` (waiting for the GIL included), and
CPU time per sentence of the server and the client process. Let nothing else run meanwhile.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from engine import MODEL, run, seconds, test_sources
from engine_process import EngineProcess

from beamline_client import AsyncClient, SearchOptions
from beamline_client.results import EarlyStopping
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_server import app
from beamline_server.bundle import Bundle, load_bundle
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import Deliver
from beamline_server.engine.workers import Engine
from beamline_server.models.load import EngineOptions, build_backend, capacity, check_golden, model_rules
from beamline_server.settings import Settings, read_command
from offline.session_clock import Call, session_calls

SEARCH = SearchOptions(beam_size=4, max_new_tokens=128, early_stopping=EarlyStopping.WHEN_FULL)


class Stopwatch:
    """Times the workers' steps of an engine, and the runs within.

    Args:
        sessions: The runs so far, as `session_calls` notes them.
        engine_process: Whether the engine is in a process of its own, which is not timed.
    """

    def __init__(self, sessions: Sequence[Call], *, engine_process: bool = False) -> None:
        self.step_s: list[float] = []
        self._sessions = sessions
        self._engine_process = engine_process
        self._child: EngineProcess | None = None

    def build(self, bundle: Bundle, settings: Settings, *, deliver: Deliver, observer: StepObserver) -> app.BuiltEngine:
        """As `app.build`, with a stopwatch on it."""
        workers = settings.workers if isinstance(settings.workers, int) else 2
        if self._engine_process:
            self._child = EngineProcess(bundle.path, workers, deliver)
            return app.BuiltEngine(self._child, "cpu", lambda: None)
        backend = build_backend(bundle, "cpu", 1)
        options = EngineOptions(rows=settings.max_rows)
        engine = Engine(
            [backend] * workers,
            model_rules(bundle.manifest),
            capacity(bundle, options),
            queue_rows=settings.max_queue_rows,
            deliver=deliver,
            observer=observer,
        )
        for worker in engine._workers:
            worker.core.step = self._timed(worker.core.step)  # type: ignore[method-assign]
        return app.BuiltEngine(engine, "cpu", lambda: check_golden(bundle, backend))

    def _timed(self, step: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            began = time.perf_counter()
            try:
                return step()
            finally:
                self.step_s.append(time.perf_counter() - began)

        return timed

    def reading(self) -> dict[str, float]:
        """Sums so far, in seconds."""
        if self._child is not None:
            return {"step": 0.0, "run": 0.0, "cpu": own_cpu_s() + _cpu_s(self._child.process.pid)}
        return {"step": sum(self.step_s), "run": seconds(self._sessions), "cpu": own_cpu_s()}


def _cpu_s(pid: int | None) -> float:
    """CPU seconds of another process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ServerOptions:
    """How the server process runs."""

    bundle: Path
    workers: int
    switch_interval: float | None
    engine_process: bool


def serve(options: ServerOptions, pipe: Connection) -> None:
    """The server process: answers over gRPC, and over the pipe what its stopwatch reads."""
    if options.switch_interval is not None:
        sys.setswitchinterval(options.switch_interval)
    with session_calls() as sessions:
        asyncio.run(_serve(options, pipe, Stopwatch(sessions, engine_process=options.engine_process)))


async def _serve(options: ServerOptions, pipe: Connection, stopwatch: Stopwatch) -> None:
    stopping = app.StopRequests()
    loop = asyncio.get_running_loop()
    arguments = [str(options.bundle), "--host", "127.0.0.1", "--grpc-port", "0", "--metrics-port", "0"]
    arguments += ["--workers", str(options.workers), "--max-queue-rows", "100000", "--log-level", "warning"]

    def read() -> None:
        if pipe.recv() == "stop":
            stopping.notify()
        else:
            pipe.send(stopwatch.reading())

    loop.add_reader(pipe.fileno(), read)
    await app.run(
        read_command(arguments, {}),
        build=stopwatch.build,
        stop=stopping,
        listening=lambda ports: pipe.send(ports.grpc_port),
    )


async def drive(port: int, sources: Sequence[str], per_request: int, in_flight: int) -> float:
    """Send all sources, so many per request and requests in flight; returns seconds."""
    batches = iter([sources[i : i + per_request] for i in range(0, len(sources), per_request)])
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        await client.wait_ready(60)

        async def caller() -> None:
            for batch in batches:
                await client.generate(batch, search=SEARCH)

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(in_flight)))
        return time.perf_counter() - began


def own_cpu_s() -> float:
    """CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measured(port: int, pipe: Connection, sources: Sequence[str], per_request: int, in_flight: int) -> dict[str, float]:
    """One pass over gRPC: sentences/s, share outside runs, CPU milliseconds per sentence of both sides."""
    pipe.send("read")
    before, client_before = pipe.recv(), own_cpu_s()
    wall = asyncio.run(drive(port, sources, per_request, in_flight))
    pipe.send("read")
    after, client_after = pipe.recv(), own_cpu_s()
    spent = {name: after[name] - before[name] for name in after}
    return {
        "rate": len(sources) / wall,
        "outside": 1 - spent["run"] / spent["step"] if spent["step"] else float("nan"),
        "server_ms": spent["cpu"] / len(sources) * 1e3,
        "client_ms": (client_after - client_before) / len(sources) * 1e3,
    }


def main() -> None:
    """Export, serve, drive, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int8", choices=["fp32", "int8"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--switch-interval", type=float, help="seconds; default: the server's own choice")
    parser.add_argument("--engine-process", action="store_true", help="the engine in a process of its own")
    parser.add_argument("--bundle", type=Path, help="use this bundle instead of exporting the embedded model")
    arguments = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.bundle or Path(folder) / "bundle"
        if arguments.bundle is None:
            export(MODEL, path, ExportOptions(arguments.precision), Progress())
        bundle, sources = load_bundle(path), test_sources()
        pipe, far_end = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        options = ServerOptions(path, arguments.workers, arguments.switch_interval, arguments.engine_process)
        # Not a daemon: it may have a child.
        process = context.Process(target=serve, args=(options, far_end))
        process.start()
        port = pipe.recv()
        passes: dict[str, list[dict[str, float]]] = {"32 per request": [], "1 per request": []}
        alone: list[float] = []
        asyncio.run(drive(port, sources[:200], 1, 64))
        for _ in range(arguments.repeat):
            line = run(bundle, sources, workers=arguments.workers, threads=1, beam=4)
            alone.append(float(line.split()[0]))
            print(f"engine         {line}", flush=True)
            for name, per_request, in_flight in (("32 per request", 32, 8), ("1 per request", 1, 96)):
                result = measured(port, pipe, sources, per_request, in_flight)
                passes[name].append(result)
                print(f"{name:14} {json.dumps({k: round(v, 3) for k, v in result.items()})}", flush=True)
        pipe.send("stop")
        process.join(60)
    print(f"engine alone: {median(alone):.0f} sentences/s (median of {arguments.repeat})")
    for name, results in passes.items():
        server_ms, client_ms = (median(r[side] for r in results) for side in ("server_ms", "client_ms"))
        ratios = [result["rate"] / rate for result, rate in zip(results, alone, strict=True)]
        print(
            f"{name}: {median(r['rate'] for r in results):.0f} sentences/s, "
            f"{median(ratios):.2f} of the engine alone ({min(ratios):.2f}-{max(ratios):.2f}); "
            f"outside session.run {median(r['outside'] for r in results):.1%}; CPU ms/sentence: "
            f"server {server_ms:.2f}, client {client_ms:.2f}"
        )


if __name__ == "__main__":
    main()
