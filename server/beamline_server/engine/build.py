"""Puts an engine together for a bundle: device, runners, capacity; and shows that it computes what was exported."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from beamline_server.bundle import Bundle, BundleError, Golden, Manifest
from beamline_server.engine.admission import (
    DEFAULT_QUEUE_ROWS,
    DEFAULT_ROWS,
    LANE_WIDTHS,
    MAX_BEAMS,
    SHARED_WIDTH,
    Capacity,
    lane_of,
)
from beamline_server.engine.batch import LEAST_QUERY_LENGTH, encoder_batch, layout, step_batch
from beamline_server.engine.beam import SearchRules
from beamline_server.engine.core import ENCODE_TOKENS, ModelRules
from beamline_server.engine.loop import Engine
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import Deliver
from beamline_server.engine.runner import FromEncoder, StepRunner
from beamline_server.engine.scheduler import SEAT_GRANULE, Admission, Continuous

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


def choose_device(wanted: str, precision: str) -> str:
    """The device to run on, cpu or cuda.

    Raises:
        DeviceError: cuda is asked for and cannot be used.
    """
    from beamline_server.engine.ort.cuda import what_is_missing

    if wanted == "cpu":
        return wanted
    if precision == "int8":
        reason: str | None = "the bundle is int8, which runs on the CPU; export it with --precision fp16"
    else:
        reason = what_is_missing()
    if wanted == "cuda" and reason is not None:
        raise DeviceError(f"device cuda cannot be used: {reason}")
    if wanted == "auto":
        device = "cpu" if reason else "cuda"
        _log.info("device chosen", extra={"event": "device_chosen", "device": device, "reason": reason})
        return device
    return wanted


def build_runner(bundle: Bundle, device: str, threads: int) -> StepRunner:
    """A runner on a device.

    Raises:
        BundleError: a file has changed, or a graph cannot be loaded.
        DeviceError: the device does not start.
    """
    from beamline_server.engine.ort.device import DeviceRunner
    from beamline_server.engine.ort.host import HostRunner

    try:
        # fp16 graphs are made for CUDA; on a CPU, where an export checks them, their runner goes with them.
        if device == "cuda" or bundle.manifest.precision == "fp16":
            return DeviceRunner(bundle, device=device, threads=threads)
        return HostRunner(bundle, threads=threads)
    except BundleError:  # a file that has changed since it was verified; it says which
        raise
    except Exception as error:  # onnxruntime raises many kinds; all mean that the graphs or the device are unusable
        reason = str(error).splitlines()[0]
        if device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {reason}") from error
        raise BundleError(bundle.path, f"its graphs cannot be loaded ({reason}); export the model again") from error


def capacity(bundle: Bundle, options: EngineOptions) -> Capacity:
    """Rows and slots of one worker: by default, slots for as many default searches as the rows allow."""
    defaults, dimensions = bundle.manifest.generation_defaults, bundle.manifest.dimensions
    if options.slots is not None:
        return Capacity(options.rows, options.slots)
    longest = max(defaults.beam_size * defaults.max_new_tokens, dimensions.max_source_tokens)
    sentences = max(1, options.rows // defaults.beam_size)
    widest = max(MAX_BEAMS * dimensions.max_target_tokens, dimensions.max_source_tokens)
    return Capacity(options.rows, max(sentences * LANE_WIDTHS[lane_of(longest)], LANE_WIDTHS[lane_of(widest)]))


def build_engine(bundle: Bundle, options: EngineOptions, *, deliver: Deliver, observer: StepObserver) -> Engine:
    """An engine for a bundle, not started.

    Raises:
        BundleError: a graph cannot be loaded, or this machine computes something else than the exporting one.
        DeviceError: the device cannot be used.
    """
    device = choose_device(options.device, bundle.manifest.precision)
    cores = usable_cores()
    workers = options.workers or (1 if device == "cuda" else cores)
    threads = options.threads or (1 if device == "cuda" else max(1, cores // workers))
    runner = build_runner(bundle, device, threads)
    return Engine(
        [runner] * workers,
        model_rules(bundle.manifest),
        capacity(bundle, options),
        queue_rows=options.queue_rows,
        deliver=deliver,
        observer=observer,
        admission=options.admission,
    )


def forced_decode(
    runner: StepRunner, source: tuple[int, ...], forced: tuple[int, ...]
) -> tuple[list[int], list[float]]:
    """The most probable token after each forced one, and its log-probability: one sentence, one beam."""
    width = max(SEAT_GRANULE, len(source), len(forced))
    cache = runner.new_cache()
    encoded = runner.encode(encoder_batch([source], source_width=width))
    cache.arrange([FromEncoder(encoded, 0)], slots=width, source_width=width)
    tokens, logprobs = [], []
    for step, token in enumerate(forced):
        mask = np.zeros((1, 1, LEAST_QUERY_LENGTH, width), np.bool_)
        mask[..., : step + 1] = True
        batch = step_batch(
            layout(np.ones((1, 1), np.bool_)),
            token=np.array([[token]]),
            step=np.array([step]),
            slot=np.array([[step]]),
            ancestors=mask,
            source_length=np.array([len(source)]),
            candidates=1,
        )
        top_logprob, top_token = runner.step(cache, batch)
        tokens.append(int(top_token[0, 0]))
        logprobs.append(float(top_logprob[0, 0]))
    return tokens, logprobs


def exercise(bundle: Bundle, runner: StepRunner, options: EngineOptions) -> None:
    """Compute the largest usual batch once, as many at a time as there are workers.

    The first requests then find memory allocated and kernels chosen, and memory does not grow with the traffic later.
    """
    workers = options.workers or (1 if runner.device == "cuda" else usable_cores())
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(lambda _: _largest_batch(bundle, runner, options.rows), range(workers)))


def _largest_batch(bundle: Bundle, runner: StepRunner, rows: int) -> None:
    defaults, dimensions = bundle.manifest.generation_defaults, bundle.manifest.dimensions
    beams = defaults.beam_size
    sentences = max(1, rows // beams)
    length = max(1, min(ENCODE_TOKENS // sentences, dimensions.max_source_tokens))
    encoded = runner.encode(encoder_batch([[0] * length] * sentences, source_width=length))
    width = SHARED_WIDTH
    cache = runner.new_cache()
    cache.arrange([FromEncoder(encoded, i) for i in range(sentences)], slots=width, source_width=max(length, width))
    mask = np.zeros((sentences, 1, max(beams, LEAST_QUERY_LENGTH), width), np.bool_)
    mask[..., 0] = True
    rules = model_rules(bundle.manifest).search
    batch = step_batch(
        layout(np.ones((sentences, beams), np.bool_)),
        token=np.zeros((sentences, beams), np.int64),
        step=np.zeros(sentences, np.int64),
        slot=np.tile(np.arange(beams), (sentences, 1)),
        ancestors=mask,
        source_length=np.full(sentences, length),
        candidates=rules.needed_candidates(beams, dimensions.target_vocabulary),
    )
    runner.step(cache, batch)


def check_golden(bundle: Bundle, runner: StepRunner) -> None:
    """Run the manifest's golden inputs: whatever makes this machine compute something else shows here.

    Raises:
        BundleError: an answer differs from the exporting machine's by more than the manifest's tolerance.
    """
    for number, golden in enumerate(bundle.manifest.golden):
        _, logprobs = forced_decode(runner, golden.source, golden.forced)
        difference = _difference(golden, logprobs)
        if not difference <= bundle.manifest.golden_tolerance:
            raise BundleError(
                bundle.path,
                f"golden input {number} differs by {difference:.3g} on this machine (allowed: "
                f"{bundle.manifest.golden_tolerance:g}); its processor computes {bundle.manifest.precision} "
                "differently: export the model as fp32",
            )


def _difference(golden: Golden, logprobs: list[float]) -> float:
    return float(np.abs(np.array(golden.top_logprob) - np.array(logprobs)).max(initial=0.0))
