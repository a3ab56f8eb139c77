"""The histories of searches, against a twin that keeps every beam as a list."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from beamline_server.engine.beam import (
    DEAD,
    Finished,
    IntArray,
    Merged,
    Selection,
    choice_of,
    end_of,
    ends_at,
    parent_of,
    token_of,
)
from beamline_server.engine.searches import Searches
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.request import Finish, SearchOptions

EOS = 1
WIDTH = 4


@dataclass(frozen=True)
class Turn:
    """One step of a search: (parent, token) of each next beam, and the parents of the hypotheses that end."""

    beams: list[tuple[int, int]]
    ended: list[int]


@st.composite
def histories(draw: st.DrawFn, least_beams: int = 1) -> list[Turn]:
    """A search of up to four beams over the tokens 2 to 4: few enough that beams often begin alike."""
    live = 1
    turns: list[Turn] = []
    for _ in range(draw(st.integers(1, 8))):
        parent = st.integers(0, live - 1)
        beams = draw(st.lists(st.tuples(parent, st.integers(2, 4)), min_size=least_beams, max_size=WIDTH))
        turns.append(Turn(beams, draw(st.lists(parent, max_size=2))))
        live = max(1, len(beams))
        if not beams:
            break
    return turns


@dataclass(frozen=True)
class Path:
    """A beam or a finished hypothesis: its tokens, the running sums of their log-probabilities, its last parent."""

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


def selection(twins: list[Twin], turns: list[Turn]) -> Selection:
    """What a step decided, as arrays over some searches that the twins have taken already."""
    shape = (len(twins), WIDTH)
    score, total = np.full(shape, DEAD), np.full(shape, DEAD)
    choice, end = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, (twin, turn) in enumerate(zip(twins, turns, strict=True)):
        for rank, path in enumerate(twin.beams):
            score[row, rank], choice[row, rank] = path.totals[-1], packed(*turn.beams[rank])
        for rank, path in enumerate(twin.finished):
            total[row, rank] = path.totals[-1]
            end[row, rank] = ends_at(np.array(len(path.tokens)), packed(path.parent, path.tokens[-1]))
    new = np.flatnonzero([len(turn.ended) > 0 for turn in turns])
    merged = Merged(new, Finished(total[new], total[new], end[new])) if len(new) else None
    return Selection(score, choice, merged, np.zeros(len(twins), np.bool_))


def packed(parent: int, token: int) -> IntArray:
    return choice_of(np.array(parent), np.array(token))


def replay(searches: Searches, place: int, history: list[Turn]) -> Twin:
    """Take a search through its history, alone."""
    twin, places = Twin(), np.array([place])
    searches.start(place, SearchOptions(beam_size=WIDTH), decoder_start=0)
    for turn in history:
        twin.take(turn)
        searches.commit(places, selection([twin], [turn]))
    return twin


def common(tokens: list[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of some sequences begin with."""
    first, *others = tokens
    length = next(n for n in range(len(first), -1, -1) if all(other[:n] == first[:n] for other in others))
    return first[:length]


@given(st.lists(histories(), min_size=2, max_size=3))
def test_hypotheses_are_the_paths_that_led_to_them(several: list[list[Turn]]) -> None:
    """Searches of different age, advanced by one array step, each keep their own history."""
    searches = Searches(len(several), 16, (EOS,))
    twins = [Twin() for _ in several]
    for place in range(len(several)):
        searches.start(place, SearchOptions(beam_size=WIDTH), decoder_start=0)
    for step in range(max(map(len, several))):
        here = [place for place, history in enumerate(several) if step < len(history)]
        for place in here:
            twins[place].take(several[place][step])
        decided = selection([twins[p] for p in here], [several[p][step] for p in here])
        searches.commit(np.array(here), decided)
    for place, twin in enumerate(twins):
        found = searches.hypotheses(place, WIDTH)
        assert [h.tokens for h in found] == [path.tokens for path in twin.finished]
        assert [h.score for h in found] == [path.totals[-1] for path in twin.finished]
        for hypothesis, path in zip(found, twin.finished, strict=True):
            assert hypothesis.token_logprobs == tuple(np.diff(path.totals))
            assert hypothesis.finish is Finish.END_OF_SEQUENCE


@given(st.integers(0, 1 << 20), st.integers(0, 255), st.integers(0, (1 << 32) - 1))
def test_the_end_of_a_hypothesis_fits_in_one_number(length: int, parent: int, token: int) -> None:
    choice = packed(parent, token)
    assert (int(parent_of(choice)), int(token_of(choice))) == (parent, token)
    assert end_of(int(ends_at(np.array(length), choice))) == (length, parent, token)


@given(histories(least_beams=0))
def test_what_is_certain_is_what_whoever_may_win_begins_with(history: list[Turn]) -> None:
    searches = Searches(1, 16, (EOS,))
    twin = replay(searches, 0, history)
    certain = tuple(searches.certain(0, 0))
    rivals = [path.tokens for path in [*twin.beams, *twin.finished[:1]]]
    if rivals:
        shared = common(rivals)
        assert certain == shared[: len(certain)]
    if len(rivals) == 1:
        assert certain == rivals[0]


@given(histories())
def test_what_is_certain_stays_so(history: list[Turn]) -> None:
    searches = Searches(1, 16, (EOS,))
    known: tuple[int, ...] = ()
    for length in range(1, len(history) + 1):
        replay(searches, 0, history[:length])
        certain = tuple(searches.certain(0, 0))
        assert certain[: len(known)] == known
        assert [*known, *searches.certain(0, len(known))] == list(certain)
        known = certain


def test_a_single_beam_is_certain_at_once() -> None:
    searches = Searches(1, 16, (EOS,))
    for length in range(1, 100):
        replay(searches, 0, [Turn([(0, 2 + step % 3)], []) for step in range(length)])
        assert searches.certain(0, 0) == [2 + step % 3 for step in range(length)]
        assert searches.certain(0, length - 1) == [2 + (length - 1) % 3]


def test_fewer_hypotheses_than_asked_for_are_as_many_as_there_are() -> None:
    searches = Searches(1, 16, (EOS,))
    replay(searches, 0, [Turn([(0, 2), (0, 3)], [0]), Turn([(0, 2)], [1])])
    assert [h.tokens for h in searches.hypotheses(0, 1)] == [(EOS,)]
    assert [h.tokens for h in searches.hypotheses(0, 4)] == [(EOS,), (3, EOS)]


def test_a_place_that_is_taken_again_remembers_nothing() -> None:
    searches = Searches(1, 16, (EOS,))
    replay(searches, 0, [Turn([(0, 2), (0, 3)], [0]), Turn([(1, 2)], [1])])
    searches.start(0, SearchOptions(beam_size=2), decoder_start=7)
    assert searches.hypotheses(0, 4) == ()
    assert searches.certain(0, 0) == []
    assert (searches.score[0, :3] > DEAD).tolist() == [True, False, False]
    assert token_of(searches.choice[0, 0]) == 7
    assert parent_of(searches.choice[0, 0]) == 0


@pytest.mark.parametrize("last", [EOS, 2])
def test_a_hypothesis_knows_why_it_ended(last: int) -> None:
    searches = Searches(1, 16, (EOS,))
    searches.start(0, SearchOptions(), decoder_start=0)
    places, end = np.array([0]), ends_at(np.array([[1]]), np.array([[packed(0, last)]]))
    total = np.full((1, 1), -1.0, np.float32)
    nothing = np.zeros((1, 1), np.int64)
    dead = np.full((1, 1), DEAD)
    decided = Selection(dead, nothing, Merged(places, Finished(total, total, end)), np.ones(1, np.bool_))
    searches.commit(places, decided)
    (found,) = searches.hypotheses(0, 1)
    assert found.finish is (Finish.END_OF_SEQUENCE if last == EOS else Finish.LENGTH)
