"""Puts an engine together for a bundle: device, backends, capacity; and shows that it computes what was exported."""

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from beamline_server.bundle import EXPORT_AGAIN, Bundle, BundleError, in_short
from beamline_server.engine.admission import (
    DEFAULT_QUEUE_ROWS,
    DEFAULT_ROWS,
    WIDTHS,
    Admission,
    Capacity,
    Continuous,
    number_of,
)
from beamline_server.engine.backend import Backend
from beamline_server.engine.observer import NullObserver, StepObserver
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import MAX_BEAMS, Deliver, Failed, GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.engine.workers import Engine
from beamline_server.manifest import Golden, Manifest
from beamline_server.models.forced import forced_decode

_log = logging.getLogger(__name__)


class DeviceError(Exception):
    """The device that was asked for cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to build an engine; None leaves the choice to the engine.

    Attributes:
        device: auto, cpu or cuda.
        workers: Decode threads; by default one per core on CPU, one on CUDA.
        threads: Threads per worker inside onnxruntime.
        rows: Live hypotheses per worker.
        slots: Cache slots per worker.
        queue_rows: Rows that may wait, all workers together.
        admission: When requests may start.
    """

    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    rows: int = DEFAULT_ROWS
    slots: int | None = None
    queue_rows: int = DEFAULT_QUEUE_ROWS
    admission: Admission = Continuous()  # noqa: RUF009 - a frozen value


def model_rules(manifest: Manifest) -> ModelRules:
    """What the engine needs to know of a bundle."""
    tokens, dimensions = manifest.special_tokens, manifest.dimensions
    return ModelRules(
        search=SearchRules(
            eos=tokens.eos,
            banned=tokens.banned,
            banned_at_start=tokens.banned_at_start,
            forced_first=tokens.forced_bos,
            forced_last=tokens.forced_eos,
        ),
        decoder_start=tokens.decoder_start,
        vocabulary=dimensions.target_vocabulary,
        max_source_tokens=dimensions.max_source_tokens,
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(wanted: str, precision: str, *, decoder_only: bool = False) -> str:
    """The device to run on, cpu or cuda.

    Raises:
        DeviceError: cuda is asked for and cannot be used.
    """
    from beamline_server.engine.ort.cuda.provider import what_is_missing

    if wanted == "cpu":
        return wanted
    if decoder_only:
        reason: str | None = "the model has no encoder, and runs on the CPU alone so far; serve it with device cpu"
    elif precision in ("int8", "int4"):
        reason = f"the bundle is {precision}, which runs on the CPU; export it with --precision fp16"
    else:
        reason = what_is_missing()
    if wanted == "cuda" and reason is not None:
        raise DeviceError(f"device cuda cannot be used: {reason}")
    if wanted == "auto":
        device = "cpu" if reason else "cuda"
        _log.info("device chosen", extra={"event": "device_chosen", "device": device, "reason": reason})
        return device
    return wanted


def build_backend(bundle: Bundle, device: str, threads: int, *, mapped: bool = False) -> Backend:
    """A backend on a device.

    Args:
        bundle: Verified.
        device: cpu or cuda.
        threads: To compute a node on.
        mapped: Whether a CPU's sessions map the file of weights, which takes least memory; it must not change then.

    Raises:
        BundleError: a file has changed, or a graph cannot be loaded.
        DeviceError: the device does not start.
    """
    with _telling(bundle, device, "loaded"):
        # Each is imported where it is needed: CUDA's brings onnxruntime's Python interface, which the CPU's does
        # without. fp16 graphs are made for CUDA; on a CPU, where an export checks them, their backend goes with them.
        if device == "cuda" or bundle.manifest.precision == "fp16":
            from beamline_server.engine.ort.cuda.backend import CudaBackend

            return CudaBackend(bundle, device=device, threads=threads, mapped=mapped and device == "cpu")
        from beamline_server.engine.ort.cpu import CpuBackend

        return CpuBackend(bundle, threads=threads, mapped=mapped)


@contextmanager
def _telling(bundle: Bundle, device: str, what: str) -> Iterator[None]:
    """Turns what is raised within into one line about the bundle or the device."""
    try:
        yield
    except (BundleError, DeviceError):  # a file that has changed since it was verified; it says which
        raise
    except Exception as error:  # onnxruntime raises many kinds; all mean that the graphs or the device are unusable
        reason = in_short(error.__cause__ or error)
        if device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {reason}") from error
        raise BundleError(bundle.path, f"its graphs cannot be {what} ({reason})", EXPORT_AGAIN) from error


def capacity(bundle: Bundle, options: EngineOptions) -> Capacity:
    """Rows and slots of one worker: by default, slots for as many default searches as the rows allow."""
    defaults, dimensions = bundle.manifest.generation_defaults, bundle.manifest.dimensions
    if options.slots is not None:
        return Capacity(options.rows, options.slots)
    longest = max(defaults.beam_size * defaults.max_new_tokens, dimensions.max_source_tokens)
    sentences = max(1, options.rows // defaults.beam_size)
    widest = max(MAX_BEAMS * dimensions.max_target_tokens, dimensions.max_source_tokens)
    return Capacity(options.rows, max(sentences * WIDTHS[number_of(longest)], WIDTHS[number_of(widest)]))


def most_bytes_of_workers(bundle: Bundle, options: EngineOptions, device: str) -> int:
    """The most memory of the host that all workers take beside the weights; a GPU has its own."""
    from beamline_server.engine.ort.cpu import most_bytes_of_a_worker

    if device == "cuda":
        return 0
    workers = options.workers or usable_cores()
    return workers * most_bytes_of_a_worker(bundle.manifest.dimensions, capacity(bundle, options))


def build_engine(bundle: Bundle, options: EngineOptions, *, deliver: Deliver, observer: StepObserver) -> Engine:
    """An engine for a bundle, not started.

    Raises:
        BundleError: a graph cannot be loaded, or this machine computes something else than the exporting one.
        DeviceError: the device cannot be used.
    """
    manifest = bundle.manifest
    device = choose_device(options.device, manifest.precision, decoder_only=manifest.dimensions.decoder_only)
    cores = usable_cores()
    workers = options.workers or (1 if device == "cuda" else cores)
    threads = options.threads or (1 if device == "cuda" else max(1, cores // workers))
    backend = build_backend(bundle, device, threads)
    return Engine(
        [backend] * workers,
        model_rules(bundle.manifest),
        capacity(bundle, options),
        queue_rows=options.queue_rows,
        deliver=deliver,
        observer=observer,
        admission=options.admission,
    )


def warm_up(bundle: Bundle, backend: Backend, options: EngineOptions) -> None:
    """Show that a backend computes what was exported, and compute the largest usual batch once.

    Raises:
        BundleError: it computes something else, or cannot compute it.
        DeviceError: the device fails.
    """
    with _telling(bundle, backend.device, "computed"):
        check_golden(bundle, backend)
        exercise(bundle, backend, options)


def exercise(bundle: Bundle, backend: Backend, options: EngineOptions) -> None:
    """Compute the largest usual batch once, as many at a time as there are workers.

    The first requests then find memory allocated and kernels chosen, and memory does not grow with the traffic later.
    """
    workers = options.workers or (1 if backend.device == "cuda" else usable_cores())
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(lambda _: _largest_batch(bundle, backend, options.rows), range(workers)))


def _largest_batch(bundle: Bundle, backend: Backend, rows: int) -> None:
    """Two steps of as many default searches as there are rows, sources as long as an encoder call takes."""
    defaults, dimensions = bundle.manifest.generation_defaults, bundle.manifest.dimensions
    sentences = max(1, rows // defaults.beam_size)
    length = max(1, min(backend.encode_tokens // sentences, dimensions.max_source_tokens))
    steps = min(2, dimensions.max_target_tokens)
    search = SearchOptions(beam_size=defaults.beam_size, min_new_tokens=steps, max_new_tokens=steps)
    capacity = Capacity(sentences * defaults.beam_size, 1 << 40)
    core = EngineCore(backend, model_rules(bundle.manifest), capacity, clock=time.monotonic, observer=NullObserver())
    core.accept(GenerationRequest(RequestId(i), (0,) * length, search) for i in range(sentences))
    while not core.idle:
        for event in core.step():
            if isinstance(event, Failed):
                raise event.error


def check_golden(bundle: Bundle, backend: Backend) -> None:
    """Run the manifest's golden inputs: whatever makes this machine compute something else shows here.

    Raises:
        BundleError: an answer differs from the exporting machine's by more than the manifest's tolerance.
    """
    for number, golden in enumerate(bundle.manifest.golden):
        _, logprobs = forced_decode(backend, golden.source, golden.forced)
        difference = _difference(golden, logprobs)
        if not difference <= bundle.manifest.golden_tolerance:
            allowed = f"(allowed: {bundle.manifest.golden_tolerance:g})"
            raise BundleError(
                bundle.path,
                f"golden input {number} differs by {difference:.3g} on this machine {allowed}; its processor computes "
                f"{bundle.manifest.precision} differently",
                "export the model as fp32",
            )


def _difference(golden: Golden, logprobs: list[float]) -> float:
    return float(np.abs(np.array(golden.top_logprob) - np.array(logprobs)).max(initial=0.0))
