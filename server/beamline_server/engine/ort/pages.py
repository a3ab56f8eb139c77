"""Keys and values in pages, which sequences take as they grow and give back when they leave; nothing is moved.

Axes: L layers, M slots of all pages, D width, I indices of the table, X lists, W places of a list.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.compiled import compiled, entry_point
from beamline_server.engine.table import FloatArray, IntArray, Table, example

PAGE = 16
"""Slots of a page."""
_FEWEST = 64
"""Pages of a memory that has any."""
_KEPT = 1024
"""Pages of a memory that nobody uses, at most."""
Places = NDArray[np.int32]


class Pages(NamedTuple):
    """Keys and values of sequences.

    Attributes:
        keys: (L, M, D).
        values: (L, M, D).
        positions: Where in its sequence the token of each slot stands, (M,); known where distances count.
        pages: Numbers of the pages of each sequence, (I, most).
        held: How many each has, (I,).
    """

    keys: FloatArray
    values: FloatArray
    positions: Places
    pages: Places
    held: IntArray


class PagedMemory:
    """Pages for sequences. They start zeroed and grow in number as they are needed.

    Attributes:
        pages: What compiled loops work on; replaced when it grows.
    """

    def __init__(self, layers: int, width: int) -> None:
        self._free: list[int] = []
        self.pages = _without_pages(layers, width)

    def give(self, index: int, slots: int) -> None:
        """Let a sequence have room for so many slots."""
        wanted = -(-slots // PAGE)
        pages, held = self.pages.pages, self.pages.held
        if index >= len(held) or wanted > pages.shape[1]:
            pages, held = widened(pages, index + 1, wanted), widened(held, index + 1)
            self.pages = self.pages._replace(pages=pages, held=held)
        present = int(held[index])
        while len(self._free) < wanted - present:
            self._grow()
        for i in range(present, wanted):
            pages[index, i] = self._free.pop()
        held[index] = max(wanted, present)

    def take_back(self, index: int) -> None:
        """A sequence needs nothing any more."""
        if index < len(self.pages.held):
            self._free += self.pages.pages[index, : self.pages.held[index]].tolist()
            self.pages.held[index] = 0

    def clear(self) -> None:
        """Nobody has anything any more: a memory that has grown large is given back."""
        layers, slots, width = self.pages.keys.shape
        if slots > _KEPT * PAGE:
            self._free.clear()
            self.pages = _without_pages(layers, width)

    def _grow(self) -> None:
        """Twice as many pages. Their memory is taken from the system when it is written to.

        Keys go before values, so that no more than half of what there is is there twice.
        """
        layers, slots, width = self.pages.keys.shape
        more = 2 * slots or _FEWEST * PAGE
        for name in ("keys", "values"):
            larger = np.zeros((layers, more, width), np.float32)
            larger[:, :slots] = getattr(self.pages, name)
            self.pages = self.pages._replace(**{name: larger})
        self.pages = self.pages._replace(positions=widened(self.pages.positions, more))
        self._free[:0] = range(more // PAGE - 1, slots // PAGE - 1, -1)


def whole_pages(slots: int) -> int:
    """As many slots as the pages have that hold so many."""
    return -(-slots // PAGE) * PAGE


def _without_pages(layers: int, width: int) -> Pages:
    none = np.zeros((layers, 0, width), np.float32)
    return Pages(none, none.copy(), np.zeros(0, np.int32), np.zeros((0, 1), np.int32), np.zeros(0, np.int64))


def widened(array: NDArray[Any], *shape: int) -> NDArray[Any]:
    """An array with at least this shape: itself if it has it, else another with zeros behind what it holds."""
    more = [(0, max(0, wanted - present)) for wanted, present in zip(shape, array.shape, strict=True)]
    return np.pad(array, more) if any(after for _, after in more) else array


@compiled
def place(pages: Places, slot: int) -> int:
    """Where a slot of a sequence is among the slots of all pages."""
    return int(pages[slot // PAGE] * PAGE + slot % PAGE)


@compiled
def lacking(table: Table, members: IntArray, held: IntArray) -> IntArray:
    """The sequences that have more slots in use than pages for them."""
    result, count = np.empty(len(members), np.int64), 0
    for index in members:
        if table.sequences[index].slots_end > held[index] * PAGE:
            result[count] = index
            count += 1
    return result[:count]


entry_point(lacking, lambda: (example(), np.zeros(1, np.int64), np.zeros(1, np.int64)))
