"""The backend for a device whose memory the host cannot write to: CUDA."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Cache, Encoded
from beamline_server.engine.ort.cuda.buckets import Buckets
from beamline_server.engine.ort.cuda.captured_graphs import CapturedGraphs
from beamline_server.engine.ort.cuda.encoder import EncoderRuns
from beamline_server.engine.ort.cuda.memory import CudaMemory, LargestMemory
from beamline_server.engine.ort.cuda.provider import preload, provider_options, what_is_missing
from beamline_server.engine.ort.cuda.row_mover import RowMover
from beamline_server.engine.ort.sessions import Sessions
from beamline_server.engine.ort.settings import CPU, CUDA
from beamline_server.graphs import Precision

STEP_GRAPHS, ENCODER_GRAPHS = 96, 32
"""Captured graphs at most; each keeps some hundred kilobytes of host and device memory for the life of the process."""
_log = logging.getLogger(__name__)


class CudaBackend:
    """Keeps all caches in device memory; of a step only the best candidates come back.

    Every step is computed in one of few shapes (shapes.py), at addresses that stay (memory.py), from
    inputs that are copied over in one go (fixed_run.py); shapes that come often are replayed as CUDA graphs
    (captured_graphs.py). One thread at a time uses the device: capturing forbids every other use meanwhile.

    Args:
        bundle: fp16 for CUDA.
        device: "cuda", or "cpu" to run the same code without a GPU.
        threads: Threads for what is left on the host.
        graphs: Whether CUDA graphs are captured.
        mapped: As `Sessions`.
    """

    encode_tokens = 1024
    has_encoder = True

    def __init__(
        self, bundle: Bundle, *, device: str = "cuda", threads: int = 1, graphs: bool = True, mapped: bool = False
    ) -> None:
        self.device = device
        if device == "cuda":
            preload()
        if mapped:
            on = providers(device, bundle.manifest.precision, graphs=False)
            self._sessions, captured = Sessions(bundle, on, threads, mapped=True), False
        else:
            self._sessions, captured = _open(bundle, device, threads, graphs)
        if device == "cuda" and CUDA not in self._sessions.decoder.get_providers():
            raise RuntimeError(
                what_is_missing() or "onnxruntime could not start its CUDA provider, and does not say why"
            )
        self._mover = RowMover(
            providers(device, bundle.manifest.precision, graphs=False),
            device=device,
            width=self._sessions.width,
            dtype=self._sessions.dtype,
            threads=threads,
        )
        self.step_graphs = CapturedGraphs(STEP_GRAPHS if captured else 0)
        self.encoder_graphs = CapturedGraphs(ENCODER_GRAPHS if captured else 0)
        self._encoder = EncoderRuns(
            self._sessions.encoder, self._sessions.cross_names, device=device, graphs=self.encoder_graphs
        )
        self._largest = LargestMemory()
        self._lock = threading.Lock()

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """As `Backend.encode`."""
        with self._lock:
            return self._encoder.encode(sources)

    def new_cache(self) -> Cache:
        """As `Backend.new_cache`."""
        return Buckets(self.new_memory)

    def new_memory(self) -> CudaMemory:
        """The memory of a bucket."""
        return CudaMemory(
            self._sessions,
            self._mover,
            self.step_graphs,
            device=self.device,
            largest=self._largest,
            lock=self._lock,
        )


def providers(device: str, precision: Precision, *, graphs: bool) -> list[Any]:
    """Execution providers of a session, as `onnxruntime.InferenceSession` takes them."""
    return [CPU] if device == "cpu" else [(CUDA, provider_options(precision, graphs=graphs)), CPU]


def _open(bundle: Bundle, device: str, threads: int, graphs: bool) -> tuple[Sessions, bool]:
    """Sessions, and whether they can capture graphs: onnxruntime refuses if a node is left to the host."""
    precision = bundle.manifest.precision
    if graphs:
        try:
            return Sessions(bundle, providers(device, precision, graphs=True), threads), True
        except Exception as error:  # whatever it was: if it is not about graphs, it comes again
            _log.warning("no CUDA graphs", exc_info=error, extra={"event": "graphs_off", "device": device})
    return Sessions(bundle, providers(device, precision, graphs=False), threads), False
