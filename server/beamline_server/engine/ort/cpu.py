"""The backend for the CPU: caches lie in host memory and are bound in place."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_server.bundle import Bundle
from beamline_server.engine.admission import SHARED_WIDTH, number_of
from beamline_server.engine.backend import Cache, Encoded, StepResult
from beamline_server.engine.buckets import (
    FINE_FROM,
    Buckets,
    FromBatch,
    FromEncoder,
    Origin,
    round_up,
)
from beamline_server.engine.ort.sessions import CPU, ENCODER_INPUTS, STEP_INPUTS, Sessions
from beamline_server.engine.pack import (
    LEAST_QUERIES,
    EncoderInputs,
    Extent,
    StepInputs,
    flat,
    pack_encoder,
    pack_step,
)
from beamline_server.engine.table import IntArray, Table


class CpuBackend:
    """Runs on the CPU. One pair of sessions serves all workers, so weights are in memory once."""

    device = "cpu"

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._sessions = Sessions(bundle, [CPU], threads)

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """As `Backend.encode`."""
        ids, lengths = flat(sources)
        inputs = _encoder_inputs(len(ids), len(lengths), max(round_up(int(lengths.max())), LEAST_QUERIES))
        pack_encoder(ids, lengths, inputs)
        tensors = self.run_encoder(dict(zip(ENCODER_INPUTS, inputs, strict=True)))
        return Encoded(tensors, inputs.pad_index.size - len(ids))

    def run_encoder(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute cross-attention keys and values from the encoder's inputs."""
        tensors: list[NDArray[Any]] = self._sessions.encoder.run(self._sessions.cross_names, feeds)
        return tensors

    def new_cache(self) -> Cache:
        """As `Backend.new_cache`."""
        return Buckets(self.new_memory, _narrowest)

    def new_memory(self) -> "CpuMemory":
        """The memory of a bucket."""
        return CpuMemory(self._sessions)


def _narrowest(sequences: int) -> int:
    return 0 if sequences >= FINE_FROM else number_of(SHARED_WIDTH)


def _encoder_inputs(rows: int, sources: int, width: int) -> EncoderInputs:
    ids, positions, unpad_index = (np.empty(rows, np.int64) for _ in range(3))
    return EncoderInputs(ids, positions, np.empty((sources, width), np.int64), unpad_index, np.empty(sources, np.int64))


class _Tensors:
    """Tensors [batch indices, length, D] in host memory that change their strides together.

    The buffers start zeroed and only ever hold what a graph computed, so no masked slot is NaN. One spare buffer lets
    a change of stride go through without an allocation: each tensor moves into the spare and leaves its own behind.
    """

    def __init__(self, count: int, width: int, dtype: type[np.generic]) -> None:
        self._width = width
        self._buffers = [np.zeros(0, dtype) for _ in range(count)]
        self._spare = np.zeros(0, dtype)
        self.batch = 0
        self.length = 0

    def tensor(self, i: int) -> NDArray[Any]:
        return self._view(self._buffers[i], self.batch, self.length)

    def layout(self) -> tuple[int, ...]:
        """Where the tensors are and how large: the same value means that nothing has to be bound anew."""
        return (self.batch, self.length, *(id(buffer) for buffer in self._buffers))

    def arrange(self, origins: Sequence[Origin], length: int, sources: Mapping[int, Sequence[NDArray[Any]]]) -> None:
        """Arrange anew; sources[b] are the tensors that batch index b is copied from, [length, D] each."""
        size = len(origins) * length * self._width
        in_place = length == self.length and size <= len(self._buffers[0])
        if not in_place and size > len(self._spare):
            # Some more than asked for, so that a growing bucket does not allocate at every newcomer.
            self._spare = np.zeros(size + size // 2, self._spare.dtype)
        stay = [(b, o.batch_index) for b, o in enumerate(origins) if isinstance(o, FromBatch) and o.memory is None]
        moves = [(b, before) for b, before in stay if before != b]
        # Who keeps the place while the stride changes is copied in one go, with whoever left from in between.
        together = 0 if in_place else max((b + 1 for b, before in stay if before == b), default=0)
        kept = min(self.length, length)
        for t, buffer in enumerate(self._buffers):
            old = self._view(buffer, self.batch, self.length)
            new = self._view(buffer if in_place else self._spare, len(origins), length)
            new[:together, :kept] = old[:together, :kept]
            for b, before in moves:
                new[b, :kept] = old[before, :kept]
            for b, tensors in sources.items():
                source = tensors[t][:length]
                new[b, : len(source)] = source
            if not in_place:
                self._buffers[t], self._spare = self._spare, buffer
                if len(self._spare) < size:
                    self._spare = np.zeros(len(self._buffers[t]), buffer.dtype)
        self.batch, self.length = len(origins), length

    def _view(self, buffer: NDArray[Any], batch: int, length: int) -> NDArray[Any]:
        return buffer[: batch * length * self._width].reshape(batch, length, self._width)


class CpuMemory:
    """The caches of a bucket in host memory, bound in place, and the inputs and outputs of its steps."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._tensors = len(sessions.self_names)
        self.own = _Tensors(self._tensors, sessions.width, sessions.dtype)
        self.cross = _Tensors(self._tensors, sessions.width, sessions.dtype)
        self._binding = sessions.decoder.io_binding()
        self._caches_bound = False
        self._shape: tuple[int, ...] = ()
        self._batch_index: IntArray = np.zeros(0, np.int64)
        self._inputs: StepInputs | None = None
        self._outputs: StepResult | None = None
        self._candidates = np.zeros(1, np.int64)
        self.feeds: dict[str, NDArray[Any]] = {}
        """All inputs of the graph by name. A binding does not own host memory, so it is also kept here."""

    @property
    def slots(self) -> int:
        """As `Memory.slots`."""
        return self.own.length

    @property
    def source_width(self) -> int:
        """As `Memory.source_width`."""
        return self.cross.length

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """As `Memory.arrange`."""
        own: dict[int, list[NDArray[Any]]] = {}
        cross: dict[int, list[NDArray[Any]]] = {}
        for b, origin in enumerate(origins):
            if isinstance(origin, FromEncoder):
                cross[b] = [tensor[origin.number] for tensor in origin.encoded.tensors]
            elif isinstance(origin.memory, CpuMemory):
                own[b] = [origin.memory.own.tensor(t)[origin.batch_index] for t in range(self._tensors)]
                cross[b] = [origin.memory.cross.tensor(t)[origin.batch_index] for t in range(self._tensors)]
        before = (self.own.layout(), self.cross.layout())
        self.own.arrange(origins, slots, own)
        self.cross.arrange(origins, source_width, cross)
        self._caches_bound = self._caches_bound and before == (self.own.layout(), self.cross.layout())

    def run(self, table: Table, members: IntArray, needed: Extent, candidates: int, *, logprobs: bool) -> StepResult:
        """As `Memory.run`."""
        inputs, outputs = self._bind(len(members), needed, candidates, logprobs=logprobs)
        pack_step(table, members, self._batch_index, True, False, inputs)
        self.run_decoder()
        return outputs

    def run_decoder(self) -> None:
        """Compute a step from what is bound."""
        self._sessions.decoder.run_with_iobinding(self._binding)

    def _bind(self, batch: int, needed: Extent, candidates: int, *, logprobs: bool) -> tuple[StepInputs, StepResult]:
        """Bind what is not bound yet: most stays the same while nobody comes or goes."""
        shape = (batch, needed.rows, max(needed.queries, LEAST_QUERIES), self.slots, candidates, logprobs)
        if not self._caches_bound or self._shape[-1:] != (logprobs,):
            self._bind_caches()
            self._caches_bound, self._shape = True, ()
        if shape != self._shape or self._inputs is None or self._outputs is None:
            self._inputs = self._bind_inputs(*shape[:4])
            self._outputs = self._bind_outputs(needed.rows, candidates, logprobs=logprobs)
            self._shape = shape
        return self._inputs, self._outputs

    def _bind_caches(self) -> None:
        """Bind pools as inputs and as outputs to the same memory: the graph then writes them in place."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for t, (own, cross) in enumerate(zip(self._sessions.self_names, self._sessions.cross_names, strict=True)):
            self._bind_input(own, self.own.tensor(t))
            self._bind_output(f"{own}_out", self.own.tensor(t))
            self._bind_input(cross, self.cross.tensor(t))
        self._bind_input("candidates", self._candidates)

    def _bind_inputs(self, batch: int, rows: int, queries: int, slots: int) -> StepInputs:
        ids, positions, unpad_index = (np.empty(rows, np.int64) for _ in range(3))
        inputs = StepInputs(
            ids=ids,
            positions=positions,
            slot=np.empty((rows, 2), np.int64),
            pad_index=np.empty((batch, queries), np.int64),
            unpad_index=unpad_index,
            mask=np.empty((batch, queries, slots), np.bool_),
            source_length=np.empty(batch, np.int64),
        )
        for name, array in zip(STEP_INPUTS, inputs, strict=True):
            self._bind_input(name, array[:, None] if array is inputs.mask else array)
        self._batch_index = np.arange(batch)
        return inputs

    def _bind_outputs(self, rows: int, candidates: int, *, logprobs: bool) -> StepResult:
        self._candidates[0] = candidates
        result = StepResult(
            np.empty((rows, candidates), np.float32),
            np.empty((rows, candidates), np.int64),
            np.empty((rows, self._sessions.vocabulary), np.float32) if logprobs else None,
        )
        self._bind_output("top_logprob", result.top_logprob)
        self._bind_output("top_token", result.top_token)
        if result.logprob is not None:
            self._bind_output("logprob", result.logprob)
        return result

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        self.feeds[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
