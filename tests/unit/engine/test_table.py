"""What a table tells of the searches in it, against a twin that keeps every hypothesis as a list."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.request import (
    EarlyStopping,
    Finish,
    GenerationRequest,
    LengthPenaltyKind,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.search import start
from beamline_server.engine.table import DEAD, SequenceTable, Table, bounded_exponent

EOS = 1
WIDTH = 4


def request(beam_size: int = WIDTH, *, prefix: tuple[int, ...] = (), source_tokens: int = 3) -> GenerationRequest:
    options = SearchOptions(beam_size=beam_size)
    return GenerationRequest(RequestId(1), (7,) * source_tokens, options, target_prefix=prefix)


@dataclass(frozen=True)
class Turn:
    """One step of a search: (parent, token) of each next hypothesis, and the parents of those that end."""

    beams: list[tuple[int, int]]
    ended: list[int]


@st.composite
def histories(draw: st.DrawFn, least_beams: int = 1) -> list[Turn]:
    """A search of up to four hypotheses over the tokens 2 to 4: few enough that they often begin alike."""
    live = 1
    turns: list[Turn] = []
    for _ in range(draw(st.integers(1, 8))):
        parent = st.integers(0, live - 1)
        pairs = st.tuples(parent, st.integers(2, 4))
        beams = draw(st.lists(pairs, min_size=least_beams, max_size=WIDTH, unique=True))
        turns.append(Turn(beams, draw(st.lists(parent, max_size=2))))
        live = max(1, len(beams))
        if not beams:
            break
    return turns


@dataclass(frozen=True)
class Path:
    """A live or finished hypothesis: its tokens, the running sums of their log-probabilities, its last parent."""

    tokens: tuple[int, ...] = ()
    totals: tuple[float, ...] = (0.0,)
    parent: int = 0

    def continued(self, parent: int, token: int, logprob: float) -> "Path":
        return Path((*self.tokens, token), (*self.totals, self.totals[-1] + logprob), parent)


@dataclass
class Twin:
    """One search, plainly."""

    beams: list[Path] = field(default_factory=lambda: [Path()])
    finished: list[Path] = field(default_factory=list)

    def take(self, turn: Turn) -> None:
        old = self.beams
        self.beams = [
            old[parent].continued(parent, token, -1 - 0.25 * rank) for rank, (parent, token) in enumerate(turn.beams)
        ]
        ended = [old[parent].continued(parent, EOS, -0.5) for parent in turn.ended]
        self.finished = sorted([*self.finished, *ended], key=lambda path: -path.totals[-1])[:WIDTH]


def begin(table: SequenceTable, index: int, asked: GenerationRequest | None = None) -> None:
    table.enter(index, asked or request(), decoder_start=0)
    start(table.arrays, index)


def commit(table: SequenceTable, index: int, twin: Twin, turn: Turn) -> None:
    """Write what a step decided, which the twin has taken already."""
    sequence = table.arrays.sequences[index]
    length = int(sequence.length)
    table.reserve(slots=0, steps=length + 1)
    for k, ((parent, token), path) in enumerate(zip(turn.beams, twin.beams, strict=True)):
        table.arrays.parents[index, length, k] = parent
        table.arrays.tokens[index, length, k] = token
        table.arrays.totals[index, length, k] = path.totals[-1]
    for k, path in enumerate(twin.finished):
        sequence.finished_score[k] = sequence.finished_total[k] = path.totals[-1]
        sequence.finished_length[k], sequence.finished_parent[k] = len(path.tokens), path.parent
        sequence.finished_token[k] = path.tokens[-1]
    sequence.length, sequence.live = length + 1, len(turn.beams)


def replay(table: SequenceTable, index: int, history: list[Turn]) -> Twin:
    """Take a search through its history."""
    twin = Twin()
    begin(table, index)
    for turn in history:
        twin.take(turn)
        commit(table, index, twin, turn)
    return twin


def common(tokens: list[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of some sequences begin with."""
    first, *others = tokens
    length = next(n for n in range(len(first), -1, -1) if all(other[:n] == first[:n] for other in others))
    return first[:length]


@given(st.lists(histories(), min_size=2, max_size=3))
def test_hypotheses_are_the_paths_that_led_to_them(several: list[list[Turn]]) -> None:
    """Searches of different age, side by side, each keep their own history."""
    table = SequenceTable(len(several), (EOS,))
    twins = [Twin() for _ in several]
    for index in range(len(several)):
        begin(table, index)
    for step in range(max(map(len, several))):
        for index, history in enumerate(several):
            if step < len(history):
                twins[index].take(history[step])
                commit(table, index, twins[index], history[step])
    for index, twin in enumerate(twins):
        found = table.hypotheses(index, WIDTH)
        assert [h.tokens for h in found] == [path.tokens for path in twin.finished]
        assert [h.score for h in found] == [path.totals[-1] for path in twin.finished]
        for hypothesis, path in zip(found, twin.finished, strict=True):
            assert hypothesis.token_logprobs == tuple(np.diff(path.totals))
            assert hypothesis.finish is Finish.END_OF_SEQUENCE


@given(histories(least_beams=0))
def test_what_is_certain_is_what_whoever_may_win_begins_with(history: list[Turn]) -> None:
    table = SequenceTable(1, (EOS,))
    twin = replay(table, 0, history)
    if twin.beams:
        assert table.certain(0, 0) == common([path.tokens for path in [*twin.beams, *twin.finished[:1]]])


@given(histories())
def test_what_is_certain_stays_so(history: list[Turn]) -> None:
    table = SequenceTable(1, (EOS,))
    known: tuple[int, ...] = ()
    for length in range(1, len(history) + 1):
        replay(table, 0, history[:length])
        certain = table.certain(0, 0)
        assert certain[: len(known)] == known
        assert (*known, *table.certain(0, len(known))) == certain
        known = certain


def test_a_single_hypothesis_is_certain_at_once() -> None:
    table = SequenceTable(1, (EOS,))
    for length in range(1, 100):
        replay(table, 0, [Turn([(0, 2 + step % 3)], []) for step in range(length)])
        assert table.certain(0, 0) == tuple(2 + step % 3 for step in range(length))
        assert table.certain(0, length - 1) == (2 + (length - 1) % 3,)


def test_fewer_hypotheses_than_asked_for_are_as_many_as_there_are() -> None:
    table = SequenceTable(1, (EOS,))
    replay(table, 0, [Turn([(0, 2), (0, 3)], [0]), Turn([(0, 2)], [1])])
    assert [h.tokens for h in table.hypotheses(0, 1)] == [(EOS,)]
    assert [h.tokens for h in table.hypotheses(0, 4)] == [(EOS,), (3, EOS)]


def test_an_index_that_is_taken_again_remembers_nothing() -> None:
    table = SequenceTable(2, (EOS,))
    replay(table, 0, [Turn([(0, 2), (0, 3)], [0]), Turn([(1, 2)], [1])])
    table.arrays.sequences[0].done = True
    table.leave(0)
    table.enter(0, request(2, prefix=(4,)), decoder_start=7)
    start(table.arrays, 0)
    begin(table, 1, request(2, prefix=(4,)))
    assert table.hypotheses(0, 4) == ()
    assert table.certain(0, 0) == ()
    first, fresh = table.arrays.sequences[0], table.arrays.sequences[1]
    assert (first.live, first.length, first.score[0], first.done) == (1, 0, 0.0, False)
    assert first.token[:2].tolist() == [7, 4]
    for name in ("rows", "slots_end", "fed", "beams", "source_length", "prefix_length"):
        assert first[name] == fresh[name]
    assert np.array_equal(table.arrays.ancestors[0], table.arrays.ancestors[1])


@pytest.mark.parametrize("last", [EOS, 2])
def test_a_hypothesis_knows_why_it_ended(last: int) -> None:
    table = SequenceTable(1, (EOS,))
    begin(table, 0)
    sequence = table.arrays.sequences[0]
    sequence.finished_score[0] = sequence.finished_total[0] = -1.0
    sequence.finished_length[0], sequence.finished_token[0] = 1, last
    (found,) = table.hypotheses(0, 1)
    assert (found.tokens, found.score, found.token_logprobs) == ((last,), -1.0, (-1.0,))
    assert found.finish is (Finish.END_OF_SEQUENCE if last == EOS else Finish.LENGTH)


# -- what was asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", EarlyStopping)
@pytest.mark.parametrize("kind", LengthPenaltyKind)
@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_record_holds_what_was_asked_for(
    beam_size: int, kind: LengthPenaltyKind, early_stopping: EarlyStopping
) -> None:
    table = SequenceTable(1, (EOS,))
    options = SearchOptions(
        beam_size=beam_size,
        length_penalty=0.6,
        length_penalty_kind=kind,
        early_stopping=early_stopping,
        min_new_tokens=3,
        max_new_tokens=30,
    )
    table.enter(0, GenerationRequest(RequestId(1), (7, 8, 9), options, target_prefix=(5, 6)), decoder_start=2)
    sequence = table.arrays.sequences[0]
    assert (sequence.beams, sequence.min_new, sequence.max_new, sequence.exponent) == (beam_size, 3, 30, 0.6)
    assert (sequence.source_length, sequence.prefix_length) == (3, 3)
    assert table.arrays.prefix[0, :3].tolist() == [2, 5, 6]
    assert bool(sequence.gnmt) == (kind is LengthPenaltyKind.GNMT)
    # Greedy search stops at its first end, whatever the rule.
    assert bool(sequence.when_full) == (beam_size == 1 or early_stopping is EarlyStopping.WHEN_FULL)
    assert bool(sequence.never) == (early_stopping is EarlyStopping.NEVER)


def test_only_those_that_are_over_are_done_until_they_leave() -> None:
    table = SequenceTable(4, (EOS,))
    for index in range(4):
        begin(table, index)
    assert table.done() == []
    table.arrays.sequences[1].done = table.arrays.sequences[3].done = True
    assert table.done() == [1, 3]
    table.leave(1)
    assert table.done() == [3]


@given(st.integers(0, 100), st.integers(0, 30), st.integers(1, 16))
def test_a_prefix_takes_as_few_steps_as_its_parts_and_every_token_one(prefix: int, generated: int, part: int) -> None:
    table = SequenceTable(1, (EOS,))
    table.enter(0, request(prefix=(3,) * prefix), decoder_start=0, part=part)
    start(table.arrays, 0)
    table.arrays.sequences[0].length = generated
    parts = len(range(0, 1 + prefix, part))
    # The last part is also the step that generates the first token.
    assert table.steps(0) == parts + generated - 1


@given(st.floats(-10, 10), st.integers(1, 1 << 20))
def test_the_divisor_of_a_score_stays_in_fp32(exponent: float, longest: int) -> None:
    bounded = bounded_exponent(exponent, longest)
    divisor = np.float32(float(longest) ** bounded)
    assert np.isfinite(divisor)
    assert divisor > 0
    assert abs(bounded) <= abs(exponent)
    if abs(exponent) * np.log10(max(longest, 2)) <= 30:
        assert bounded == exponent


# -- growing ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_what_is_there_stays_there_when_the_arrays_grow(slots: int, steps: int, prefix: int) -> None:
    table = SequenceTable(2, (EOS,))
    begin(table, 0, request(prefix=(3, 4)))
    rng = np.random.default_rng(slots)
    for array in (table.arrays.parents, table.arrays.tokens, table.arrays.totals):
        array[0] = rng.integers(0, 9, array[0].shape)
    before = table.arrays
    table.reserve(slots=slots, steps=steps)
    table.enter(1, request(prefix=(5,) * prefix), decoder_start=0)
    after = table.arrays
    assert after.ancestors.shape[2] == after.spare.shape[1] >= slots
    assert after.parents.shape == after.tokens.shape == after.totals.shape
    assert after.tokens.shape[1] >= steps
    assert after.prefix[1, : prefix + 1].tolist() == [0, *[5] * prefix]
    assert after.sequences is before.sequences
    for name in Table._fields[1:]:
        old, new = getattr(before, name), getattr(after, name)
        part = tuple(slice(length) for length in old.shape)
        assert np.array_equal(new[part][0], old[0])
        if name != "prefix":
            assert np.count_nonzero(new) == np.count_nonzero(new[part]), "what is new is not empty"


def test_arrays_that_are_large_enough_stay_where_they_are() -> None:
    table = SequenceTable(2, (EOS,))
    before = table.arrays
    table.reserve(slots=64, steps=64)
    assert table.arrays is before


def test_no_finished_hypothesis_is_as_good_as_a_dead_one() -> None:
    table = SequenceTable(1, (EOS,))
    begin(table, 0)
    assert (table.arrays.sequences[0].finished_score == DEAD).all()
