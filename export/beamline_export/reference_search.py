"""Beam search for one sentence, slow and obvious: the oracle that the engine must agree with.

It follows the same definition as `beamline_server.engine.beam` (Hugging Face `generate`), written the way one would
explain it: lists, no arrays over sentences, no slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import EarlyStopping, LengthPenaltyKind, SearchOptions

NextLogprobs = Callable[[Sequence[Sequence[int]]], NDArray[np.float32]]
"""Prefixes (each begins with the decoder start token) -> log-probabilities of their next tokens, (prefixes, V)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A continuation: the tokens generated so far, and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    total: np.float32


@dataclass(frozen=True, slots=True)
class Ranked:
    """A finished hypothesis with its length-penalized score."""

    tokens: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Step:
    """What one step decided, and how close the calls were.

    Attributes:
        beams: The hypotheses that go on, best first.
        ranked: The candidates that were looked at, best first, and one more.
        stop_margin: Difference of the two scores that decided whether the search ended here; infinite if none did.
    """

    beams: tuple[Candidate, ...]
    ranked: tuple[Candidate, ...]
    stop_margin: float

    @property
    def margin(self) -> float:
        """The least difference between two candidates that are neighbours in rank."""
        return min((float(a.total - b.total) for a, b in pairwise(self.ranked)), default=float("inf"))


@dataclass(frozen=True, slots=True)
class SearchTrace:
    """The result of a search and the way to it.

    Attributes:
        hypotheses: The finished hypotheses, best first.
        steps: One per generated token.
    """

    hypotheses: tuple[Ranked, ...]
    steps: tuple[Step, ...]


def reference_search(
    next_logprobs: NextLogprobs,
    rules: SearchRules,
    options: SearchOptions,
    decoder_start: int,
    target_prefix: Sequence[int] = (),
    *,
    forced_first: int | None = None,
) -> SearchTrace:
    """Search one sentence.

    Args:
        next_logprobs: The model.
        rules: What the model fixes: end of sequence, bans, forced tokens.
        options: How to search.
        decoder_start: First decoder input.
        target_prefix: Tokens that are given, after the decoder start; a forced first token gives way to them.
        forced_first: The first token, instead of what the rules have.
    """
    if target_prefix:
        rules = replace(rules, forced_first=None)
    elif forced_first is not None:
        rules = replace(rules, forced_first=forced_first)
    beams = [Candidate((), np.float32(0))]
    finished: list[Ranked] = []
    steps: list[Step] = []
    for step in range(options.max_new_tokens):
        logprobs = next_logprobs([(decoder_start, *target_prefix, *beam.tokens) for beam in beams])
        logprobs = np.stack([processed(row, step, rules, options) for row in logprobs])
        count = rules.candidates_per_beam * options.beam_size
        ranked = _rank(beams, logprobs, count + 1)

        length = step + 1
        at_limit = length == options.max_new_tokens
        beams = []
        for rank, candidate in enumerate(ranked[:count]):
            if candidate.tokens[-1] in rules.eos or at_limit:
                if rank < options.beam_size:
                    finished.append(Ranked(candidate.tokens, _score(candidate.total, length, options)))
            elif len(beams) < options.beam_size:
                beams.append(candidate)
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[: options.beam_size]
        ahead = _ahead(beams, finished, length, options)
        steps.append(Step(tuple(beams), tuple(ranked), abs(ahead)))
        if not beams or ahead <= 0:
            break
    return SearchTrace(tuple(finished), tuple(steps))


def processed(row: NDArray[np.float32], step: int, rules: SearchRules, options: SearchOptions) -> NDArray[np.float32]:
    """Bans and forced tokens, applied after the log-softmax."""
    row = row.copy()
    row[list(rules.banned)] = -np.inf
    if step == (0 if rules.forced_first is None else 1):
        row[list(rules.banned_at_start)] = -np.inf
    if step < options.min_new_tokens:
        row[list(rules.eos)] = -np.inf
    forced = rules.forced_first if step == 0 else None
    if step == options.max_new_tokens - 1 and rules.forced_last is not None:
        forced = rules.forced_last
    if forced is not None:
        row[:] = -np.inf
        row[forced] = 0
    return row


def _rank(beams: Sequence[Candidate], logprobs: NDArray[np.float32], count: int) -> list[Candidate]:
    """The best continuations of all beams."""
    found = []
    for beam, row in zip(beams, logprobs, strict=True):
        for token in np.argsort(-row, kind="stable")[:count]:
            if row[token] > -np.inf:
                found.append(Candidate((*beam.tokens, int(token)), np.float32(beam.total + row[token])))
    return sorted(found, key=lambda candidate: -candidate.total)[:count]


def _score(total: np.float32, length: int, options: SearchOptions) -> float:
    base = (5 + length) / 6 if options.length_penalty_kind is LengthPenaltyKind.GNMT else length
    return float(total / np.float32(base**options.length_penalty))


def _ahead(beams: Sequence[Candidate], finished: Sequence[Ranked], length: int, options: SearchOptions) -> float:
    """By how much a running beam may still beat the worst finished one; the search is over unless this is positive."""
    if not beams or len(finished) < options.beam_size:
        return float("inf")
    if options.beam_size == 1 or options.early_stopping is EarlyStopping.WHEN_FULL:
        return -float("inf")
    optimistic = options.early_stopping is EarlyStopping.NEVER and options.length_penalty > 0
    reachable = options.max_new_tokens if optimistic else length
    return _score(beams[0].total, reachable, options) - finished[-1].score
