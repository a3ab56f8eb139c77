"""Beam search as a pure function of scores, over all sentences of a step at once.

Axes: S sentences, K the widest beam among them, C candidates per row, M candidates per sentence.

The definition is Hugging Face `generate`'s (transformers 5.x, `_beam_search`): per step the best
`max(2, 1 + #eos) * beam_size` continuations of all beams are ranked by their summed log-probability; those among the
first `beam_size` that end are finished hypotheses; the first `beam_size` that do not end are the next beams. Its slow
twin, written for reading, is `beamline_export.reference_search`.

Ranking is stable: of equal scores the lower beam, then the better candidate wins. So a sentence's answer depends on
nothing but its own scores, whatever the width of its neighbours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.scoring import FloatArray, length_divisor

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

DEAD = np.float32(-np.inf)
"""Score of a beam or a hypothesis that does not exist."""


@dataclass(frozen=True, slots=True)
class SearchRules:
    """What the model fixes for every search.

    Attributes:
        eos: Tokens that end a hypothesis; without any, each has as many tokens as were asked for.
        banned: Tokens that never occur.
        banned_at_start: Tokens that do not occur as the first one.
        forced_first: The first token, whatever its score.
        forced_last: The token at the length limit, whatever its score.
    """

    eos: tuple[int, ...]
    banned: tuple[int, ...] = ()
    banned_at_start: tuple[int, ...] = ()
    forced_first: int | None = None
    forced_last: int | None = None

    @property
    def candidates_per_beam(self) -> int:
        """How many continuations per beam are ranked: enough that `beam_size` of them do not end."""
        return max(2, 1 + len(self.eos))

    def needed_candidates(self, width: int, vocabulary: int) -> int:
        """C: how many candidates per row make the search exact, bans included."""
        bans = len(self.banned) + len(self.banned_at_start) + len(self.eos)
        return min(vocabulary, self.candidates_per_beam * width + bans)


@dataclass(frozen=True, slots=True)
class Limits:
    """The options of each sentence, as arrays (S,); `all_as_wide` and `all_mean` say what is usual and saves work.

    Attributes:
        all_as_wide: All searches have the same width.
        all_mean: All scores are the mean log-probability: n^1 divides the sum.
    """

    width: IntArray
    exponent: NDArray[np.float64]
    gnmt: BoolArray
    when_full: BoolArray
    never: BoolArray
    min_new: IntArray
    max_new: IntArray
    all_as_wide: bool
    all_mean: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """The best finished hypotheses of sentences, best first, (S, K); a score of DEAD marks an empty place.

    Attributes:
        score: The length-penalized sum of log-probabilities.
        total: The sum itself.
        end: Where the hypothesis ends, as `ends_at` packs it.
    """

    score: FloatArray
    total: FloatArray
    end: IntArray


_TOKEN_BITS, _BEAM_BITS = 32, 8
_PARENT = np.arange(1 << _BEAM_BITS) << _TOKEN_BITS


def choice_of(parent: IntArray, token: IntArray) -> IntArray:
    """The beam that a hypothesis continues and the token it adds, in one number: half as many arrays to carry along."""
    result: IntArray = (parent << _TOKEN_BITS) | token
    return result


def parent_of(choice: IntArray) -> IntArray:
    """The beam in a choice."""
    result: IntArray = choice >> _TOKEN_BITS
    return result


def token_of(choice: IntArray) -> IntArray:
    """The token in a choice."""
    result: IntArray = choice & ((1 << _TOKEN_BITS) - 1)
    return result


def ends_at(length: IntArray, choice: IntArray) -> IntArray:
    """The end of a hypothesis in one number: how many tokens it has, and its last choice."""
    result: IntArray = (length << (_TOKEN_BITS + _BEAM_BITS)) | choice
    return result


def end_of(packed: int) -> tuple[int, int, int]:
    """Length, parent beam and last token of a hypothesis, from what `ends_at` has packed."""
    token, beam = (1 << _TOKEN_BITS) - 1, (1 << _BEAM_BITS) - 1
    return packed >> (_TOKEN_BITS + _BEAM_BITS), (packed >> _TOKEN_BITS) & beam, packed & token


@dataclass(frozen=True, slots=True)
class Merged:
    """The finished hypotheses, old and new, of those sentences that have new ones.

    Attributes:
        sentence: Which sentences of the step, (M,).
        finished: Their best, (M, K).
    """

    sentence: IntArray
    finished: Finished


@dataclass(frozen=True, slots=True)
class Selection:
    """What one step decides.

    Attributes:
        score: Summed log-probability of the next beams, (S, K), best first; DEAD where there is none.
        choice: What each of them continues and adds, as `choice_of` packs it, (S, K).
        merged: What became of the finished hypotheses; None if nothing.
        done: Whether the search is over, (S,).
    """

    score: FloatArray
    choice: IntArray
    merged: Merged | None
    done: BoolArray


def advance(  # noqa: PLR0913 - the state of a search is these things; a class around them would only rename them
    rules: SearchRules,
    limits: Limits,
    *,
    step: IntArray,
    score: FloatArray,
    finished: Finished,
    places: IntArray,
    top_logprob: FloatArray,
    top_token: IntArray,
) -> Selection:
    """Advance every sentence by one token.

    Args:
        rules: What the model fixes.
        limits: What each request asks for.
        step: Tokens generated before this step, (S,).
        score: Summed log-probabilities of the live beams, (S, K); DEAD where there is none.
        finished: Finished hypotheses so far, of these sentences and others.
        places: Where each sentence's are among them, (S,).
        top_logprob: The best continuations of each beam, best first, (S, K, C); those of dead beams are never
            chosen.
        top_token: Their tokens, (S, K, C).
    """
    logprob = _constrain(rules, limits, step, top_logprob, top_token)
    if rules.forced_first is not None or rules.forced_last is not None:
        logprob, top_token = _force(rules, limits, step, (logprob, top_token))
    totals, choices = _rank(score, logprob, top_token, rules.candidates_per_beam * score.shape[1])

    rank = np.arange(totals.shape[1])
    width = limits.width[:, None]
    exists = totals > DEAD
    if not limits.all_as_wide:
        exists &= rank < rules.candidates_per_beam * width
    length = step + 1
    at_limit = length >= limits.max_new
    ends = exists & (_is_any(token_of(choices), rules.eos) | at_limit[:, None])

    next_score, next_choice = _first(exists & ~ends, width, score.shape[1], totals, choices)
    divisor = length.astype(np.float32) if limits.all_mean else length_divisor(length, limits.exponent, limits.gnmt)
    merged = _merge(finished, places, limits, ends & (rank < width), (totals, choices), length, divisor)
    worst = finished.score[places, limits.width - 1]
    if merged is not None:
        s = merged.sentence
        worst[s] = merged.finished.score[np.arange(len(s)), limits.width[s] - 1]
    done = at_limit | _no_better(limits, worst, next_score[:, 0], length, divisor)
    return Selection(next_score, next_choice, merged, done)


def _constrain(rules: SearchRules, limits: Limits, step: IntArray, logprob: FloatArray, token: IntArray) -> FloatArray:
    """Bans, without renormalizing: Hugging Face applies its processors after the log-softmax."""
    forbidden = _is_any(token, rules.banned) if rules.banned else None
    too_short = step < limits.min_new
    if too_short.any():
        ending = _is_any(token, rules.eos) & too_short[:, None, None]
        forbidden = ending if forbidden is None else forbidden | ending
    if rules.banned_at_start and not step.all():
        early = _is_any(token, rules.banned_at_start) & (step == 0)[:, None, None]
        forbidden = early if forbidden is None else forbidden | early
    # Banned tokens are seldom among the best.
    if forbidden is None or not forbidden.any():
        return logprob
    return np.where(forbidden, DEAD, logprob)


def _force(
    rules: SearchRules, limits: Limits, step: IntArray, candidates: tuple[FloatArray, IntArray]
) -> tuple[FloatArray, IntArray]:
    """Forced tokens replace all candidates, with log-probability 0."""
    logprob, token = candidates
    for forced, where in ((rules.forced_first, step == 0), (rules.forced_last, step + 1 == limits.max_new)):
        if forced is not None and where.any():
            logprob, token = logprob.copy(), token.copy()
            logprob[where] = DEAD
            logprob[where, :, 0] = 0.0
            token[where, :, 0] = forced
    return logprob, token


def _rank(score: FloatArray, logprob: FloatArray, token: IntArray, count: int) -> tuple[FloatArray, IntArray]:
    """The best continuations of each sentence, their totals and choices, (S, M) each."""
    sentences, beams, per_beam = logprob.shape
    totals = (score[:, :, None] + logprob).reshape(sentences, beams * per_beam)
    best = (-totals).argsort(axis=1, kind="stable")[:, :count]
    best += np.arange(0, totals.size, beams * per_beam)[:, None]
    return totals.take(best), (token | _PARENT[:beams, None]).take(best)


def _first(
    chosen: BoolArray, width: IntArray, beams: int, totals: FloatArray, choices: IntArray
) -> tuple[FloatArray, IntArray]:
    """The first `width` (S, 1) chosen candidates of each sentence, side by side, (S, K) each."""
    shape = (len(chosen), beams)
    place = chosen.cumsum(axis=1)
    taken = (chosen & (place <= width)).ravel().nonzero()[0]
    if len(taken) == len(chosen) * beams:
        return totals.take(taken).reshape(shape), choices.take(taken).reshape(shape)
    score, choice = np.full(shape, DEAD), np.zeros(shape, np.int64)
    at = (taken // chosen.shape[1], place.take(taken) - 1)
    score[at], choice[at] = totals.take(taken), choices.take(taken)
    return score, choice


def _merge(  # noqa: PLR0913, PLR0917 - old, new, and what ranks them
    finished: Finished,
    places: IntArray,
    limits: Limits,
    new: BoolArray,
    candidates: tuple[FloatArray, IntArray],
    length: IntArray,
    divisor: FloatArray,
) -> Merged | None:
    """The best `width` of the old and the new finished hypotheses; few sentences have new ones in a step."""
    s = np.logical_or.reduce(new, axis=1).nonzero()[0]
    if not len(s):
        return None
    totals, choices = candidates[0][s], candidates[1][s]
    beams = int(limits.width.max())
    old = places[s], slice(beams)
    scores = np.concatenate([finished.score[old], np.where(new[s], totals / divisor[s, None], DEAD)], axis=1)
    best = (-scores).argsort(axis=1, kind="stable")[:, :beams]
    best += np.arange(0, scores.size, scores.shape[1])[:, None]
    score = scores.take(best)
    if not limits.all_as_wide:
        score[np.arange(beams) >= limits.width[s, None]] = DEAD
    total = np.concatenate([finished.total[old], totals], axis=1).take(best)
    end = np.concatenate([finished.end[old], ends_at(length[s, None], choices)], axis=1).take(best)
    return Merged(s, Finished(score, total, end))


def _no_better(
    limits: Limits, worst: FloatArray, best_live: FloatArray, length: IntArray, divisor: FloatArray
) -> BoolArray:
    """Whether nothing that still runs can change the result, by each sentence's stopping rule.

    Args:
        limits: What each request asks for.
        worst: The worst of as many finished hypotheses as are wanted; DEAD while there are fewer, (S,).
        best_live: Summed log-probability of the best live beam, (S,).
        length: Its tokens, (S,).
        divisor: What a hypothesis of that length is divided by, (S,).
    """
    full = worst > DEAD
    over: BoolArray = (best_live == DEAD) | (full & limits.when_full)
    open_ = full & ~over
    if open_.any():
        longer = limits.never & (limits.exponent > 0)
        if longer.any():
            divisor = length_divisor(np.where(longer, limits.max_new, length), limits.exponent, limits.gnmt)
        over |= open_ & (best_live / divisor <= worst)
    return over


def _is_any(token: IntArray, wanted: tuple[int, ...]) -> BoolArray:
    """Where a token is one of a few: cheaper than np.isin for one or two."""
    if not wanted:
        return np.zeros(token.shape, np.bool_)
    result: BoolArray = token == wanted[0]
    for other in wanted[1:]:
        result |= token == other
    return result
