"""Which sequences run together, in buckets of like length; for backends whose attention works on rectangles.

A bucket is one attention rectangle: each of its batch indices has as many slots and source positions as its neediest
sequence, so attention costs what the longest in the bucket needs. A sequence is in the narrowest bucket that holds it
and moves over when it grows out: one sequence of 200 tokens does not make thirty of ten tokens pay for it.

A bucket is also a run of the decoder step, and every run has its price, so few sequences are kept together in a bucket
of `SHARED_WIDTH`; only from `FINE_FROM` sequences on do the narrower ones save more than their runs cost.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from beamline_server.engine.admission import SHARED_WIDTH, WIDTHS
from beamline_server.engine.backend import Encoded, StepResult
from beamline_server.engine.pack import Extent, extent, widths
from beamline_server.engine.table import IntArray, Table

_WIDTHS = np.array(WIDTHS)
GRANULE = 8
"""Slots and source positions of a batch index are a multiple of this: few distinct shapes, seldom a change of shape."""

SPARE_SLOTS = 128
"""How many slots all batch indices of a bucket together may have too many for the sake of rare changes: the slots of a
sequence grow with every token. Its source stays as it is, and source positions are not spared."""

FINE_FROM = 48
"""Sequences of a worker from which on buckets narrower than `SHARED_WIDTH` are used (docs/performance.md)."""


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
        narrowest: Number of the narrowest bucket in use while so many sequences run.
    """

    def __init__(self, new_memory: Callable[[], Memory], narrowest: Callable[[int], int]) -> None:
        self._new_memory = new_memory
        self._narrowest = narrowest
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

    def place(self, table: Table) -> Sequence[MemoryBucket]:
        """As `Cache.place`: each sequence in the narrowest bucket that holds its slots and its source."""
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
        least = self._narrowest(len(indices))
        pairs = zip(self._number.items(), wanted, strict=True)
        return {index: max(number, now, least) for (index, now), number in pairs}

    def _fill(self, bucket: MemoryBucket, here: list[int], origins: dict[int, FromBatch], table: Table) -> None:
        """Bring a bucket to the members and the shape that it needs."""
        old, memory = bucket.present, bucket.memory
        members = arranged(old, here)
        bucket.present = list(members)
        bucket.members = np.array(members, np.int64)
        if not members:
            return
        bucket.measure(table)
        slots = grown(bucket.needed.slots, memory.slots, slot_granule(len(members)))
        width = grown(bucket.needed.source_length, memory.source_width)
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


def slot_granule(sequences: int) -> int:
    """How many slots the batch indices of a bucket grow by: few grow far, since what they have too much costs little.

    Divides the width of every bucket that so few can be in, so that nobody has more slots than the bucket allows.
    """
    granule = GRANULE
    while 2 * granule <= min(SPARE_SLOTS // sequences, SHARED_WIDTH):
        granule *= 2
    return granule


def grown(needed: int, present: int, granule: int = GRANULE) -> int:
    """Slots (or source positions) of the batch indices of a bucket.

    Grows by granules, and shrinks only when a quarter is idle: every change copies the bucket.

    Args:
        needed: What the neediest sequence needs.
        present: What each has now.
        granule: What it is a multiple of.
    """
    wanted = round_up(needed, granule)
    return present if wanted <= present and 3 * present < 4 * wanted else wanted


def round_up(needed: int, granule: int = GRANULE) -> int:
    """The least positive multiple of a granule that is as wide as needed."""
    return -(-max(needed, 1) // granule) * granule
