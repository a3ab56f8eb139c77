"""Slots: the lowest free one, and by a sequence's own history alone."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import MOST_ROWS
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.search import feed, start, take_slots
from beamline_server.engine.table import SequenceTable

Parents = tuple[int, ...]
"""One step of a sequence: the hypothesis that each live one continues."""


@dataclass(frozen=True)
class History:
    """What a sequence starts with, and its steps."""

    prefix: int
    part: int
    steps: tuple[Parents, ...]

    @property
    def width(self) -> int:
        return max(map(len, self.steps), default=1)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """One hypothesis at first, then up to a width, each continuing one of the step before."""
    width = draw(st.integers(1, MOST_ROWS))
    live, steps = 1, list[Parents]()
    for _ in range(draw(st.integers(0, 12))):
        parents = tuple(draw(st.lists(st.integers(0, live - 1), min_size=1, max_size=width)))
        steps.append(parents)
        live = len(parents)
    return History(draw(st.sampled_from([0, 0, 0, 1, 7, 16, 40])), draw(st.sampled_from([1, 5, 16])), tuple(steps))


@dataclass(frozen=True)
class Step:
    """What the slow twin says of one step."""

    slots: tuple[int, ...]
    ancestors: tuple[frozenset[int], ...]


def twin(history: History) -> list[Step]:
    """Slots as the module's docstring defines them, one hypothesis at a time."""
    hypotheses = [frozenset(range(1 + history.prefix))]
    steps = [Step((history.prefix,), tuple(hypotheses))]
    for parents in history.steps:
        kept = [hypotheses[parent] for parent in parents]
        taken = set().union(*kept)
        slots = []
        for _ in parents:
            slot = next(slot for slot in range(1000) if slot not in taken)
            taken.add(slot)
            slots.append(slot)
        hypotheses = [ancestors | {slot} for ancestors, slot in zip(kept, slots, strict=True)]
        steps.append(Step(tuple(slots), tuple(hypotheses)))
    return steps


class Sequences:
    """Sequences in a table, of which nothing happens but that slots are taken."""

    def __init__(self, size: int) -> None:
        self.table = SequenceTable(size, (1,))

    def start(self, index: int, prefix: int = 0, part: int = MOST_ROWS) -> Step:
        """Begin, and feed the whole prefix."""
        asked = GenerationRequest(RequestId(index), (7,), SearchOptions(), target_prefix=(3,) * prefix)
        self.table.enter(index, asked, 0, part=part)
        self.table.reserve(slots=1 + prefix, steps=1)
        start(self.table.arrays, index)
        sequence = self.table.arrays.sequences[index]
        while sequence.fed < sequence.prefix_length:
            feed(self.table.arrays, index)
        last = int(sequence.rows) - 1
        return Step((int(sequence.slot[last]),), self.ancestors(index)[last:])

    def take(self, index: int, parents: Parents) -> Step:
        """One step."""
        sequence = self.table.arrays.sequences[index]
        self.table.reserve(slots=int(sequence.slots_end) + MOST_ROWS, steps=1)
        take_slots(self.table.arrays, index, len(parents), np.array(parents))
        return Step(tuple(sequence.slot[: len(parents)].tolist()), self.ancestors(index))

    def ancestors(self, index: int) -> tuple[frozenset[int], ...]:
        rows = int(self.table.arrays.sequences[index].rows)
        return tuple(frozenset(row.nonzero()[0].tolist()) for row in self.table.arrays.ancestors[index, :rows])

    def end(self, index: int) -> int:
        return int(self.table.arrays.sequences[index].slots_end)


@given(histories())
def test_each_token_takes_the_lowest_free_slot(history: History) -> None:
    sequences = Sequences(1)
    taken = [sequences.start(0, history.prefix, history.part), *(sequences.take(0, step) for step in history.steps)]
    assert taken == twin(history)


@given(st.lists(st.tuples(st.integers(0, 8), histories()), min_size=2, max_size=6))
def test_slots_do_not_depend_on_neighbours(running: list[tuple[int, History]]) -> None:
    """Sequences of all widths that come and go at any time take the slots that they take alone, at any index."""
    together = Sequences(len(running))
    free, index_of = list(range(len(running))), dict[int, int]()
    alone = [twin(history) for _, history in running]
    for now in range(max(begin + len(history.steps) for begin, history in running) + 1):
        for number, (begin, history) in enumerate(running):
            age = now - begin
            if age == 0:
                # Whose index it was before does not matter.
                index_of[number] = free.pop()
                assert together.start(index_of[number], history.prefix, history.part) == alone[number][0]
            elif 0 < age <= len(history.steps):
                assert together.take(index_of[number], history.steps[age - 1]) == alone[number][age]
            if 0 <= age <= len(history.steps):
                highest = max(max(ancestors) for ancestors in alone[number][age].ancestors)
                assert together.end(index_of[number]) == highest + 1
            if age == len(history.steps):
                free.insert(0, index_of[number])


@given(histories())
def test_no_slot_is_written_that_a_live_hypothesis_reads(history: History) -> None:
    """The rows of a step write different slots, and none that another hypothesis descends from."""
    sequences = Sequences(1)
    sequences.start(0, history.prefix)
    for parents in history.steps:
        step = sequences.take(0, parents)
        assert len(set(step.slots)) == len(step.slots)
        for row, slot in enumerate(step.slots):
            assert [slot in others for others in step.ancestors] == [other == row for other in range(len(parents))]


@given(histories())
def test_a_hypothesis_descends_from_as_many_slots_as_it_has_tokens(history: History) -> None:
    sequences = Sequences(1)
    sequences.start(0, history.prefix)
    for length, parents in enumerate(history.steps, 2 + history.prefix):
        assert {len(ancestors) for ancestors in sequences.take(0, parents).ancestors} == {length}


@given(histories())
def test_slots_stay_below_the_prefix_and_width_times_length(history: History) -> None:
    """What admission counts on: rows run for all generated tokens but the last one."""
    sequences = Sequences(1)
    sequences.start(0, history.prefix)
    for generated, parents in enumerate(history.steps, 2):
        sequences.take(0, parents)
        assert sequences.end(0) <= history.prefix + history.width * generated


@given(st.integers(0, 60), st.integers(1, MOST_ROWS))
def test_a_prefix_takes_consecutive_slots_and_each_token_sees_all_before_it(prefix: int, part: int) -> None:
    sequences = Sequences(1)
    asked = GenerationRequest(RequestId(0), (7,), SearchOptions(), target_prefix=tuple(range(2, 2 + prefix)))
    sequences.table.enter(0, asked, 0, part=part)
    start(sequences.table.arrays, 0)
    sequence = sequences.table.arrays.sequences[0]
    fed: list[int] = []
    while True:
        rows = int(sequence.rows)
        positions = list(range(len(fed), len(fed) + rows))
        assert rows == min(part, 1 + prefix - len(fed))
        assert sequence.slot[:rows].tolist() == sequence.position[:rows].tolist() == positions
        assert sequences.ancestors(0) == tuple(frozenset(range(p + 1)) for p in positions)
        fed += sequence.token[:rows].tolist()
        assert (sequences.end(0), sequence.fed) == (len(fed), len(fed))
        if sequence.fed == sequence.prefix_length:
            break
        feed(sequences.table.arrays, 0)
    assert fed == [0, *range(2, 2 + prefix)]


def test_an_index_that_is_taken_again_starts_anew() -> None:
    sequences = Sequences(2)
    for index in (0, 1):
        sequences.start(index)
        sequences.take(index, (0, 0, 0)[: 3 - index])
    assert sequences.start(0) == Step((0,), (frozenset({0}),))
    assert sequences.take(1, (0, 0)).slots == (2, 3)


def test_slots_grow_beyond_their_first_number() -> None:
    """A greedy search of 200 tokens uses the slots 0 to 199, one after the other."""
    sequences = Sequences(1)
    taken = [sequences.start(0).slots, *(sequences.take(0, (0,)).slots for _ in range(199))]
    assert taken == [(slot,) for slot in range(200)]
