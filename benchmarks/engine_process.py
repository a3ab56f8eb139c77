"""An engine in a process of its own, for the comparison in docs/adr/0003: what would leaving the front end's GIL give?

Not used by the server. `serving.py --engine-process` builds it in place of the engine in process. It is as lean as such
a thing can be: no admission, no failure handling.
"""

import multiprocessing
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from beamline_server.bundle import load_bundle
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import Deliver, Event, GenerationRequest, RequestId
from beamline_server.engine.workers import EngineLoad
from beamline_server.models.load import EngineOptions, build_engine


def _compute(path: Path, workers: int, pipe: Connection) -> None:
    """The engine's process: requests in, events out."""
    lock = threading.Lock()

    def deliver(events: Sequence[Event]) -> None:
        with lock:
            pipe.send(list(events))

    options = EngineOptions(workers=workers, threads=1, queue_rows=1_000_000)
    engine = build_engine(load_bundle(path), options, deliver=deliver, observer=NullObserver())
    engine.start()
    pipe.send([])
    while (requests := pipe.recv()) is not None:
        engine.submit(requests)
    engine.stop(0)


class EngineProcess:
    """Stands in for `Engine`."""

    def __init__(self, path: Path, workers: int, deliver: Deliver) -> None:
        self._pipe, far_end = multiprocessing.Pipe()
        self._lock = threading.Lock()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_compute, args=(path, workers, far_end), daemon=True)
        self.process.start()
        far_end.close()
        self._deliver = deliver
        self._pipe.recv()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while True:
            try:
                self._deliver(self._pipe.recv())
            except EOFError:
                return

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Send requests over."""
        with self._lock:
            self._pipe.send(list(requests))

    def foreseen_refusal(self, caller: str, remaining_s: float, ahead: int) -> None:
        """Nothing is refused before it is read."""

    def cancel(self, ids: Sequence[RequestId]) -> None:
        """Not needed for a measurement."""

    def load(self) -> EngineLoad:
        """Nothing to tell."""
        return EngineLoad(0, 0, 0, 0, 0, 0, None)

    def give_up(self, number: int) -> None:
        """Not needed for a measurement."""

    def stop(self, grace_s: float) -> None:
        """End the process."""
        del grace_s
        self._pipe.send(None)
        self.process.join()
        self._thread.join()
