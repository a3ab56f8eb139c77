"""The runner for the CPU: caches lie in host memory and are bound in place."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_server.bundle import Bundle
from beamline_server.engine.beam import IntArray
from beamline_server.engine.ort.sessions import CPU, Sessions
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
        moves = [(seat, before) for seat, before in stay if before != seat]
        # Who keeps the seat while the stride changes is copied in one go, with whoever left from in between.
        together = 0 if in_place else max((seat + 1 for seat, before in stay if before == seat), default=0)
        kept = min(self.length, length)
        for t, buffer in enumerate(self._buffers):
            old = self._view(buffer, self.seats, self.length)
            new = self._view(buffer if in_place else self._spare, len(origins), length)
            new[:together, :kept] = old[:together, :kept]
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

    def __init__(self, sessions: Sessions) -> None:
        count = len(sessions.self_names)
        self._sessions = sessions
        self.own = _SeatedTensors(count, sessions.width, sessions.dtype)
        self.cross = _SeatedTensors(count, sessions.width, sessions.dtype)
        self._binding = sessions.decoder.io_binding()
        self._bound: tuple[tuple[int, ...], ...] | None = None
        # A binding does not own host memory: what is bound is kept here. Copying values costs less than binding.
        self._inputs: dict[str, NDArray[Any]] = {}
        self._values: dict[str, NDArray[Any]] = {}
        self._logprob, self._token = np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)

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
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._inputs, self._values = {}, {}
        self._logprob = np.empty((0, 0), np.float32)
        for t, (own, cross) in enumerate(zip(self._sessions.self_names, self._sessions.cross_names, strict=True)):
            pool, memory = self.own.tensor(t), self.cross.tensor(t)
            self._binding.bind_input(own, "cpu", 0, pool.dtype, pool.shape, pool.ctypes.data)
            self._binding.bind_output(f"{own}_out", "cpu", 0, pool.dtype, pool.shape, pool.ctypes.data)
            self._binding.bind_input(cross, "cpu", 0, memory.dtype, memory.shape, memory.ctypes.data)

    def step(self, batch: StepBatch) -> tuple[FloatArray, IntArray]:
        """Run a step; what it returns is overwritten by the next one."""
        for name, array in self._sessions.step_feeds(batch).items():
            if self._values.get(name) is array:  # as most are while nobody comes or goes
                continue
            self._values[name] = array
            bound = self._inputs.get(name)
            if bound is not None and bound.shape == array.shape:
                bound[...] = array
            else:
                self._inputs[name] = bound = array.copy()
                self._binding.bind_cpu_input(name, bound)
        shape = (len(batch.ids), batch.candidates)
        if self._logprob.shape != shape:
            self._logprob, self._token = np.empty(shape, np.float32), np.empty(shape, np.int64)
            for name, output in (("top_logprob", self._logprob), ("top_token", self._token)):
                self._binding.bind_output(name, "cpu", 0, output.dtype, shape, output.ctypes.data)
        self._sessions.decoder.run_with_iobinding(self._binding)
        return self._logprob, self._token


class HostRunner:
    """Runs on the CPU. One pair of sessions serves all workers, so weights are in memory once."""

    device = "cpu"

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._sessions = Sessions(bundle, [CPU], threads)

    def encode(self, batch: EncoderBatch) -> Encoded:
        """As `StepRunner.encode`."""
        tensors = self._sessions.encoder.run(self._sessions.cross_names, self._sessions.encoder_feeds(batch))
        return Encoded(tensors)

    def new_cache(self) -> Cache:
        """As `StepRunner.new_cache`."""
        return HostCache(self._sessions)

    def step(self, cache: Cache, batch: StepBatch) -> tuple[FloatArray, IntArray]:
        """As `StepRunner.step`."""
        assert isinstance(cache, HostCache)
        return cache.step(batch)
