"""The loops around attention, over random tables: compiled, uncompiled with every index checked, and as defined."""

import numpy as np
import pytest

from beamline_server.engine.ort import pages as compiled_pages
from beamline_server.engine.ort import pieces as compiled_pieces
from beamline_server.engine.ort.attention import TOGETHER
from beamline_server.engine.ort.pages import PAGE, PagedMemory, widened
from beamline_server.engine.ort.pieces import Sizes
from beamline_server.engine.table import IntArray, Table
from beamline_server.graphs import GraphSizes
from doubles.fed import FedSequences
from doubles.uncompiled import uncompiled

LOOPS = ("ort.pages", "ort.pieces", "table", "processors", "search")
PLAIN_PAGES, PLAIN_PIECES, *_ = uncompiled(*(f"beamline_server.engine.{name}" for name in LOOPS))


def random_table(rng: np.random.Generator, sequences: int) -> Table:
    """Sequences with any rows, slots and ancestors that a search may come to."""
    fed = FedSequences([(1,)] * sequences, [(0,) * 64] * sequences)
    table = fed.arrays
    for index in range(sequences):
        sequence = table.sequences[index]
        sequence.rows, sequence.slots_end = rng.integers(1, 17), rng.integers(17, 60)
        sequence.token, sequence.position = rng.integers(0, 99, (2, 16))
        table.ancestors[index, :, : sequence.slots_end] = rng.random((16, sequence.slots_end)) < rng.random()
        for row in range(16):
            sequence.slot[row] = row
            table.ancestors[index, row, row] = True
        table.ancestors[index, :, sequence.slots_end :] = False
    return table


def memory_for(table: Table, members: list[int], rng: np.random.Generator) -> PagedMemory:
    """Pages for all of them, taken in turn and in part, so that nobody's are side by side."""
    memory = PagedMemory(1, 2)
    for slots in (1, 20, 64):
        for index in rng.permutation(members).tolist():
            memory.give(index, min(slots, int(table.sequences[index].slots_end)))
    return memory


def places_of(memory: PagedMemory, index: int, count: int) -> IntArray:
    """Where the first slots of a sequence are among those of all pages, (count,)."""
    slots = np.arange(count)
    where: IntArray = memory.pages.pages[index, slots // PAGE] * PAGE + slots % PAGE
    return where


@pytest.mark.parametrize("seed", range(20))
def test_rows_find_the_slots_that_they_descend_from(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(rng, 6)
    members = rng.permutation(6)[: rng.integers(1, 7)]
    memory = memory_for(table, members.tolist(), rng)
    rows = int(table.sequences["rows"][members].sum())
    ours, plain = (compiled_pieces.buffers(rows, 60, Sizes(GraphSizes(1, 2, 1), heads=1)) for _ in range(2))
    compiled_pieces.pack_rows(table, members, memory.pages, ours)
    PLAIN_PIECES.pack_rows(table, members, memory.pages, plain)

    row = 0
    for index in members.tolist():
        sequence = table.sequences[index]
        where = places_of(memory, index, int(sequence.slots_end))
        for r in range(sequence.rows):
            slots = where[table.ancestors[index, r].nonzero()[0]]
            assert ours.own.lengths[row] == len(slots)
            assert ours.own.places[row, : len(slots) + TOGETHER].tolist() == [*slots, *[slots[0]] * TOGETHER]
            assert (ours.ids[row], ours.positions[row]) == (sequence.token[r], sequence.position[r])
            assert (ours.sequence[row], ours.slot[row]) == (index, where[sequence.slot[r]])
            row += 1
    assert row == rows
    for written in ("ids", "positions", "sequence", "slot"):
        assert np.array_equal(getattr(ours, written), getattr(plain, written))
    assert np.array_equal(ours.own.places, plain.own.places)
    assert np.array_equal(ours.own.lengths, plain.own.lengths)


@pytest.mark.parametrize("farthest", [3, 200])
def test_rows_find_how_far_their_slots_are(farthest: int) -> None:
    """By the positions of the tokens that were written there, whatever the order of slots."""
    rng = np.random.default_rng(farthest)
    table = random_table(rng, 4)
    members = rng.permutation(4)
    memory = memory_for(table, members.tolist(), rng)
    sizes = Sizes(GraphSizes(1, 2, 1), heads=1, bias=np.zeros((1, 1, farthest + 1), np.float32))
    rows = int(table.sequences["rows"].sum())
    written: dict[int, int] = {}
    for index in members.tolist():
        sequence = table.sequences[index]
        where = places_of(memory, index, int(sequence.slots_end))
        for place, position in zip(where.tolist(), rng.integers(0, 90, len(where)).tolist(), strict=True):
            memory.pages.positions[place] = written[place] = position
        for r in range(sequence.rows):  # as when tokens of a prefix are fed: in their order
            sequence.position[r] = 100 + r
            table.ancestors[index, r, r + 1 : 16] = False
            written[int(where[r])] = 100 + r
    ours, plain = (compiled_pieces.buffers(rows, 60, sizes) for _ in range(2))
    compiled_pieces.pack_rows(table, members, memory.pages, ours)
    PLAIN_PIECES.pack_rows(table, members, memory.pages, plain)
    for row in range(rows):
        count = int(ours.own.lengths[row])
        distances = [int(ours.positions[row]) - written[int(place)] for place in ours.own.places[row, :count]]
        assert min(distances) == 0
        assert ours.distance[row, :count].tolist() == [min(distance, farthest) for distance in distances]
    assert np.array_equal(ours.distance, plain.distance)


@pytest.mark.parametrize("seed", range(5))
def test_new_keys_and_values_are_written_into_their_slots_and_nowhere_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    buffers = compiled_pieces.buffers(7, 1, Sizes(GraphSizes(1, 4, 1), heads=1))
    buffers.query_key_value[:] = rng.standard_normal(buffers.query_key_value.shape)
    buffers.slot[:] = rng.permutation(3 * PAGE)[:7]
    before = rng.standard_normal((2, 3 * PAGE, 4)).astype(np.float32)
    ours, plain, expected = before.copy(), before.copy(), before.copy()
    compiled_pieces.write(buffers, ours[0], ours[1], 5)
    PLAIN_PIECES.write(buffers, plain[0], plain[1], 5)
    expected[0, buffers.slot[:5]] = buffers.query_key_value[:5, 4:8]
    expected[1, buffers.slot[:5]] = buffers.query_key_value[:5, 8:]
    assert np.array_equal(ours, expected)
    assert np.array_equal(plain, expected)


@pytest.mark.parametrize("length", [1, PAGE, PAGE + 1, 2 * PAGE + 5])
def test_the_source_of_a_newcomer_is_written_into_its_pages_and_nowhere_else(length: int) -> None:
    rng = np.random.default_rng(length)
    memory = PagedMemory(2, 4)
    for slots in (1, length):
        for index in (1, 0, 2):
            memory.give(index, slots)
    memory.pages.keys[:], memory.pages.values[:] = (rng.standard_normal(memory.pages.keys.shape) for _ in range(2))
    where = places_of(memory, 1, length)
    encoded = rng.standard_normal((2, 2, 3, length + 2, 4)).astype(np.float32)
    expected = memory.pages.keys.copy(), memory.pages.values.copy()
    for layer in range(2):
        expected[0][layer, where], expected[1][layer, where] = encoded[layer, :, 2, :length]
    before = memory.pages
    for loops in (compiled_pieces, PLAIN_PIECES):
        pages = before._replace(keys=before.keys.copy(), values=before.values.copy())
        lists = compiled_pieces.Lists(np.full((3, length + TOGETHER), 99, np.int32), np.full(3, 99, np.int32))
        loops.take_in(pages, lists, 1, length, encoded, 2)
        assert np.array_equal(pages.keys, expected[0])
        assert np.array_equal(pages.values, expected[1])
        assert lists.places[1].tolist() == [*where, *[where[0]] * TOGETHER]
        assert lists.lengths.tolist() == [99, length, 99]
        assert (lists.places[[0, 2]] == 99).all()


@pytest.mark.parametrize(("pages", "kept"), [(64, True), (1024, True), (1025, False)])
def test_a_memory_that_nobody_uses_is_given_back_if_it_is_large(pages: int, kept: bool) -> None:
    memory = PagedMemory(1, 2)
    memory.give(3, pages * PAGE)
    memory.pages.keys[:] = 1
    memory.take_back(3)
    memory.clear()
    assert (memory.pages.keys.shape[1] > 0) == kept
    memory.give(5, 3 * PAGE)
    memory.give(0, PAGE)
    used = [*places_of(memory, 5, 3 * PAGE), *places_of(memory, 0, PAGE)]
    assert len(set(used)) == 4 * PAGE
    assert max(used) < memory.pages.keys.shape[1] == memory.pages.values.shape[1]


def test_who_lacks_pages_is_who_has_more_slots_than_they_hold() -> None:
    table = random_table(np.random.default_rng(0), 4)
    table.sequences["slots_end"] = [PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1]
    held = np.array([1, 1, 2, 2])
    for loops in (compiled_pages, PLAIN_PAGES):
        assert loops.lacking(table, np.arange(4), held).tolist() == [1, 3]
        assert loops.lacking(table, np.array([2, 0]), held).tolist() == []


def test_an_array_keeps_what_it_holds_when_it_is_widened() -> None:
    array = np.array([[1, 2], [3, 4]])
    assert widened(array, 2, 1) is array
    assert widened(array, 3, 4).tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 0, 0]]
