"""What may change the candidates of a hypothesis before they are ranked, each as a small compiled function.

A backend gives the C most probable continuations of a row. A processor that takes candidates away stays exact if C
grows by as many as it may take, which `SearchRules.extra_candidates` adds up:

    processor             what it does                                             extra candidates
    banned                these tokens never occur                                 one per token
    banned at the start   these are not generated first, behind a forced one       one per token
    minimum length        no end of sequence among the first `min_new` tokens      one per end-of-sequence token
    forced token          replaces all candidates, with log-probability 0          none

They come after the log-softmax and nothing is normalized again, as in Hugging Face `generate`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.compiled import compiled

NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class SearchRules:
    """What the model fixes for every search.

    Attributes:
        eos: Tokens that end a hypothesis; without any, each has as many tokens as were asked for.
        banned: Tokens that never occur.
        banned_at_start: Tokens that are not generated first, or where a first token is forced, not right behind it.
        forced_first: The first token, whatever its score, unless the request has another or gives the target's
            beginning.
        forced_last: The token at the length limit, whatever its score.
    """

    eos: tuple[int, ...]
    banned: tuple[int, ...] = ()
    banned_at_start: tuple[int, ...] = ()
    forced_first: int | None = None
    forced_last: int | None = None

    @property
    def candidates_per_beam(self) -> int:
        """How many continuations per beam are ranked: enough that as many as there are beams do not end."""
        return max(2, 1 + len(self.eos))

    @property
    def extra_candidates(self) -> int:
        """How many candidates of a row all processors together may take away."""
        return len(self.banned) + len(self.banned_at_start) + len(self.eos)

    def needed_candidates(self, beams: int, vocabulary: int) -> int:
        """C: how many candidates per row make a search of so many beams exact."""
        return min(vocabulary, self.candidates_per_beam * beams + self.extra_candidates)

    def arrays(self) -> "Rules":
        """The same, as compiled loops take it."""
        return Rules(
            np.array(self.eos, np.int64),
            np.array(self.banned, np.int64),
            np.array(self.banned_at_start, np.int64),
            NO_TOKEN if self.forced_first is None else self.forced_first,
            NO_TOKEN if self.forced_last is None else self.forced_last,
            self.candidates_per_beam,
        )


class Rules(NamedTuple):
    """`SearchRules` as numbers and arrays."""

    eos: NDArray[np.int64]
    banned: NDArray[np.int64]
    banned_at_start: NDArray[np.int64]
    forced_first: int
    forced_last: int
    candidates_per_beam: int


@compiled
def process(rules: Rules, sequence: Any, logprob: Any, token: Any, new_logprob: Any, new_token: Any) -> int:
    """Apply all processors to the candidates of one row.

    Args:
        rules: What the model fixes.
        sequence: The record of the sequence.
        logprob: Log-probabilities, best first, (C,).
        token: Their tokens, (C,).
        new_logprob: Receives those that are left, best first, (C,).
        new_token: As new_logprob.

    Returns:
        How many are left.
    """
    forced = forced_token(rules, sequence)
    if forced != NO_TOKEN:
        new_logprob[0], new_token[0] = 0.0, forced
        return 1
    count = 0
    for c in range(len(token)):
        # What is no number counts as what cannot occur.
        if logprob[c] > -np.inf and not is_forbidden(rules, sequence, token[c]):
            new_logprob[count], new_token[count] = logprob[c], token[c]
            count += 1
    return count


@compiled
def is_forbidden(rules: Rules, sequence: Any, token: int) -> bool:
    """Whether a token may not come next: banned, banned at the start, or an end below the minimum length."""
    if is_one_of(token, rules.banned):
        return True
    starts_at = 0 if first_token(rules, sequence) == NO_TOKEN else 1
    if sequence.length == starts_at and is_one_of(token, rules.banned_at_start):
        return True
    return sequence.length < sequence.min_new and is_one_of(token, rules.eos)


@compiled
def forced_token(rules: Rules, sequence: Any) -> int:
    """The token that has to come next, or NO_TOKEN."""
    if rules.forced_last != NO_TOKEN and sequence.length + 1 == sequence.max_new:
        return rules.forced_last
    return first_token(rules, sequence) if sequence.length == 0 else NO_TOKEN


@compiled
def first_token(rules: Rules, sequence: Any) -> int:
    """The token that a sequence is forced to begin with, or NO_TOKEN: its own, the model's, none behind a prefix."""
    if sequence.prefix_length > 1:
        return NO_TOKEN
    return rules.forced_first if sequence.forced_first == NO_TOKEN else sequence.forced_first


@compiled
def is_one_of(token: int, tokens: Any) -> bool:
    """Whether a token is among some few."""
    for other in tokens:
        if token == other:
            return True
    return False
