"""A lane's caches in device memory, in buffers that keep their addresses while sentences come, go and grow.

Keys and values of all layers lie in one buffer, those of self-attention in one and those of cross-attention in
another: T tensors of a fixed number of rows each, of which a step sees the first S * P as (S, P, D). Another number of
seats needs no copy, because the seats before it stay where they are; another length of the seats moves their rows
within the buffer.

A sentence keeps its seat here until it leaves, wherever the engine seats it meanwhile: the engine closes gaps, here a
gap is a seat of padding until the number of seats falls below it. Seat 0 belongs to nobody (padding.py).
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.beam import IntArray
from beamline_server.engine.ort.fixed_run import KEPT_RUNS, DeviceBuffer, FixedRun
from beamline_server.engine.ort.row_mover import RowMover, flat_rows
from beamline_server.engine.ort.sessions import Sessions
from beamline_server.engine.ort.shape_buckets import (
    LEAST_SLOTS,
    LEAST_SOURCE_WIDTH,
    StepShape,
    doubled,
    seat_count,
    step_shape,
)
from beamline_server.engine.runner import Encoded, FromCache, FromEncoder, FromSeat, Origin, StepBatch


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
class SeatMemory:
    """T tensors [seats, length, D] in one buffer, `tensor_rows` rows from one to the next."""

    buffer: DeviceBuffer
    tensors: int
    tensor_rows: int
    row_bytes: int
    length: int

    def place(self) -> tuple[int, int]:
        """Address and rows of the whole buffer."""
        return self.buffer.address, self.tensors * self.tensor_rows

    def addresses(self) -> list[int]:
        """Where each tensor begins."""
        return [self.buffer.address + t * self.tensor_rows * self.row_bytes for t in range(self.tensors)]

    def rows(self, seats: IntArray, lengths: IntArray) -> NDArray[np.int64]:
        """The first rows of some seats, in all tensors."""
        return flat_rows(self.tensors, self.tensor_rows, seats * self.length, lengths)


@dataclass(slots=True)
class LargestMemory:
    """The most rows per tensor that any lane has needed: what a new lane starts with, so that it need not grow."""

    own: int = 0
    cross: int = 0


class DeviceCache:
    """As `Cache`, for one lane.

    Args:
        sessions: Of the bundle.
        device: Where the memory is.
        mover: Moves rows there.
        largest: Shared by all caches of a runner.
        lock: Held whenever the device is used.
        vocabulary: V.
    """

    def __init__(
        self,
        sessions: Sessions,
        mover: RowMover,
        *,
        device: str,
        largest: LargestMemory,
        lock: AbstractContextManager[Any],
        vocabulary: int,
    ) -> None:
        self._sessions = sessions
        self._mover = mover
        self._device = device
        self._largest = largest
        self._lock = lock
        self._vocabulary = vocabulary
        self.own = self.cross = self._memory(1)
        self.slots = 1
        self.source_width = 1
        self.seat: IntArray = np.zeros(0, np.int64)
        """Where each sentence sits, in the engine's order, (S,)."""
        self._seats = 1
        self._runs: OrderedDict[StepShape, FixedRun] = OrderedDict()

    def _memory(self, tensor_rows: int) -> SeatMemory:
        tensors = len(self._sessions.self_names)
        row_bytes = self._sessions.width * np.dtype(self._sessions.dtype).itemsize
        return SeatMemory(
            DeviceBuffer(tensors * tensor_rows * row_bytes, self._device), tensors, tensor_rows, row_bytes, length=1
        )

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """As `Cache.arrange`."""
        with self._lock:
            seats = seat_count(len(origins))
            old = [int(self.seat[origin.seat]) if isinstance(origin, FromSeat) else 0 for origin in origins]
            seat = keep_seats(old, seats)
            moves = [(before, now) for before, now in zip(old, seat.tolist(), strict=True) if before]
            largest = self._largest
            lengths = doubled(slots, LEAST_SLOTS), doubled(source_width, LEAST_SOURCE_WIDTH)
            largest.own, largest.cross = max(largest.own, seats * lengths[0]), max(largest.cross, seats * lengths[1])
            self.own = self._reseated(self.own, seats, lengths[0], largest.own, moves)
            self.cross = self._reseated(self.cross, seats, lengths[1], largest.cross, moves)
            self._take_over(origins, seat)
            self._take_encoded(origins, seat)
            self.seat, self._seats = seat, seats
            self.slots, self.source_width = slots, source_width

    def _reseated(
        self, before: SeatMemory, seats: int, length: int, most_rows: int, moves: Sequence[tuple[int, int]]
    ) -> SeatMemory:
        """The memory with seats of another length, and with some seats (old, new) moved."""
        enough = seats * length <= before.tensor_rows
        now = replace(before if enough else self._memory(most_rows), length=length)
        if not enough:
            # What was bound is at addresses that are gone.
            self._runs.clear()
        if enough and length == before.length:
            moves = [(old, new) for old, new in moves if old != new]
        if moves:
            old, new = np.array(moves, np.int64).T
            lengths = np.full(len(old), min(before.length, length))
            self._mover.move(before.place(), now.place(), before.rows(old, lengths), now.rows(new, lengths))
        return now

    def _take_over(self, origins: Sequence[Origin], seat: IntArray) -> None:
        """Copy who comes from other lanes."""
        sources: dict[int, tuple[DeviceCache, list[tuple[int, int]]]] = {}
        for i, origin in enumerate(origins):
            if isinstance(origin, FromCache):
                assert isinstance(origin.cache, DeviceCache)
                entry = sources.setdefault(id(origin.cache), (origin.cache, []))
                entry[1].append((int(origin.cache.seat[origin.seat]), int(seat[i])))
        for cache, pairs in sources.values():
            old, new = np.array(pairs, np.int64).T
            for there, here in ((cache.own, self.own), (cache.cross, self.cross)):
                lengths = np.full(len(old), min(there.length, here.length))
                self._mover.move(there.place(), here.place(), there.rows(old, lengths), here.rows(new, lengths))

    def _take_encoded(self, origins: Sequence[Origin], seat: IntArray) -> None:
        """Copy the cross-attention of newcomers; they have no past, and what is in their slots is masked."""
        sources: dict[int, tuple[Encoded, list[tuple[int, int]]]] = {}
        for i, origin in enumerate(origins):
            if isinstance(origin, FromEncoder):
                entry = sources.setdefault(id(origin.encoded), (origin.encoded, []))
                entry[1].append((origin.index, int(seat[i])))
        for encoded, pairs in sources.values():
            rows = encoded.tensors
            assert isinstance(rows, EncodedRows)
            index, new = np.array(pairs, np.int64).T
            lengths = rows.source_length[index]
            take = flat_rows(self.cross.tensors, rows.tensor_rows, index * rows.source_width, lengths)
            source = (rows.address, self.cross.tensors * rows.tensor_rows)
            self._mover.move(source, self.cross.place(), take, self.cross.rows(new, lengths))

    def run_for(self, batch: StepBatch) -> FixedRun:
        """The run of a batch's shape, bound to this memory."""
        shape = step_shape(
            batch,
            seats=self._seats,
            slots=self.own.length,
            source_width=self.cross.length,
            vocabulary=self._vocabulary,
        )
        run = self._runs.get(shape)
        if run is None:
            own, cross = self.own.addresses(), self.cross.addresses()
            elsewhere = dict(zip(self._sessions.self_names, own, strict=True))
            elsewhere |= {f"{name}_out": address for name, address in elsewhere.items()}
            elsewhere |= dict(zip(self._sessions.cross_names, cross, strict=True))
            candidates = np.array([shape.candidates], np.int64)
            run = FixedRun(
                self._sessions.decoder,
                self._device,
                shape.axes(),
                elsewhere=elsewhere,
                host={"candidates": candidates},
            )
            self._forget_a_run()
            self._runs[shape] = run
        self._runs.move_to_end(shape)
        return run

    def _forget_a_run(self) -> None:
        uncaptured = [shape for shape, run in self._runs.items() if run.graph is None]
        if len(uncaptured) >= KEPT_RUNS:
            del self._runs[uncaptured[0]]


def keep_seats(wanted: Sequence[int], seats: int) -> IntArray:
    """Seat sentences, moving as few as possible.

    Args:
        wanted: The seat that each has, or 0 if it has none.
        seats: How many there are; seat 0 is not given away.

    Returns:
        Where each sits, all different, from 1 to seats - 1: who has a seat that still exists keeps it, the others get
        the lowest free ones.
    """
    kept = [seat if 0 < seat < seats else 0 for seat in wanted]
    taken = set(kept)
    free = iter(seat for seat in range(1, seats) if seat not in taken)
    return np.array([seat or next(free) for seat in kept], np.int64)
