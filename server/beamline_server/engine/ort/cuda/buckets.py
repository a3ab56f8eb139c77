"""Which sequences run together, in buckets of like length.

A bucket is one attention rectangle: each of its batch indices has as many slots and source positions as its neediest
sequence, so attention costs what the longest in the bucket needs. A sequence is in the narrowest bucket that holds it
and moves over when it grows out: one sequence of 200 tokens does not make thirty of ten tokens pay for it. A run costs
its launches, and padding next to nothing, so buckets are few.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from beamline_server.engine.admission import WIDTHS
from beamline_server.engine.backend import Encoded, StepResult
from beamline_server.engine.ort.cuda.rectangle import widths
from beamline_server.engine.ort.cuda.shapes import LEAST_SLOTS, LEAST_SOURCE_WIDTH, doubled
from beamline_server.engine.pack import Extent, extent
from beamline_server.engine.table import IntArray, Table

_WIDTHS = np.array(WIDTHS)


@dataclass(frozen=True, slots=True)
class FromEncoder:
    """A newcomer: one source of an encoder call."""

    encoded: Encoded
    number: int


@dataclass(frozen=True, slots=True)
class FromBatch:
    """A sequence that was at this batch index of the same memory, or of another bucket's."""

    batch_index: int
    memory: "Memory | None" = None


Origin = FromEncoder | FromBatch


class Memory(Protocol):
    """Keys and values of the sequences of one bucket: batch indices of P slots and R source positions each."""

    @property
    def slots(self) -> int:
        """P."""
        ...

    @property
    def source_width(self) -> int:
        """R."""
        ...

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """Arrange sequences anew: batch index b takes over from origins[b]. Each gets `slots` and `source_width`.

        Another bucket's memory that is taken from must not have been arranged meanwhile.
        """
        ...

    def run(self, table: Table, members: IntArray, needed: Extent, candidates: int, *, logprobs: bool) -> StepResult:
        """Compute the rows of the members, who stand at the batch indices 0, 1, … in this order."""
        ...


class MemoryBucket:
    """A bucket in a memory.

    Attributes:
        memory: Keys and values.
        present: Who stands at each batch index; None where somebody has left since it was arranged.
        members: The same without gaps, once it is arranged.
        broken: Whether a run has failed: the memory may hold anything.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.present: list[int | None] = []
        self.members: IntArray = np.zeros(0, np.int64)
        self.needed = Extent(0, 0, 0, 0, 0, 0)
        self.broken = False

    def measure(self, table: Table) -> bool:
        """Find out what the next step needs; returns whether the memory has it."""
        self.needed = extent(table, self.members)
        return self.needed.slots <= self.memory.slots

    def run(self, table: Table, candidates: int, *, logprobs: bool = False) -> StepResult:
        """As `Bucket.run`."""
        self.broken = True
        result = self.memory.run(table, self.members, self.needed, candidates, logprobs=logprobs)
        self.broken = False
        return result


class Buckets:
    """A `Cache` of buckets.

    Args:
        new_memory: Makes the memory of a bucket.
    """

    def __init__(self, new_memory: Callable[[], Memory]) -> None:
        self._new_memory = new_memory
        self._buckets: list[MemoryBucket] = []
        self._number: dict[int, int] = {}
        """The bucket of every sequence."""
        self._newcomers: dict[int, FromEncoder] = {}
        self._changed = False

    def enter(self, index: int, encoded: Encoded, number: int) -> None:
        """As `Cache.enter`."""
        self._newcomers[index] = FromEncoder(encoded, number)
        self._number[index] = 0
        self._changed = True

    def leave(self, index: int) -> None:
        """As `Cache.leave`."""
        number = self._number.pop(index)
        if self._newcomers.pop(index, None) is None:
            present = self._buckets[number].present
            present[present.index(index)] = None
        self._changed = True

    def place(self, table: Table, going: Sequence[int] | None = None) -> Sequence[MemoryBucket]:
        """As `Cache.place`: each sequence in the narrowest bucket that holds its slots and its source. All go."""
        del going
        buckets = [bucket for bucket in self._buckets if len(bucket.members)]
        fits = [bucket.measure(table) for bucket in buckets] if not self._changed else [False]
        if not all(fits):
            self._arrange(table)
            buckets = [bucket for bucket in self._buckets if len(bucket.members)]
        return buckets

    def _arrange(self, table: Table) -> None:
        numbers = self._numbers(table)
        self._buckets = [self._new() if bucket.broken else bucket for bucket in self._buckets]
        while len(self._buckets) <= max(numbers.values(), default=-1):
            self._buckets.append(self._new())
        origins = {
            who: FromBatch(b, bucket.memory)
            for bucket in self._buckets
            for b, who in enumerate(bucket.present)
            if who is not None
        }
        # From the widest bucket down: who moves up is copied before the place is taken by another.
        for number in reversed(range(len(self._buckets))):
            here = [index for index, its in numbers.items() if its == number]
            self._fill(self._buckets[number], here, origins, table)
        self._number = numbers
        self._newcomers.clear()
        self._changed = False

    def _new(self) -> MemoryBucket:
        return MemoryBucket(self._new_memory())

    def _numbers(self, table: Table) -> dict[int, int]:
        """The bucket of every sequence from now on; nobody moves to a narrower one."""
        if not self._number:
            return {}
        indices = np.fromiter(self._number, np.int64, len(self._number))
        wanted = np.searchsorted(_WIDTHS, widths(table, indices)).tolist()
        pairs = zip(self._number.items(), wanted, strict=True)
        return {index: max(number, now) for (index, now), number in pairs}

    def _fill(self, bucket: MemoryBucket, here: list[int], origins: dict[int, FromBatch], table: Table) -> None:
        """Bring a bucket to the members and the shape that it needs."""
        old, memory = bucket.present, bucket.memory
        members = arranged(old, here)
        bucket.present = list(members)
        bucket.members = np.array(members, np.int64)
        if not members:
            return
        bucket.measure(table)
        slots = resized(memory.slots, bucket.needed.slots, LEAST_SLOTS)
        width = resized(memory.source_width, bucket.needed.source_length, LEAST_SOURCE_WIDTH)
        if members != old or (slots, width) != (memory.slots, memory.source_width):
            from_where = [self._origin(who, memory, origins) for who in members]
            memory.arrange(from_where, slots=slots, source_width=width)

    def _origin(self, who: int, memory: Memory, origins: dict[int, FromBatch]) -> Origin:
        if who in self._newcomers:
            return self._newcomers[who]
        origin = origins[who]
        return FromBatch(origin.batch_index) if origin.memory is memory else origin


def arranged(old: Sequence[int | None], here: Iterable[int]) -> list[int]:
    """Arrange sequences without gaps, moving as few as possible.

    Args:
        old: Who stood at each batch index; None where somebody has left.
        here: Who is there from now on.

    Returns:
        Who stands where: who stays keeps the place, who comes takes a free one, and only if places are still empty do
        those from the end move into them.
    """
    staying = set(here)
    result: list[int | None] = [who if who in staying else None for who in old]
    standing = set(result)
    coming = [who for who in here if who not in standing]
    coming.reverse()
    for b, who in enumerate(result):
        if who is None and coming:
            result[b] = coming.pop()
    result.extend(reversed(coming))
    for b in range(len(result)):
        while result and result[-1] is None:
            result.pop()
        if b < len(result) and result[b] is None:
            result[b] = result.pop()
    return [who for who in result if who is not None]


def resized(present: int, needed: int, least: int) -> int:
    """Slots (or source positions) of the batch indices of a bucket: a power of two times `least`.

    As many as now, unless they are too few or four times as many as are needed: every change copies the bucket.
    """
    return present if needed <= present < 4 * needed else doubled(needed, least)
