"""Positions of slots follow the sequences that they are of."""

import numpy as np

from beamline_server.engine.ort.cuda.slot_positions import SlotPositions
from beamline_server.engine.table import IntArray


def numbered(batch: int, slots: int, first: int = 0) -> SlotPositions:
    """Every number another one."""
    made = SlotPositions()
    made.numbers = np.arange(first, first + batch * slots).reshape(batch, slots)
    return made


def places(*batch_index: int) -> IntArray:
    return np.array(batch_index, np.int64)


def test_sequences_take_their_numbers_with_them() -> None:
    """From places that others take at the same time, and from another bucket; a new one has none."""
    here, there = numbered(4, 3), numbered(2, 3, first=100)
    here.arrange([(here, 2), (there, 1), None, (here, 1)], places(1, 2, 3, 4), batch=5, slots=3)
    assert here.numbers.tolist() == [[0, 0, 0], [6, 7, 8], [103, 104, 105], [0, 0, 0], [3, 4, 5]]
    assert there.numbers.tolist() == [[100, 101, 102], [103, 104, 105]]


def test_there_may_be_more_slots_or_fewer() -> None:
    here = numbered(2, 3)
    here.arrange([(here, 1)], places(1), batch=2, slots=5)
    assert here.numbers[1].tolist() == [3, 4, 5, 0, 0]
    here.arrange([(here, 1)], places(1), batch=2, slots=2)
    assert here.numbers[1].tolist() == [3, 4]
