"""The state of all searches of a worker, as arrays over places; a place is one running sentence.

Per-sentence Python objects are touched when a sentence starts, ends or streams; a step works on these arrays.
"""

import itertools
import operator
from collections.abc import Sequence

import numpy as np

from beamline_server.engine.beam import DEAD, Finished, IntArray, Limits, Selection, end_of
from beamline_server.engine.request import EarlyStopping, Finish, Hypothesis, LengthPenaltyKind, SearchOptions
from beamline_server.engine.scoring import bounded_exponent

_CHUNK = 64


class Searches:
    """Beams, finished hypotheses and histories of up to `places` sentences with up to `beams` beams."""

    def __init__(self, places: int, beams: int, eos: Sequence[int]) -> None:
        self._eos = frozenset(eos)
        self.width = np.zeros(places, np.int64)
        self._exponent = np.zeros(places)
        self._gnmt = np.zeros(places, np.bool_)
        self._when_full = np.zeros(places, np.bool_)
        self._never = np.zeros(places, np.bool_)
        self._min_new = np.zeros(places, np.int64)
        self._max_new = np.zeros(places, np.int64)
        self.step = np.zeros(places, np.int64)
        self.score = np.full((places, beams), DEAD)
        self.choice = np.zeros((places, beams), np.int64)
        self.finished = Finished(
            score=np.full((places, beams), DEAD),
            total=np.zeros((places, beams), np.float32),
            end=np.zeros((places, beams), np.int64),
        )
        # What each step appended: (place, step, beam).
        self._choices = np.zeros((places, _CHUNK, beams), np.int64)
        self._totals = np.zeros((places, _CHUNK, beams), np.float32)

    def start(self, place: int, options: SearchOptions, decoder_start: int) -> None:
        """Begin a search: one live beam, which holds the decoder start token."""
        greedy = options.beam_size == 1
        self.width[place] = options.beam_size
        self._exponent[place] = bounded_exponent(options.length_penalty, options.max_new_tokens)
        self._gnmt[place] = options.length_penalty_kind is LengthPenaltyKind.GNMT
        # Greedy search stops at its first end of sequence, whatever the rule.
        self._when_full[place] = greedy or options.early_stopping is EarlyStopping.WHEN_FULL
        self._never[place] = options.early_stopping is EarlyStopping.NEVER
        self._min_new[place] = options.min_new_tokens
        self._max_new[place] = options.max_new_tokens
        self.step[place] = 0
        self.score[place] = DEAD
        self.score[place, 0] = 0.0
        self.choice[place] = decoder_start
        self.finished.score[place] = DEAD

    def limits(self, places: IntArray) -> Limits:
        """The options of some sentences."""
        width, exponent, gnmt = self.width[places], self._exponent[places], self._gnmt[places]
        return Limits(
            width=width,
            exponent=exponent,
            gnmt=gnmt,
            when_full=self._when_full[places],
            never=self._never[places],
            min_new=self._min_new[places],
            max_new=self._max_new[places],
            all_as_wide=bool((width == width[0]).all()),
            all_mean=bool((exponent == 1).all()) and not gnmt.any(),
        )

    def commit(self, places: IntArray, selection: Selection) -> None:
        """Take over what a step decided."""
        beams = selection.score.shape[1]
        step = self.step[places]
        self._reserve(int(step.max()) + 1)
        self._choices[places, step, :beams] = selection.choice
        self._totals[places, step, :beams] = selection.score
        self.score[places, :beams] = selection.score
        self.choice[places, :beams] = selection.choice
        self.step[places] = step + 1
        merged = selection.merged
        if merged is not None:
            f, new, these = self.finished, merged.finished, places[merged.sentence]
            beams = new.score.shape[1]
            f.score[these, :beams] = new.score
            f.total[these, :beams] = new.total
            f.end[these, :beams] = new.end

    def hypotheses(self, place: int, count: int) -> tuple[Hypothesis, ...]:
        """The best finished hypotheses of a sentence, best first: `count`, or as many as there are."""
        scores = self.finished.score[place, :count].tolist()
        return tuple(self._hypothesis(place, k, score) for k, score in enumerate(scores) if score > DEAD)

    def _hypothesis(self, place: int, k: int, score: float) -> Hypothesis:
        length, parent, last = end_of(int(self.finished.end[place, k]))
        tokens, totals = self._path(place, length - 1, parent)
        totals.append(float(self.finished.total[place, k]))
        logprobs = tuple(map(operator.sub, totals, [0.0, *totals]))
        finish = Finish.END_OF_SEQUENCE if last in self._eos else Finish.LENGTH
        return Hypothesis((*tokens, last), score, logprobs, finish)

    def _path(self, place: int, steps: int, beam: int, *, since: int = 0) -> tuple[list[int], list[float]]:
        """Tokens and running totals of the first `steps` steps that lead to a beam, but for the first `since`."""
        wide = int(self.width[place])
        choices = self._choices[place, since:steps, :wide].tolist()
        totals = self._totals[place, since:steps, :wide].tolist()
        tokens = [0] * len(choices)
        for step in range(len(choices) - 1, -1, -1):
            _, parent, tokens[step] = end_of(choices[step][beam])
            totals[step], beam = totals[step][beam], parent
        return tokens, totals

    def certain(self, place: int, known: int) -> list[int]:
        """Tokens that the best hypothesis will have after the first `known`, whatever follows.

        They are what all live beams share with each other and with the best finished hypothesis: finished scores do
        not change, so no other finished hypothesis can still win. What was certain once stays so: `known` is how many
        tokens earlier calls have told, and what they told is not looked at again.
        """
        beams = set(np.flatnonzero(self.score[place] > DEAD).tolist())
        step = int(self.step[place])
        while step > known and len(beams) > 1:
            step -= 1
            beams = {end_of(int(self._choices[place, step, beam]))[1] for beam in beams}
        rivals: list[list[int]] = []
        if beams:
            # Siblings that part at the last known step may still agree on a token; only wider searches could tell, and
            # waiting one step longer is right for all.
            rivals.append(self._path(place, step, beams.pop(), since=known)[0] if len(beams) == 1 else [])
        if self.finished.score[place, 0] > DEAD:
            length, parent, last = end_of(int(self.finished.end[place, 0]))
            best = [*self._path(place, length - 1, parent, since=known)[0], last]
            rivals.append(best[: length - known])
        same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rivals, strict=False))
        return [tokens[0] for tokens in same]

    def _reserve(self, steps: int) -> None:
        present = self._choices.shape[1]
        if steps > present:
            more = ((0, 0), (0, -(-steps // _CHUNK) * _CHUNK - present), (0, 0))
            self._choices, self._totals = np.pad(self._choices, more), np.pad(self._totals, more)
