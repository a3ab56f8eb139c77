"""The state of all searches of a worker, as arrays over places; a place is one running sentence.

Per-sentence Python objects are touched when a sentence starts, ends or streams; a step works on these arrays.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from beamline_server.engine.beam import DEAD, BoolArray, Finished, IntArray, Limits, Selection, end_of
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
        self.token = np.zeros((places, beams), np.int64)
        self.parent = np.zeros((places, beams), np.int64)
        self._finished = Finished(
            score=np.full((places, beams), DEAD),
            total=np.zeros((places, beams), np.float32),
            end=np.zeros((places, beams), np.int64),
        )
        # What each step appended: (place, step, beam).
        self._tokens = np.zeros((places, _CHUNK, beams), np.int32)
        self._parents = np.zeros((places, _CHUNK, beams), np.int8)
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
        self.token[place, 0] = decoder_start
        self.parent[place] = 0
        self._finished.score[place] = DEAD

    def limits(self, places: IntArray) -> Limits:
        """The options of some sentences."""
        return Limits(
            width=self.width[places],
            exponent=self._exponent[places],
            gnmt=self._gnmt[places],
            when_full=self._when_full[places],
            never=self._never[places],
            min_new=self._min_new[places],
            max_new=self._max_new[places],
        )

    def finished(self, places: IntArray, beams: int) -> Finished:
        """The finished hypotheses of some sentences, cut to the widest beam among them."""
        f = self._finished
        return Finished(score=f.score[places, :beams], total=f.total[places, :beams], end=f.end[places, :beams])

    def live(self, places: IntArray, beams: int) -> BoolArray:
        """Which beams exist, (S, beams)."""
        result: BoolArray = self.score[places, :beams] > DEAD
        return result

    def commit(self, places: IntArray, selection: Selection, before: Finished) -> None:
        """Take over what a step decided; `before` are the finished hypotheses that it was given."""
        beams = selection.score.shape[1]
        step = self.step[places]
        self._reserve(int(step.max()) + 1)
        self._tokens[places, step, :beams] = selection.token
        self._parents[places, step, :beams] = selection.parent
        self._totals[places, step, :beams] = selection.score
        self.score[places, :beams] = selection.score
        self.token[places, :beams] = selection.token
        self.parent[places, :beams] = selection.parent
        self.step[places] = step + 1
        f, new = self._finished, selection.finished
        if new is not before:
            f.score[places, :beams] = new.score
            f.total[places, :beams] = new.total
            f.end[places, :beams] = new.end

    def hypotheses(self, place: int, count: int) -> tuple[Hypothesis, ...]:
        """The best finished hypotheses of a sentence, best first: `count`, or as many as there are."""
        f = self._finished
        present = [k for k in range(count) if f.score[place, k] > DEAD]
        return tuple(self._hypothesis(place, k) for k in present)

    def _hypothesis(self, place: int, k: int) -> Hypothesis:
        f = self._finished
        length, parent, last = end_of(int(f.end[place, k]))
        tokens, totals = self._path(place, length - 1, parent)
        totals.append(float(f.total[place, k]))
        logprobs = tuple(b - a for a, b in zip([0.0, *totals], totals, strict=False))
        finish = Finish.END_OF_SEQUENCE if last in self._eos else Finish.LENGTH
        return Hypothesis((*tokens, last), float(f.score[place, k]), logprobs, finish)

    def _path(self, place: int, steps: int, beam: int, *, since: int = 0) -> tuple[list[int], list[float]]:
        """Tokens and running totals of the first `steps` steps that lead to a beam, but for the first `since`."""
        parents = self._parents[place, since:steps].tolist()
        beams = [0] * len(parents)
        for step in range(len(parents) - 1, -1, -1):
            beams[step], beam = beam, parents[step][beam]
        rows = np.arange(since, since + len(beams))
        return self._tokens[place, rows, beams].tolist(), self._totals[place, rows, beams].tolist()

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
            parents = self._parents[place, step].tolist()
            beams = {parents[beam] for beam in beams}
        rivals: list[list[int]] = []
        if beams:
            # Siblings that part at the last known step may still agree on a token; only wider searches could tell, and
            # waiting one step longer is right for all.
            rivals.append(self._path(place, step, beams.pop(), since=known)[0] if len(beams) == 1 else [])
        if self._finished.score[place, 0] > DEAD:
            length, parent, last = end_of(int(self._finished.end[place, 0]))
            best = [*self._path(place, length - 1, parent, since=known)[0], last]
            rivals.append(best[: length - known])
        same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rivals, strict=False))
        return [tokens[0] for tokens in same]

    def _reserve(self, steps: int) -> None:
        present = self._tokens.shape[1]
        if steps > present:
            more = ((0, 0), (0, -(-steps // _CHUNK) * _CHUNK - present), (0, 0))
            self._tokens, self._parents, self._totals = (
                np.pad(self._tokens, more),
                np.pad(self._parents, more),
                np.pad(self._totals, more),
            )
