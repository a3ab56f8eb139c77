"""Computes with onnxruntime. The only module that knows it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from beamline_server.bundle import DECODER_STEP, ENCODER, KV_ARRANGE, Bundle
from beamline_server.engine.beam import IntArray
from beamline_server.engine.runner import (
    Cache,
    Encoded,
    EncoderBatch,
    FromCache,
    FromEncoder,
    FromSeat,
    Origin,
    StepBatch,
)
from beamline_server.engine.scoring import FloatArray

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
_MASKED = -1e4
"""What an additive mask adds where a beam has no ancestor: finite, so that a row without any gives no NaN in fp16."""


def available_providers() -> list[str]:
    """Execution providers that this build of onnxruntime has."""
    return list(ort.get_available_providers())


def _session(bundle: Bundle, name: str, providers: Sequence[Any], threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Shapes change from step to step: a pattern of one is no use for the next.
    options.enable_mem_pattern = False
    # The decode threads share the cores with the front end, which a spinning pool would starve.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # On CPU the fused kernel is several times slower than its parts (onnxruntime 1.31).
    options.add_session_config_entry(
        "optimization.disable_specified_optimizers", "SkipLayerNormFusion;BiasSkipLayerNormFusion"
    )
    return ort.InferenceSession(str(bundle.file(name)), options, providers=list(providers))


class _Sessions:
    """The encoder and the decoder step of a bundle."""

    def __init__(self, bundle: Bundle, providers: Sequence[Any], threads: int) -> None:
        layers = range(bundle.manifest.dimensions.decoder_layers)
        self.width = bundle.manifest.dimensions.d_model
        self.self_names = [f"self_{kind}_{i}" for i in layers for kind in ("k", "v")]
        self.cross_names = [f"cross_{kind}_{i}" for i in layers for kind in ("k", "v")]
        self.encoder = _session(bundle, ENCODER, providers, threads)
        self.decoder = _session(bundle, DECODER_STEP, providers, threads)
        types = {value.name: value.type for value in self.decoder.get_inputs()}
        self.dtype = np.float16 if types[self.self_names[0]] == "tensor(float16)" else np.float32
        self.additive_mask = types["ancestors"] != "tensor(bool)"

    def encoder_feeds(self, batch: EncoderBatch) -> dict[str, NDArray[Any]]:
        return {
            "ids": batch.ids,
            "positions": batch.positions,
            "row_of": batch.row_of,
            "back": batch.back,
            "source_length": batch.source_length,
        }

    def step_feeds(self, batch: StepBatch) -> dict[str, NDArray[Any]]:
        mask: NDArray[Any] = batch.ancestors
        if self.additive_mask:
            mask = np.where(mask, 0.0, _MASKED).astype(self.dtype)
        return {
            "ids": batch.ids,
            "positions": batch.positions,
            "slot": batch.slot,
            "row_of": batch.row_of,
            "back": batch.back,
            "ancestors": mask,
            "source_length": batch.source_length,
            "candidates": np.array([batch.candidates], np.int64),
        }


class _SeatedTensors:
    """Tensors [seats, length, D] in host memory that change their strides together.

    The buffers start zeroed and only ever hold what a graph computed, so no masked slot is NaN. One spare buffer lets
    a change of stride go through without an allocation: each tensor moves into the spare and leaves its own behind.
    """

    def __init__(self, count: int, width: int, dtype: type[np.generic]) -> None:
        self._width = width
        self._buffers = [np.zeros(0, dtype) for _ in range(count)]
        self._spare = np.zeros(0, dtype)
        self.seats = 0
        self.length = 0

    def tensor(self, i: int) -> NDArray[Any]:
        return self._view(self._buffers[i], self.seats, self.length)

    def place(self) -> tuple[int, ...]:
        """Where the tensors are and how large: the same value means that nothing has to be bound anew."""
        return (self.seats, self.length, *(id(buffer) for buffer in self._buffers))

    def arrange(self, origins: Sequence[Origin], length: int, sources: Mapping[int, Sequence[NDArray[Any]]]) -> None:
        """Seat anew; sources[i] are the tensors that seat i is copied from, [length, D] each."""
        size = len(origins) * length * self._width
        in_place = length == self.length and size <= len(self._buffers[0])
        if not in_place and size > len(self._spare):
            # Some seats more than asked for, so that a growing lane does not allocate at every newcomer.
            self._spare = np.zeros(size + size // 2, self._spare.dtype)
        stay = [(seat, origin.seat) for seat, origin in enumerate(origins) if isinstance(origin, FromSeat)]
        moves = [(seat, before) for seat, before in stay if not in_place or before != seat]
        kept = min(self.length, length)
        for t, buffer in enumerate(self._buffers):
            old = self._view(buffer, self.seats, self.length)
            new = self._view(buffer if in_place else self._spare, len(origins), length)
            for seat, before in moves:
                new[seat, :kept] = old[before, :kept]
            for seat, tensors in sources.items():
                source = tensors[t][:length]
                new[seat, : len(source)] = source
            if not in_place:
                self._buffers[t], self._spare = self._spare, buffer
                if len(self._spare) < size:
                    self._spare = np.zeros(len(self._buffers[t]), buffer.dtype)
        self.seats, self.length = len(origins), length

    def _view(self, buffer: NDArray[Any], seats: int, length: int) -> NDArray[Any]:
        return buffer[: seats * length * self._width].reshape(seats, length, self._width)


class HostCache:
    """A lane's caches in host memory, bound in place."""

    def __init__(self, sessions: _Sessions) -> None:
        count = len(sessions.self_names)
        self._sessions = sessions
        self.own = _SeatedTensors(count, sessions.width, sessions.dtype)
        self.cross = _SeatedTensors(count, sessions.width, sessions.dtype)
        self.binding = sessions.decoder.io_binding()
        self._bound: tuple[tuple[int, ...], ...] | None = None

    @property
    def slots(self) -> int:
        """As `Cache.slots`."""
        return self.own.length

    @property
    def source_width(self) -> int:
        """As `Cache.source_width`."""
        return self.cross.length

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """As `Cache.arrange`."""
        count = len(self._sessions.self_names)
        own: dict[int, list[NDArray[Any]]] = {}
        cross: dict[int, list[NDArray[Any]]] = {}
        for seat, origin in enumerate(origins):
            if isinstance(origin, FromEncoder):
                cross[seat] = [tensor[origin.index] for tensor in origin.encoded.tensors]
            elif isinstance(origin, FromCache):
                other = origin.cache
                assert isinstance(other, HostCache)
                own[seat] = [other.own.tensor(t)[origin.seat] for t in range(count)]
                cross[seat] = [other.cross.tensor(t)[origin.seat] for t in range(count)]
        self.own.arrange(origins, slots, own)
        self.cross.arrange(origins, source_width, cross)
        self._bind()

    def _bind(self) -> None:
        """Bind pools as inputs and as outputs to the same memory: the graph then writes them in place."""
        bound = (self.own.place(), self.cross.place())
        if bound == self._bound:
            return
        self._bound = bound
        self.binding.clear_binding_inputs()
        self.binding.clear_binding_outputs()
        for t, (own, cross) in enumerate(zip(self._sessions.self_names, self._sessions.cross_names, strict=True)):
            pool, memory = self.own.tensor(t), self.cross.tensor(t)
            self.binding.bind_input(own, "cpu", 0, pool.dtype, pool.shape, pool.ctypes.data)
            self.binding.bind_output(f"{own}_out", "cpu", 0, pool.dtype, pool.shape, pool.ctypes.data)
            self.binding.bind_input(cross, "cpu", 0, memory.dtype, memory.shape, memory.ctypes.data)


class HostRunner:
    """Runs on the CPU. One pair of sessions serves all workers, so weights are in memory once."""

    device = "cpu"

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._sessions = _Sessions(bundle, [CPU], threads)

    def encode(self, batch: EncoderBatch) -> Encoded:
        """As `StepRunner.encode`."""
        tensors = self._sessions.encoder.run(self._sessions.cross_names, self._sessions.encoder_feeds(batch))
        return Encoded(tensors, batch.row_of.shape[1])

    def new_cache(self) -> Cache:
        """As `StepRunner.new_cache`."""
        return HostCache(self._sessions)

    def step(self, cache: Cache, batch: StepBatch) -> tuple[FloatArray, IntArray]:
        """As `StepRunner.step`."""
        assert isinstance(cache, HostCache)
        feeds = self._sessions.step_feeds(batch)
        shape = (len(batch.ids), batch.candidates)
        logprob, token = np.empty(shape, np.float32), np.empty(shape, np.int64)
        for name, array in feeds.items():
            cache.binding.bind_cpu_input(name, array)
        cache.binding.bind_output("top_logprob", "cpu", 0, logprob.dtype, shape, logprob.ctypes.data)
        cache.binding.bind_output("top_token", "cpu", 0, token.dtype, shape, token.ctypes.data)
        self._sessions.decoder.run_with_iobinding(cache.binding)
        return logprob, token


class DeviceCache:
    """A lane's caches in device memory, which the host cannot write to: a small graph re-seats them."""

    def __init__(self, sessions: _Sessions, arranger: ort.InferenceSession, device: str) -> None:
        self._sessions = sessions
        self._arranger = arranger
        self._device = device
        empty = np.zeros((1, 1, sessions.width), sessions.dtype)
        self._nothing = ort.OrtValue.ortvalue_from_numpy(empty, device, 0)
        self.own = [self._nothing] * len(sessions.self_names)
        self.cross = [self._nothing] * len(sessions.cross_names)
        self.slots = 1
        self.source_width = 1

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """As `Cache.arrange`."""
        own_sources: list[list[ort.OrtValue]] = []
        cross_sources: list[list[ort.OrtValue]] = []
        known: dict[int, int] = {}
        picks: list[tuple[int, int]] = []
        for origin in origins:
            if isinstance(origin, FromSeat):
                picks.append((0, origin.seat))
                continue
            source = origin.encoded if isinstance(origin, FromEncoder) else origin.cache
            if id(source) not in known:
                known[id(source)] = len(known) + 1
                if isinstance(source, Encoded):
                    own_sources.append([self._nothing] * len(self.own))
                    cross_sources.append(source.tensors)
                else:
                    assert isinstance(source, DeviceCache)
                    own_sources.append(source.own)
                    cross_sources.append(source.cross)
            index = origin.index if isinstance(origin, FromEncoder) else origin.seat
            picks.append((known[id(source)], index))
        # A newcomer has no past: whatever finite seat it starts from is masked.
        fresh = {known[id(o.encoded)] for o in origins if isinstance(o, FromEncoder)}
        own_picks = [(source, 0 if source in fresh else index) for source, index in picks]
        for t in range(len(self.own)):
            self.own[t] = self._gather([self.own[t], *(s[t] for s in own_sources)], own_picks, slots)
            self.cross[t] = self._gather([self.cross[t], *(s[t] for s in cross_sources)], picks, source_width)
        self.slots, self.source_width = slots, source_width

    def _gather(self, sources: Sequence[ort.OrtValue], picks: Sequence[tuple[int, int]], length: int) -> ort.OrtValue:
        """Seats picks[i] = (source, index) of several tensors, cropped or padded to a length, as one tensor."""
        shapes = [source.shape() for source in sources]
        offsets = np.concatenate([[0], np.cumsum([shape[0] for shape in shapes])])
        take = np.array([offsets[source] + index for source, index in picks], np.int64)
        result, present = sources[0], shapes[0]
        others = list(zip(sources[1:], shapes[1:], strict=True)) or [(self._nothing, self._nothing.shape())]
        for i, (added, shape) in enumerate(others):
            last = i == len(others) - 1
            everything = np.arange(present[0] + shape[0], dtype=np.int64)
            chosen = take if last else everything
            result = self._arrange(result, added, (length - present[1], length - shape[1]), chosen)
            present = [len(chosen), length, shape[2]]
        return result

    def _arrange(
        self, kept: ort.OrtValue, added: ort.OrtValue, growth: tuple[int, int], take: NDArray[np.int64]
    ) -> ort.OrtValue:
        binding = self._arranger.io_binding()
        binding.bind_ortvalue_input("kept", kept)
        binding.bind_ortvalue_input("added", added)
        for name, more in zip(("pad_kept", "pad_added"), growth, strict=True):
            binding.bind_cpu_input(name, np.array([0, 0, 0, 0, more, 0], np.int64))
        binding.bind_cpu_input("take", take)
        binding.bind_output("arranged", self._device, 0)
        self._arranger.run_with_iobinding(binding)
        return binding.get_outputs()[0]


class DeviceRunner:
    """Keeps all caches in device memory; of a step only the best candidates come back.

    Args:
        bundle: fp16 for CUDA.
        device: "cuda", or "cpu" to run the same code without a GPU.
        threads: Threads for what is left on the host.
    """

    def __init__(self, bundle: Bundle, *, device: str = "cuda", threads: int = 1) -> None:
        self.device = device
        if device == "cuda":
            # Finds CUDA and cuDNN among the installed Python packages; what is loaded already (torch's) is used.
            ort.preload_dlls()
        # Flash or memory-efficient attention; cuDNN would build a plan per shape.
        cuda = (CUDA, {"device_id": 0, "sdpa_kernel": 3, "arena_extend_strategy": "kSameAsRequested"})
        providers: list[Any] = [cuda, CPU] if device == "cuda" else [CPU]
        self._sessions = _Sessions(bundle, providers, threads)
        if device == "cuda" and CUDA not in self._sessions.decoder.get_providers():
            raise RuntimeError("onnxruntime could not start its CUDA provider; its log says why")
        self._arranger = _session(bundle, KV_ARRANGE, providers, threads)

    def encode(self, batch: EncoderBatch) -> Encoded:
        """As `StepRunner.encode`."""
        binding = self._sessions.encoder.io_binding()
        for name, array in self._sessions.encoder_feeds(batch).items():
            binding.bind_cpu_input(name, array)
        for name in self._sessions.cross_names:
            binding.bind_output(name, self.device, 0)
        self._sessions.encoder.run_with_iobinding(binding)
        return Encoded(binding.get_outputs(), batch.row_of.shape[1])

    def new_cache(self) -> Cache:
        """As `StepRunner.new_cache`."""
        return DeviceCache(self._sessions, self._arranger, self.device)

    def step(self, cache: Cache, batch: StepBatch) -> tuple[FloatArray, IntArray]:
        """As `StepRunner.step`."""
        assert isinstance(cache, DeviceCache)
        binding = self._sessions.decoder.io_binding()
        # Bound first and kept until the run is over: a binding does not own host memory.
        feeds = self._sessions.step_feeds(batch)
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("top_logprob", "cpu", 0)
        binding.bind_output("top_token", "cpu", 0)
        for t, (own, cross) in enumerate(zip(self._sessions.self_names, self._sessions.cross_names, strict=True)):
            binding.bind_ortvalue_input(own, cache.own[t])
            binding.bind_ortvalue_output(f"{own}_out", cache.own[t])
            binding.bind_ortvalue_input(cross, cache.cross[t])
        self._sessions.decoder.run_with_iobinding(binding)
        logprob, token, *_ = binding.get_outputs()
        return logprob.numpy(), token.numpy()
