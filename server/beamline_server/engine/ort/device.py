"""The runner for a device whose memory the host cannot write to: CUDA."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from beamline_server.bundle import KV_ARRANGE, Bundle
from beamline_server.engine.beam import IntArray
from beamline_server.engine.ort.sessions import CPU, CUDA, Sessions, open_session
from beamline_server.engine.runner import Cache, Encoded, EncoderBatch, FromEncoder, FromSeat, Origin, StepBatch
from beamline_server.engine.scoring import FloatArray


class DeviceCache:
    """A lane's caches in device memory, which the host cannot write to: a small graph re-seats them."""

    def __init__(self, sessions: Sessions, arranger: ort.InferenceSession, device: str) -> None:
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
        self._sessions = Sessions(bundle, providers, threads)
        if device == "cuda" and CUDA not in self._sessions.decoder.get_providers():
            raise RuntimeError("onnxruntime could not start its CUDA provider; its log says why")
        self._arranger = open_session(bundle, KV_ARRANGE, providers, threads)

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
