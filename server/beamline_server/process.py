"""A server as a process of its own, for tests, benchmarks and demos: start it, watch it, stop it.

A test, or a program that compares servers, does this:

    with ServerProcess(bundle, "--max-rows", "64") as server:
        server.wait_until_serving()
        ...  # call server.target
        status = server.stop()
"""

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamline_server.listening import address_of

BEAMLINE = Path(sys.executable).with_name("beamline")
"""The installed command."""

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where somebody answers who listens on all addresses."""
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would look for it on its own machine

LogRecord = Mapping[str, Any]
Samples = Mapping[str, float]
"""Values by series, written as Prometheus has them: `beamline_requests_total{outcome="ok"}`."""


class ProcessFailed(Exception):
    """The process ended, or did not do in time what was waited for; the text has its log."""


class ServerLog:
    """What a process writes to stderr, read as it comes, so that the pipe never fills."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._records: list[LogRecord] = []
        self._ended = False
        self._thread = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._thread.start()

    def text(self) -> str:
        """Everything so far."""
        with self._changed:
            return "".join(self._lines)

    def records(self, event: str | None = None) -> list[LogRecord]:
        """The JSON lines so far; with an event, its lines alone."""
        with self._changed:
            return [record for record in self._records if event in (None, record.get("event"))]

    def wait_for(self, event: str, *, times: int = 1, within_s: float = 60, **fields: object) -> LogRecord:
        """The line of this event with these fields, or the nth such line, which may be yet to come.

        Raises:
            ProcessFailed: it did not come.
        """
        wanted = {"event": event, **fields}

        def found() -> list[LogRecord]:
            return [record for record in self._records if wanted.items() <= record.items()]

        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(found()) >= times, within_s)
            if len(records := found()) >= times:
                return records[times - 1]
        raise ProcessFailed(f"{wanted} came {len(records)} times within {within_s:g} s:\n{self.text()}")

    def wait_until_ended(self) -> None:
        """Read the rest of an ended process."""
        self._thread.join()

    def close(self) -> None:
        """Read the rest of an ended process, and release the pipe."""
        self.wait_until_ended()
        self._stream.close()

    def _read(self) -> None:
        for line in self._stream:
            record = _json_object(line)
            with self._changed:
                self._lines.append(line)
                if record is not None:
                    self._records.append(record)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class ServerProcess:
    """`beamline serve` on free ports of 127.0.0.1. Leaving its `with` block kills what is still running.

    Args:
        bundle: The bundle's folder.
        *flags: Further flags; they win over the ones that this class gives. A log level above info hides its ports.
        program: What takes them: `beamline serve`, or something like it.
    """

    def __init__(self, bundle: Path, *flags: str, program: Sequence[str] = (str(BEAMLINE), "serve")) -> None:
        fixed = ("--host", "127.0.0.1", "--grpc-port", "0", "--metrics-port", "0")
        command = [*program, str(bundle), *fixed, *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.log = ServerLog(self.process.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    @property
    def target(self) -> str:
        """Where it answers calls; waits until it listens.

        Raises:
            ProcessFailed: it does not.
        """
        return self._reachable("grpc_port")

    def _reachable(self, port: str) -> str:
        listening = self.log.wait_for("listening")
        host = str(listening["host"])
        return address_of(_LOOPBACK.get(host, host), listening[port])

    def wait_until_serving(self, *, within_s: float = 60) -> None:
        """Watch its health service until it says SERVING.

        Raises:
            ProcessFailed: it does not.
        """
        request = health_pb2.HealthCheckRequest()
        with grpc.insecure_channel(self.target, options=[("grpc.enable_http_proxy", 0)]) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=within_s, wait_for_ready=True)
            try:
                next(status for status in watch if status.status == health_pb2.HealthCheckResponse.SERVING)
            except (grpc.RpcError, StopIteration) as error:
                raise ProcessFailed(self._why_not_serving(within_s)) from error
            finally:
                watch.cancel()

    def _why_not_serving(self, within_s: float) -> str:
        # Calls break before the process is gone, and it writes why as its last words.
        try:
            status = self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return f"it was not SERVING within {within_s:g} s:\n{self.log.text()}"
        self.log.wait_until_ended()
        return f"it ended with status {status} before it was SERVING:\n{self.log.text()}"

    def scrape(self, *, accept: str = "text/plain") -> str:
        """Its metrics page."""
        url = f"http://{self._reachable('metrics_port')}/metrics"
        request = urllib.request.Request(url, headers={"Accept": accept})
        with _DIRECTLY.open(request, timeout=10) as response:
            return str(response.read().decode())

    def samples(self) -> Samples:
        """The values of its metrics page."""
        lines = (line.rsplit(" ", 1) for line in self.scrape().splitlines() if not line.startswith("#"))
        return {series: float(value) for series, value in lines}

    def scrape_until(self, condition: Callable[[Samples], bool], *, within_s: float = 30) -> Samples:
        """Scrape until the values are so; returns them.

        Raises:
            ProcessFailed: they are not within the time.
        """
        ends = time.monotonic() + within_s
        while not condition(samples := self.samples()):
            if time.monotonic() > ends:
                held = {name: value for name, value in samples.items() if name.endswith(("_rows", "_requests"))}
                raise ProcessFailed(f"the metrics are not as awaited after {within_s:g} s: {held}")
        return samples

    def samples_when_idle(self, *, within_s: float = 30) -> Samples:
        """The values of its metrics page once no rows run or wait.

        Raises:
            ProcessFailed: some still do.
        """
        self.scrape_until(is_idle, within_s=within_s)
        return self.samples()  # once more: the counters of a page are read before its rows

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self, *, within_s: float = 60) -> int:
        """Its exit status, when it has ended and its log is complete.

        Raises:
            ProcessFailed: it goes on.
        """
        try:
            status = self.process.wait(within_s)
        except subprocess.TimeoutExpired as error:
            raise ProcessFailed(f"it still runs after {within_s:g} s:\n{self.log.text()}") from error
        self.log.close()
        return status

    def stop(self, *, within_s: float = 60) -> int:
        """Ask it to stop gracefully; returns its exit status."""
        self.send(signal.SIGTERM)
        return self.wait(within_s=within_s)


def is_idle(samples: Samples) -> bool:
    """Whether no rows run or wait."""
    return samples["beamline_running_rows"] == samples["beamline_queued_rows"] == 0


def _json_object(line: str) -> LogRecord | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
