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
        eos: Tokens that end a hypothesis.
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
    """The options of each sentence, as arrays (S,)."""

    width: IntArray
    exponent: NDArray[np.float64]
    gnmt: BoolArray
    when_full: BoolArray
    never: BoolArray
    min_new: IntArray
    max_new: IntArray


@dataclass(frozen=True, slots=True)
class Finished:
    """The best finished hypotheses of each sentence, best first, (S, K); a score of DEAD marks an empty place.

    Attributes:
        score: The length-penalized sum of log-probabilities.
        total: The sum itself.
        end: Where the hypothesis ends, as `ends_at` packs it.
    """

    score: FloatArray
    total: FloatArray
    end: IntArray


def ends_at(length: IntArray, parent: IntArray, token: IntArray) -> IntArray:
    """The end of a hypothesis in one number: its number of tokens, the beam of its last step, its last token."""
    result: IntArray = (length << 40) | (parent << 32) | token
    return result


def end_of(packed: int) -> tuple[int, int, int]:
    """Length, parent beam and last token of a hypothesis, from what `ends_at` has packed."""
    return packed >> 40, (packed >> 32) & 0xFF, packed & 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Selection:
    """What one step decides.

    Attributes:
        score: Summed log-probability of the next beams, (S, K), best first; DEAD where there is none.
        parent: The beam that each next beam continues, (S, K).
        token: The token it adds, (S, K).
        finished: The finished hypotheses after this step.
        done: Whether the search is over, (S,).
    """

    score: FloatArray
    parent: IntArray
    token: IntArray
    finished: Finished
    done: BoolArray


def advance(  # noqa: PLR0913 - the state of a search is these things; a class around them would only rename them
    rules: SearchRules,
    limits: Limits,
    *,
    step: IntArray,
    score: FloatArray,
    finished: Finished,
    top_logprob: FloatArray,
    top_token: IntArray,
) -> Selection:
    """Advance every sentence by one token.

    Args:
        rules: What the model fixes.
        limits: What each request asks for.
        step: Tokens generated before this step, (S,).
        score: Summed log-probabilities of the live beams, (S, K); DEAD where there is none.
        finished: Finished hypotheses so far.
        top_logprob: The best continuations of each beam, best first, (S, K, C).
        top_token: Their tokens, (S, K, C).
    """
    logprob = _constrain(rules, limits, step, top_logprob, top_token)
    if rules.forced_first is not None or rules.forced_last is not None:
        logprob, top_token = _force(rules, limits, step, (logprob, top_token))
    totals, parents, tokens = _rank(score[:, :, None] + logprob, top_token, rules.candidates_per_beam * score.shape[1])

    rank = np.arange(totals.shape[1])
    exists = (totals > DEAD) & (rank < rules.candidates_per_beam * limits.width[:, None])
    length = step + 1
    at_limit = length >= limits.max_new
    ends = exists & (_is_any(tokens, rules.eos) | at_limit[:, None])

    ranked = (totals, parents, tokens)
    next_score, next_parent, next_token = _first(exists & ~ends, limits.width, score.shape[1], ranked)
    divisor = length_divisor(length, limits.exponent, limits.gnmt)
    new = ends & (rank < limits.width[:, None])
    finished = _merge(finished, limits.width, new, ranked, length, divisor)
    done = at_limit | _no_better(limits, finished, next_score[:, 0], length)
    return Selection(next_score, next_parent, next_token, finished, done)


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


def _rank(totals: FloatArray, token: IntArray, count: int) -> tuple[FloatArray, IntArray, IntArray]:
    """The best continuations of each sentence with their beams and tokens, (S, M) each."""
    sentences, beams, per_beam = totals.shape
    flat = totals.reshape(sentences, beams * per_beam)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    rows = np.arange(sentences)[:, None]
    return flat[rows, order], order // per_beam, token.reshape(flat.shape)[rows, order]


def _first(
    chosen: BoolArray, width: IntArray, beams: int, candidates: tuple[FloatArray, IntArray, IntArray]
) -> tuple[FloatArray, IntArray, IntArray]:
    """The first `width` chosen candidates of each sentence, side by side, (S, K) each."""
    place = np.cumsum(chosen, axis=1) - 1
    sentence, rank = np.nonzero(chosen & (place < width[:, None]))
    place = place[sentence, rank]
    shape = (len(chosen), beams)
    score, parent, token = np.full(shape, DEAD), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    totals, parents, tokens = candidates
    score[sentence, place] = totals[sentence, rank]
    parent[sentence, place] = parents[sentence, rank]
    token[sentence, place] = tokens[sentence, rank]
    return score, parent, token


def _merge(
    finished: Finished,
    width: IntArray,
    new: BoolArray,
    candidates: tuple[FloatArray, IntArray, IntArray],
    length: IntArray,
    divisor: FloatArray,
) -> Finished:
    """The best `width` of the old and the new finished hypotheses; few sentences have new ones in a step."""
    s = np.flatnonzero(new.any(axis=1))
    if not len(s):
        return finished
    totals, parents, tokens = candidates[0][s], candidates[1][s], candidates[2][s]
    scores = np.where(new[s], totals / divisor[s, None], DEAD)
    beams = finished.score.shape[1]
    merged = np.concatenate([finished.score[s], scores], axis=1)
    order = np.argsort(-merged, axis=1, kind="stable")[:, :beams]
    rows = np.arange(len(s))[:, None]
    best = merged[rows, order]
    best[np.arange(beams) >= width[s, None]] = DEAD
    ends = ends_at(length[s, None], parents, tokens)
    score, total, end = finished.score.copy(), finished.total.copy(), finished.end.copy()
    score[s] = best
    total[s] = np.concatenate([finished.total[s], totals], axis=1)[rows, order]
    end[s] = np.concatenate([finished.end[s], ends], axis=1)[rows, order]
    return Finished(score, total, end)


def _no_better(limits: Limits, finished: Finished, best_live: FloatArray, length: IntArray) -> BoolArray:
    """Whether nothing that still runs can change the result, by each sentence's stopping rule."""
    worst = finished.score[np.arange(len(length)), limits.width - 1]
    full = worst > DEAD
    over: BoolArray = (best_live == DEAD) | (full & limits.when_full)
    open_ = full & ~over
    if open_.any():
        reachable = np.where(limits.never & (limits.exponent > 0), limits.max_new, length)
        over |= open_ & (best_live / length_divisor(reachable, limits.exponent, limits.gnmt) <= worst)
    return over


def _is_any(token: IntArray, wanted: tuple[int, ...]) -> BoolArray:
    """Where a token is one of a few: cheaper than np.isin for one or two."""
    result: BoolArray = token == wanted[0]
    for other in wanted[1:]:
        result |= token == other
    return result
