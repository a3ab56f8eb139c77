"""The runner for a device whose memory the host cannot write to: CUDA."""

import logging
import threading
from typing import Any

import numpy as np

from beamline_server.bundle import Bundle, Precision
from beamline_server.engine.beam import IntArray
from beamline_server.engine.ort.captured_graphs import CapturedGraphs
from beamline_server.engine.ort.cuda import preload, provider_options, what_is_missing
from beamline_server.engine.ort.device_cache import DeviceCache, LargestMemory
from beamline_server.engine.ort.encoder_runs import EncoderRuns
from beamline_server.engine.ort.padding import fill_step
from beamline_server.engine.ort.row_mover import RowMover
from beamline_server.engine.ort.sessions import CPU, CUDA, Sessions
from beamline_server.engine.runner import Cache, Encoded, EncoderBatch, StepBatch
from beamline_server.engine.scoring import FloatArray

STEP_GRAPHS, ENCODER_GRAPHS = 96, 32
"""Captured graphs at most; each keeps some hundred kilobytes of host and device memory for the life of the process."""
_log = logging.getLogger(__name__)


class DeviceRunner:
    """Keeps all caches in device memory; of a step only the best candidates come back.

    Every step is computed in one of few shapes (shape_buckets.py), at addresses that stay (device_cache.py), from
    inputs that are copied over in one go (fixed_run.py); shapes that come often are replayed as CUDA graphs
    (captured_graphs.py). One thread at a time uses the device: capturing forbids every other use meanwhile.

    Args:
        bundle: fp16 for CUDA.
        device: "cuda", or "cpu" to run the same code without a GPU.
        threads: Threads for what is left on the host.
        graphs: Whether CUDA graphs are captured.
    """

    def __init__(self, bundle: Bundle, *, device: str = "cuda", threads: int = 1, graphs: bool = True) -> None:
        self.device = device
        if device == "cuda":
            preload()
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
        self._vocabulary = bundle.manifest.dimensions.target_vocabulary
        self._largest = LargestMemory()
        self._lock = threading.Lock()

    def encode(self, batch: EncoderBatch) -> Encoded:
        """As `StepRunner.encode`."""
        with self._lock:
            return self._encoder.encode(batch)

    def new_cache(self) -> Cache:
        """As `StepRunner.new_cache`."""
        with self._lock:
            return DeviceCache(
                self._sessions,
                self._mover,
                device=self.device,
                largest=self._largest,
                lock=self._lock,
                vocabulary=self._vocabulary,
            )

    def step(self, cache: Cache, batch: StepBatch) -> tuple[FloatArray, IntArray]:
        """As `StepRunner.step`."""
        assert isinstance(cache, DeviceCache)
        with self._lock:
            run = cache.run_for(batch)
            fill_step(run.inputs, batch, cache.seat)
            run.send()
            self.step_graphs.run(run)
            best = run.receive()
        rows, candidates = len(batch.ids), batch.candidates
        logprob, token = best["top_logprob"], best["top_token"]
        return np.ascontiguousarray(logprob[:rows, :candidates]), np.ascontiguousarray(token[:rows, :candidates])


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
