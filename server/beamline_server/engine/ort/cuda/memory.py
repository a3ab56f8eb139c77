"""A bucket's caches in device memory, in buffers that keep their addresses while sequences come, go and grow.

Keys and values of all layers lie in one buffer, those of self-attention in one and those of cross-attention in
another: T tensors of a fixed number of rows each, of which a step sees the first S * P as (S, P, D). Another number of
batch indices needs no copy, because those before stay where they are; another length moves their rows within the
buffer.

A sequence keeps its batch index here until it leaves, wherever the bucket lists it meanwhile: the bucket closes gaps,
here a gap is padding until the batch is smaller than it. Batch index 0 belongs to nobody: padding rows write there.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.backend import Encoded, StepResult
from beamline_server.engine.ort.cuda.buckets import FromBatch, FromEncoder, Origin
from beamline_server.engine.ort.cuda.captured_graphs import CapturedGraphs
from beamline_server.engine.ort.cuda.fixed_run import KEPT_RUNS, DeviceBuffer, FixedRun
from beamline_server.engine.ort.cuda.rectangle import MASK_VALUES, StepInputs, pack_step
from beamline_server.engine.ort.cuda.row_mover import RowMover, flat_rows
from beamline_server.engine.ort.cuda.shapes import (
    StepShape,
    batch_size,
    step_shape,
)
from beamline_server.engine.ort.cuda.slot_positions import SlotPositions
from beamline_server.engine.ort.sessions import Sessions
from beamline_server.engine.ort.settings import STEP_INPUTS
from beamline_server.engine.pack import Extent
from beamline_server.engine.table import IntArray, Table


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """What the encoder left on the device: T tensors (S, R, D) one after another."""

    address: int
    tensor_rows: int
    source_width: int
    source_length: IntArray
    keeper: object
    """Owns the memory."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """T tensors [batch indices, length, D] in one buffer, `tensor_rows` rows from one to the next."""

    buffer: DeviceBuffer
    tensors: int
    tensor_rows: int
    row_bytes: int
    length: int

    def whole(self) -> tuple[int, int]:
        """Address and rows of the whole buffer."""
        return self.buffer.address, self.tensors * self.tensor_rows

    def addresses(self) -> list[int]:
        """Where each tensor begins."""
        return [self.buffer.address + t * self.tensor_rows * self.row_bytes for t in range(self.tensors)]

    def rows(self, batch_index: IntArray, lengths: IntArray) -> NDArray[np.int64]:
        """The first rows of some batch indices, in all tensors."""
        return flat_rows(self.tensors, self.tensor_rows, batch_index * self.length, lengths)


@dataclass(slots=True)
class LargestMemory:
    """The most rows per tensor that any bucket has needed: what a new one starts with, so that it need not grow."""

    own: int = 0
    cross: int = 0


class CudaMemory:
    """As `Memory`, for one bucket.

    Args:
        sessions: Of the bundle.
        device: Where the memory is.
        mover: Moves rows there.
        graphs: Captured ones, of the decoder step.
        largest: Shared by all memories of a backend.
        lock: Held whenever the device is used.
    """

    def __init__(
        self,
        sessions: Sessions,
        mover: RowMover,
        graphs: CapturedGraphs,
        *,
        device: str,
        largest: LargestMemory,
        lock: AbstractContextManager[Any],
    ) -> None:
        self._sessions = sessions
        self._mover = mover
        self._graphs = graphs
        self._device = device
        self._largest = largest
        self._lock = lock
        with lock:
            self.own = self.cross = self._tensors(1)
        self.slots = self.source_width = 0
        self.batch_index: IntArray = np.zeros(0, np.int64)
        """Where each sequence stands, in the order of the bucket, (S,)."""
        self._batch = 1
        self._slot_positions = SlotPositions() if sessions.relative else None
        self._runs: OrderedDict[StepShape, FixedRun] = OrderedDict()

    def _tensors(self, tensor_rows: int) -> Tensors:
        tensors = len(self._sessions.self_names)
        row_bytes = self._sessions.width * np.dtype(self._sessions.dtype).itemsize
        return Tensors(
            DeviceBuffer(tensors * tensor_rows * row_bytes, self._device), tensors, tensor_rows, row_bytes, length=1
        )

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """As `Memory.arrange`."""
        with self._lock:
            batch = batch_size(len(origins))
            old = [self._before(origin) for origin in origins]
            now = keep_places(old, batch)
            moves = [(before, after) for before, after in zip(old, now.tolist(), strict=True) if before]
            largest = self._largest
            lengths = slots, source_width
            largest.own, largest.cross = max(largest.own, batch * lengths[0]), max(largest.cross, batch * lengths[1])
            self.own = self._rearranged(self.own, batch, lengths[0], largest.own, moves)
            self.cross = self._rearranged(self.cross, batch, lengths[1], largest.cross, moves)
            self._take_over(origins, now)
            self._take_encoded(origins, now)
            if self._slot_positions is not None:
                self._slot_positions.arrange([self._slots_of(origin) for origin in origins], now, batch, slots)
            self.batch_index, self._batch = now, batch
            self.slots, self.source_width = slots, source_width

    def _before(self, origin: Origin) -> int:
        """The batch index at which a sequence has been here; 0 if it has not."""
        if isinstance(origin, FromBatch) and origin.memory is None:
            return int(self.batch_index[origin.batch_index])
        return 0

    def _slots_of(self, origin: Origin) -> tuple[SlotPositions, int] | None:
        """Where the positions of a sequence's slots are; None if it has no past."""
        if isinstance(origin, FromEncoder):
            return None
        memory = self if origin.memory is None else origin.memory
        assert isinstance(memory, CudaMemory)
        assert memory._slot_positions is not None
        return memory._slot_positions, int(memory.batch_index[origin.batch_index])

    def _rearranged(
        self, before: Tensors, batch: int, length: int, most_rows: int, moves: Sequence[tuple[int, int]]
    ) -> Tensors:
        """The tensors with another length, and with some sequences (old, new) moved."""
        enough = batch * length <= before.tensor_rows
        now = replace(before if enough else self._tensors(most_rows), length=length)
        if not enough:
            # What was bound is at addresses that are gone.
            self._runs.clear()
        if enough and length == before.length:
            moves = [(old, new) for old, new in moves if old != new]
        if moves:
            old, new = np.array(moves, np.int64).T
            lengths = np.full(len(old), min(before.length, length))
            self._mover.move(before.whole(), now.whole(), before.rows(old, lengths), now.rows(new, lengths))
        return now

    def _take_over(self, origins: Sequence[Origin], batch_index: IntArray) -> None:
        """Copy who comes from other buckets."""
        sources: dict[int, tuple[CudaMemory, list[tuple[int, int]]]] = {}
        for i, origin in enumerate(origins):
            if isinstance(origin, FromBatch) and isinstance(origin.memory, CudaMemory):
                entry = sources.setdefault(id(origin.memory), (origin.memory, []))
                entry[1].append((int(origin.memory.batch_index[origin.batch_index]), int(batch_index[i])))
        for memory, pairs in sources.values():
            old, new = np.array(pairs, np.int64).T
            for there, here in ((memory.own, self.own), (memory.cross, self.cross)):
                lengths = np.full(len(old), min(there.length, here.length))
                self._mover.move(there.whole(), here.whole(), there.rows(old, lengths), here.rows(new, lengths))

    def _take_encoded(self, origins: Sequence[Origin], batch_index: IntArray) -> None:
        """Copy the cross-attention of newcomers; they have no past, and what is in their slots is masked."""
        sources: dict[int, tuple[Encoded, list[tuple[int, int]]]] = {}
        for i, origin in enumerate(origins):
            if isinstance(origin, FromEncoder):
                entry = sources.setdefault(id(origin.encoded), (origin.encoded, []))
                entry[1].append((origin.number, int(batch_index[i])))
        for encoded, pairs in sources.values():
            rows = encoded.tensors
            assert isinstance(rows, EncodedRows)
            number, new = np.array(pairs, np.int64).T
            lengths = rows.source_length[number]
            take = flat_rows(self.cross.tensors, rows.tensor_rows, number * rows.source_width, lengths)
            source = (rows.address, self.cross.tensors * rows.tensor_rows)
            self._mover.move(source, self.cross.whole(), take, self.cross.rows(new, lengths))

    def run(self, table: Table, members: IntArray, needed: Extent, candidates: int, *, logprobs: bool) -> StepResult:
        """As `Memory.run`."""
        with self._lock:
            run = self.run_for(needed, candidates, logprobs=logprobs)
            pack_run(run, table, members, self.batch_index)
            if self._slot_positions is not None:
                self._slot_positions.write(run, needed.rows)
            run.send()
            self._graphs.run(run)
            best = run.receive()
        rows = needed.rows
        return StepResult(
            np.ascontiguousarray(best["top_logprob"][:rows, :candidates]),
            np.ascontiguousarray(best["top_token"][:rows, :candidates]),
            best["logprob"][:rows] if logprobs else None,
        )

    def run_for(self, needed: Extent, candidates: int, *, logprobs: bool) -> FixedRun:
        """The run of a shape that has what is needed, bound to this memory."""
        shape = step_shape(
            needed,
            candidates,
            batch=self._batch,
            slots=self.own.length,
            source_width=self.cross.length,
            vocabulary=self._sessions.vocabulary,
            logprobs=logprobs,
        )
        run = self._runs.get(shape)
        if run is None:
            own, cross = self.own.addresses(), self.cross.addresses()
            elsewhere = dict(zip(self._sessions.self_names, own, strict=True))
            elsewhere |= {f"{name}_out": address for name, address in elsewhere.items()}
            elsewhere |= dict(zip(self._sessions.cross_names, cross, strict=True))
            run = FixedRun(
                self._sessions.decoder,
                self._device,
                shape.axes(),
                elsewhere=elsewhere,
                host={"candidates": np.array([shape.candidates], np.int64)},
                without=() if logprobs else ("logprob",),
            )
            self._forget_a_run()
            self._runs[shape] = run
        self._runs.move_to_end(shape)
        return run

    def _forget_a_run(self) -> None:
        uncaptured = [shape for shape, run in self._runs.items() if run.graph is None]
        if len(uncaptured) >= KEPT_RUNS:
            del self._runs[uncaptured[0]]


def pack_run(run: FixedRun, table: Table, members: IntArray, batch_index: IntArray) -> None:
    """Write the rows of some sequences into the inputs of a decoder step: masks of half precision as bits."""
    inputs = StepInputs(*(run.inputs[name] for name in STEP_INPUTS))
    mask = inputs.mask[:, 0]
    if mask.dtype == np.float16:
        mask = mask.view(np.uint16)
    # Loops know no axes of length 1.
    inputs = inputs._replace(slot=inputs.slot.reshape(len(inputs.slot), -1), mask=mask)
    attended, masked = MASK_VALUES[mask.dtype]
    pack_step(table, members, batch_index, attended, masked, inputs)


def keep_places(wanted: Sequence[int], batch: int) -> IntArray:
    """Give sequences batch indices, moving as few as possible.

    Args:
        wanted: The batch index that each has, or 0 if it has none.
        batch: How many there are; index 0 is not given away.

    Returns:
        Where each stands, all different, from 1 to batch - 1: who has a place that still exists keeps it, the others
        get the lowest free ones.
    """
    kept = [place if 0 < place < batch else 0 for place in wanted]
    taken = set(kept)
    free = iter(place for place in range(1, batch) if place not in taken)
    return np.array([place or next(free) for place in kept], np.int64)
