"""Slots: the lowest free one, and by a sentence's own history alone."""

from dataclasses import dataclass

import numpy as np
from beamline_server.engine.kv_pool import SlotTable
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.table import IntArray

WIDEST = 16

Parents = tuple[int, ...]
"""One step of a sentence: the beam that each live beam continues."""


@st.composite
def histories(draw: st.DrawFn) -> tuple[Parents, ...]:
    """A sentence's steps: one beam at first, then up to its width, each continuing a beam of the step before."""
    width = draw(st.integers(1, WIDEST))
    steps: list[Parents] = [(0,)]
    for _ in range(draw(st.integers(0, 12))):
        parent = st.integers(0, len(steps[-1]) - 1)
        steps.append(tuple(draw(st.lists(parent, min_size=1, max_size=width))))
    return tuple(steps)


@dataclass(frozen=True)
class Step:
    """What the slow twin says of one step."""

    slots: tuple[int, ...]
    ancestors: tuple[frozenset[int], ...]


def twin(history: tuple[Parents, ...]) -> list[Step]:
    """Slots as the module's docstring defines them, one sentence and one beam at a time."""
    beams: list[frozenset[int]] = [frozenset()]
    steps = []
    for parents in history:
        kept = [beams[parent] for parent in parents]
        taken = set().union(*kept)
        slots = []
        for _ in parents:
            slot = next(slot for slot in range(1000) if slot not in taken)
            taken.add(slot)
            slots.append(slot)
        beams = [ancestors | {slot} for ancestors, slot in zip(kept, slots, strict=True)]
        steps.append(Step(tuple(slots), tuple(beams)))
    return steps


def width(history: tuple[Parents, ...]) -> int:
    return max(map(len, history))


class Sentences:
    """Sentences in a slot table, each as wide as its search may become."""

    def __init__(self, *widths: int) -> None:
        self.table = SlotTable(len(widths), WIDEST)
        self._widths = widths

    def assign(self, parents: dict[int, Parents]) -> dict[int, tuple[int, ...]]:
        """One step: the slots that each sentence's beams take."""
        places = np.array(list(parents), np.int64)
        widest = max(self._widths[place] for place in parents)
        parent, live = np.zeros((len(places), widest), np.int64), np.zeros((len(places), widest), np.bool_)
        for row, beams in enumerate(parents.values()):
            parent[row, : len(beams)], live[row, : len(beams)] = beams, True
        slots: IntArray = self.table.assign(places, parent, live)
        return {place: tuple(slots[row, : len(beams)].tolist()) for row, (place, beams) in enumerate(parents.items())}

    def ancestors(self, place: int, beams: int) -> tuple[frozenset[int], ...]:
        mask = self.table.mask(np.array([place]), beams, 192)[0, 0]
        return tuple(frozenset(np.flatnonzero(row).tolist()) for row in mask)


@given(histories())
def test_each_token_takes_the_lowest_free_slot(history: tuple[Parents, ...]) -> None:
    sentences = Sentences(width(history))
    for parents, expected in zip(history, twin(history), strict=True):
        assert sentences.assign({0: parents})[0] == expected.slots
        assert sentences.ancestors(0, len(parents)) == expected.ancestors


@given(st.lists(st.tuples(st.integers(0, 8), histories()), min_size=2, max_size=6))
def test_slots_do_not_depend_on_neighbours(sentences: list[tuple[int, tuple[Parents, ...]]]) -> None:
    """Sentences of all widths that come and go at any time take the slots that they take alone."""
    together = Sentences(*(width(history) for _, history in sentences))
    alone = [twin(history) for _, history in sentences]
    for now in range(max(start + len(history) for start, history in sentences)):
        running = {
            place: now - start for place, (start, history) in enumerate(sentences) if 0 <= now - start < len(history)
        }
        for place, age in running.items():
            if age == 0:
                together.table.clear(place)
        if not running:
            continue
        taken = together.assign({place: sentences[place][1][age] for place, age in running.items()})
        for place, age in running.items():
            expected = alone[place][age]
            assert taken[place] == expected.slots
            assert together.ancestors(place, len(expected.slots)) == expected.ancestors
            highest = max(max(ancestors) for ancestors in expected.ancestors)
            assert together.table.ends(np.array([place])).tolist() == [highest + 1]


@given(histories())
def test_no_slot_is_written_that_a_live_beam_reads(history: tuple[Parents, ...]) -> None:
    """The beams of a step write different slots, and none that another beam descends from."""
    sentences = Sentences(width(history))
    for parents in history:
        slots = sentences.assign({0: parents})[0]
        ancestors = sentences.ancestors(0, len(parents))
        assert len(set(slots)) == len(slots)
        for beam, slot in enumerate(slots):
            assert [slot in others for others in ancestors] == [other == beam for other in range(len(parents))]


@given(histories())
def test_a_beam_descends_from_as_many_slots_as_it_has_tokens(history: tuple[Parents, ...]) -> None:
    sentences = Sentences(width(history))
    for length, parents in enumerate(history, 1):
        sentences.assign({0: parents})
        assert {len(ancestors) for ancestors in sentences.ancestors(0, len(parents))} == {length}


@given(histories())
def test_slots_stay_below_width_times_length(history: tuple[Parents, ...]) -> None:
    """What admission counts on."""
    sentences, widest = Sentences(width(history)), 0
    for length, parents in enumerate(history, 1):
        sentences.assign({0: parents})
        widest = max(widest, len(parents))
        assert sentences.table.ends(np.array([0]))[0] <= widest * length


def test_a_cleared_place_starts_anew() -> None:
    sentences = Sentences(3, 2)
    sentences.assign({0: (0,), 1: (0,)})
    sentences.assign({0: (0, 0, 0), 1: (0, 0)})
    sentences.table.clear(0)
    assert sentences.ancestors(0, 3) == (frozenset(),) * 3
    assert sentences.table.in_use() == 3
    assert sentences.assign({0: (0,), 1: (0, 0)}) == {0: (0,), 1: (2, 3)}


def test_a_mask_may_be_wider_than_any_beam_or_slot_in_use() -> None:
    table = SlotTable(1, 4)
    table.assign(np.array([0]), np.zeros((1, 1), np.int64), np.ones((1, 1), np.bool_))
    mask = table.mask(np.array([0]), 4, 300)
    assert mask.shape == (1, 1, 4, 300)
    assert np.argwhere(mask).tolist() == [[0, 0, 0, 0]]


def test_pools_grow_beyond_their_first_size() -> None:
    """A greedy search of 200 tokens uses the slots 0 to 199, one after the other."""
    sentences = Sentences(1)
    assert [sentences.assign({0: (0,)})[0] for _ in range(200)] == [(slot,) for slot in range(200)]
