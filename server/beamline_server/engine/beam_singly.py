"""The step of `beam.advance` for few sentences, one after the other.

`advance` is some forty NumPy calls however few sentences there are. For up to `SINGLY_UP_TO` of them, loops over the
same numbers cost less (docs/performance.md) and find the same: sums are made in fp32 by the same array operation, and
the quotient of two fp32 numbers, rounded from fp64, is their fp32 quotient (Figueroa 1995, "When is double rounding
innocuous?": 53 bits are twice 24 and two more).
"""

from collections.abc import Collection

import numpy as np

from beamline_server.engine.beam import (
    DEAD,
    Finished,
    IntArray,
    Limits,
    Merged,
    SearchRules,
    Selection,
    choice_of,
    ends_at,
)
from beamline_server.engine.scoring import FloatArray, length_divisor

SINGLY_UP_TO = 2
"""Sentences of a lane up to which this is faster than `advance`."""

_DEAD = float(DEAD)
_Candidate = tuple[float, int, int]
"""A continuation of a live beam: its total, the beam, the token."""


def advance_singly(  # noqa: PLR0913 - as `advance`
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
    """As `advance`, and with the same result but for what stands beside dead scores."""
    sentences, beams = score.shape
    totals, tokens = (score[:, :, None] + top_logprob).tolist(), top_token.tolist()
    next_score, next_choice = np.full((sentences, beams), DEAD), np.zeros((sentences, beams), np.int64)
    done = np.zeros(sentences, np.bool_)
    merged: list[tuple[int, Finished]] = []
    for s, before in enumerate(step.tolist()):
        width, length = int(limits.width[s]), before + 1
        forced = _forced(rules, limits, s, before)
        if forced is None:
            ranked = _ranked(totals[s], tokens[s], _banned(rules, limits, s, before))
        else:
            ranked = _ranked([[total] for total in score[s].tolist()], [[forced]] * beams, ())
        del ranked[rules.candidates_per_beam * width :]
        at_limit = length >= limits.max_new[s]
        ending = [candidate for candidate in ranked[:width] if at_limit or candidate[2] in rules.eos]
        going = [] if at_limit else [candidate for candidate in ranked if candidate[2] not in rules.eos][:width]
        if going:
            next_score[s, : len(going)] = [total for total, _, _ in going]
            next_choice[s, : len(going)] = [choice_of(beam, token) for _, beam, token in going]
        if ending:
            best = _merged(finished, int(places[s]), limits, s, ending, length)
            merged.append((s, best))
            worst = float(best.score[width - 1])
        else:
            worst = float(finished.score[places[s], width - 1])
        done[s] = at_limit or _no_better(limits, s, worst, going[0][0] if going else _DEAD, length)
    return Selection(next_score, next_choice, _stacked(merged), done)


def _forced(rules: SearchRules, limits: Limits, s: int, before: int) -> int | None:
    """The token that replaces all candidates of a sentence in this step."""
    if rules.forced_last is not None and before + 1 == limits.max_new[s]:
        return rules.forced_last
    return rules.forced_first if before == 0 else None


def _banned(rules: SearchRules, limits: Limits, s: int, before: int) -> Collection[int]:
    banned = rules.banned
    if before < limits.min_new[s]:
        banned += rules.eos
    if before == 0:
        banned += rules.banned_at_start
    return banned


def _ranked(totals: list[list[float]], tokens: list[list[int]], banned: Collection[int]) -> list[_Candidate]:
    """All candidates that exist, best first; of equals the lower beam's, then the one that stands first."""
    # What is not a number is greater than nothing.
    candidates = [
        (total, beam, token)
        for beam, (row, names) in enumerate(zip(totals, tokens, strict=True))
        for total, token in zip(row, names, strict=True)
        if total > _DEAD and token not in banned
    ]
    candidates.sort(key=_total, reverse=True)
    return candidates


def _total(candidate: _Candidate) -> float:
    return candidate[0]


def _merged(finished: Finished, place: int, limits: Limits, s: int, ending: list[_Candidate], length: int) -> Finished:
    """The best of the old and the new finished hypotheses of a sentence, (K,) each."""
    beams, width, divisor = int(limits.width.max()), int(limits.width[s]), _divisor(limits, s, length)
    old = zip(
        finished.score[place, :beams].tolist(),
        finished.total[place, :beams].tolist(),
        finished.end[place, :beams].tolist(),
        strict=True,
    )
    new = ((_fp32(total / divisor), total, ends_at(length, choice_of(beam, token))) for total, beam, token in ending)
    best = sorted([*old, *new], key=lambda hypothesis: hypothesis[0], reverse=True)[:beams]
    score = np.array([score for score, _, _ in best], np.float32)
    score[width:] = DEAD
    return Finished(score, np.array([each[1] for each in best], np.float32), np.array([each[2] for each in best]))


def _no_better(limits: Limits, s: int, worst: float, best_live: float, length: int) -> bool:
    """Whether nothing that still runs can change the result; as `beam._no_better`."""
    if best_live == _DEAD:
        return True
    if worst == _DEAD:
        return False
    if limits.when_full[s]:
        return True
    longest = int(limits.max_new[s]) if limits.never[s] and limits.exponent[s] > 0 else length
    return _fp32(best_live / _divisor(limits, s, longest)) <= worst


def _divisor(limits: Limits, s: int, length: int) -> float:
    if limits.all_mean:
        return float(length)
    one = slice(s, s + 1)
    return float(length_divisor(np.array([length]), limits.exponent[one], limits.gnmt[one])[0])


def _fp32(value: float) -> float:
    return float(np.float32(value))


def _stacked(merged: list[tuple[int, Finished]]) -> Merged | None:
    if not merged:
        return None
    finished = [each for _, each in merged]
    return Merged(
        np.array([s for s, _ in merged]),
        Finished(
            np.stack([each.score for each in finished]),
            np.stack([each.total for each in finished]),
            np.stack([each.end for each in finished]),
        ),
    )
