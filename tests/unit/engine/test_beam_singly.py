"""Sentence by sentence, a step decides what it decides for all at once: the same bits."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_server.engine.beam import DEAD, Finished, IntArray, Merged, SearchRules, Selection, advance
from beamline_server.engine.beam_singly import advance_singly
from beamline_server.engine.request import EarlyStopping, LengthPenaltyKind, SearchOptions
from beamline_server.engine.scoring import FloatArray
from beamline_server.engine.searches import Searches

VOCABULARY = 9


@dataclass(frozen=True)
class Step:
    """What a step is given."""

    rules: SearchRules
    searches: Searches
    places: IntArray
    top_logprob: FloatArray
    top_token: IntArray


@st.composite
def rules(draw: st.DrawFn) -> SearchRules:
    tokens = st.integers(0, VOCABULARY - 1)
    some = st.lists(tokens, max_size=2, unique=True).map(tuple)
    eos = draw(st.lists(tokens, min_size=1, max_size=2, unique=True).map(tuple))
    return SearchRules(eos, draw(some), draw(some), draw(st.none() | tokens), draw(st.none() | tokens))


@st.composite
def options(draw: st.DrawFn, most: int) -> SearchOptions:
    longest = draw(st.integers(1, 9))
    return SearchOptions(
        beam_size=draw(st.sampled_from([most, most, 1]) | st.integers(1, most)),
        length_penalty=draw(st.sampled_from([1.0, 1.0, 0.0, -1.3, 0.6])),
        length_penalty_kind=draw(st.sampled_from(LengthPenaltyKind)),
        early_stopping=draw(st.sampled_from(EarlyStopping)),
        min_new_tokens=draw(st.integers(0, longest)),
        max_new_tokens=longest,
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Sentences of any age and width with ties, dead beams, and scores that are no numbers."""
    found, count, most = draw(rules()), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    wanted = [draw(options(most)) for _ in range(count)]
    widest = max(each.beam_size for each in wanted)
    searches, rng = Searches(count, 16, found.eos), np.random.default_rng(draw(st.integers(0, 2**32)))
    places = rng.permutation(count)
    levels = draw(st.sampled_from([4, 2**20]))

    def scores(*shape: int) -> FloatArray:
        """The best first; some dead."""
        values = -rng.integers(0, levels, shape).astype(np.float32) / np.float32(7)
        values[rng.random(shape) < draw(st.sampled_from([0.0, 0.3]))] = DEAD
        values.sort(axis=-1)
        return values[..., ::-1]

    for place, each in zip(places, wanted, strict=True):
        searches.start(place, each, 0)
        searches.step[place] = rng.integers(0, each.max_new_tokens)
        if searches.step[place]:
            searches.score[place, : each.beam_size] = scores(each.beam_size)
            searches.finished.score[place, : each.beam_size] = scores(each.beam_size)
    candidates = found.needed_candidates(widest, VOCABULARY)
    logprob = scores(count, widest, candidates)
    if draw(st.booleans()):
        logprob[0, 0] = np.nan
    token = np.argsort(rng.random((count, widest, VOCABULARY)), axis=2)[:, :, :candidates]
    return Step(found, searches, places, logprob, token)


def alive(finished: Finished) -> list[list[tuple[float, float, int]]]:
    """What finished, sentence by sentence."""
    rows = zip(finished.score.tolist(), finished.total.tolist(), finished.end.tolist(), strict=True)
    return [[each for each in zip(*row, strict=True) if each[0] > DEAD] for row in rows]


def decided(selection: Selection) -> tuple[object, ...]:
    merged: Merged | None = selection.merged
    best = None if merged is None else (merged.sentence.tolist(), alive(merged.finished))
    return selection.score.tolist(), selection.choice.tolist(), best, selection.done.tolist()


@given(steps())
@settings(max_examples=500)
def test_singly_and_together_decide_the_same(given_: Step) -> None:
    searches, places = given_.searches, given_.places
    limits = searches.limits(places)
    beams = int(limits.width.max())
    both = [
        function(
            given_.rules,
            limits,
            step=searches.step[places],
            score=searches.score[places, :beams],
            finished=searches.finished,
            places=places,
            top_logprob=given_.top_logprob,
            top_token=given_.top_token,
        )
        for function in (advance, advance_singly)
    ]
    together, singly = both
    assert decided(singly) == decided(together)
    for name in ("score", "choice", "done"):
        assert getattr(singly, name).dtype == getattr(together, name).dtype
    if together.merged is not None and singly.merged is not None:
        assert singly.merged.finished.score.shape == together.merged.finished.score.shape


def test_quotients_are_compared_as_fp32() -> None:
    """A live beam that is as good as the worst finished hypothesis, in fp32, cannot better it."""
    rules, places = SearchRules(eos=(1,)), np.array([0])
    searches = Searches(1, 16, rules.eos)
    for numerator in range(1, 60):
        total = np.float32(-numerator / 7)
        searches.start(0, SearchOptions(beam_size=2, early_stopping=EarlyStopping.HEURISTIC), 0)
        searches.step[0], searches.score[0, 0] = 2, total
        searches.finished.score[0, :2] = total / np.float32(3)
        for decide in (advance, advance_singly):
            selection = decide(
                rules,
                searches.limits(places),
                step=searches.step[places],
                score=searches.score[places, :2],
                finished=searches.finished,
                places=places,
                top_logprob=np.zeros((1, 2, 5), np.float32),
                top_token=np.tile(np.arange(2, 7), (1, 2, 1)),
            )
            assert selection.done.tolist() == [True], (decide.__name__, numerator)
