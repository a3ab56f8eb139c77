"""The state of all running sequences of a worker: one table of arrays, which one thread owns.

A sequence has an index in the table while it runs. What is of fixed size stands in its record; what grows with its
length stands in arrays beside the records, at the same index:

    sequences   (I,)         records: what was asked for, where the search stands, the rows of the next step
    ancestors   (I, K, P)    which slots each row attends to
    prefix      (I, L)       tokens that are fed before the first one is generated, decoder start included
    parents     (I, T, K)    the search so far: the hypothesis that each one of a step continues,
    tokens      (I, T, K)    the token that it adds,
    totals      (I, T, K)    and its summed log-probability
    spare       (K, P)       room for the ancestors of one sequence while they change

I indices, K hypotheses or rows of a sequence, P slots, L tokens of a prefix, T generated tokens. What may write to them
is in `search.py`, but for what a sequence starts with. `finished` and `certain` read what has been found.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.admission import MOST_ROWS
from beamline_server.engine.compiled import compiled, entry_point
from beamline_server.engine.processors import NO_TOKEN
from beamline_server.engine.request import EarlyStopping, Finish, GenerationRequest, Hypothesis, LengthPenaltyKind

DEAD = np.float32(-np.inf)
"""Score of a hypothesis that does not exist."""
_CHUNK = 64
"""The arrays grow by so many slots or tokens."""
_MAGNITUDE = 30
"""Divisors of scores stay within 10^±30, so that no finite sum overflows fp32 when it is divided."""

_SEQUENCE = np.dtype(
    [
        # The next step: its rows, and one past the highest slot in use.
        ("rows", np.int64),
        ("slots_end", np.int64),
        # Where the search stands: tokens of the prefix that are in rows or slots, generated tokens of a live
        # hypothesis, and how many are live.
        ("fed", np.int64),
        ("length", np.int64),
        ("live", np.int64),
        ("done", np.bool_),
        # What was asked for; a search that stops neither when it is full nor never stops by the heuristic.
        ("gnmt", np.bool_),
        ("when_full", np.bool_),
        ("never", np.bool_),
        ("beams", np.int64),
        ("min_new", np.int64),
        ("max_new", np.int64),
        ("exponent", np.float64),  # of the length penalty
        ("source_length", np.int64),
        ("prefix_length", np.int64),
        ("part", np.int64),  # tokens of the prefix that are fed in one step at most
        ("forced_first", np.int64),  # its own first token, or NO_TOKEN for the model's
        # Summed log-probabilities of the live hypotheses, best first.
        ("score", np.float32, MOST_ROWS),
        # Rows of the next step; those of the live hypotheses are the last ones.
        ("token", np.int64, MOST_ROWS),
        ("position", np.int64, MOST_ROWS),
        ("slot", np.int64, MOST_ROWS),
        # Finished hypotheses, best first; a score of DEAD marks an empty place.
        ("finished_score", np.float32, MOST_ROWS),
        ("finished_total", np.float32, MOST_ROWS),
        ("finished_length", np.int64, MOST_ROWS),
        ("finished_parent", np.int64, MOST_ROWS),
        ("finished_token", np.int64, MOST_ROWS),
    ],
    align=True,
)
"""A running sequence; few numbers that every step reads come first, in two lines of a processor's cache."""
_ASKED = [
    *("gnmt", "when_full", "never", "beams", "min_new", "max_new", "exponent"),
    *("source_length", "prefix_length", "part", "forced_first"),
]
"""What of it is known when it comes."""

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]


class Table(NamedTuple):
    """The arrays of all running sequences, as compiled loops take them."""

    sequences: Any
    """Records, (I,): `numpy.recarray`."""
    ancestors: BoolArray
    prefix: IntArray
    parents: NDArray[np.int32]
    tokens: NDArray[np.int32]
    totals: FloatArray
    spare: BoolArray


class SequenceTable:
    """Up to `size` running sequences.

    Attributes:
        arrays: What compiled loops work on; replaced when they grow.
    """

    def __init__(self, size: int, eos: tuple[int, ...]) -> None:
        self._eos = frozenset(eos)
        steps = (size, _CHUNK, MOST_ROWS)
        self._records = np.zeros(size, _SEQUENCE)
        self._asked = self._records[_ASKED]
        self.arrays = Table(
            sequences=self._records.view(np.recarray),
            ancestors=np.zeros((size, MOST_ROWS, _CHUNK), np.bool_),
            prefix=np.zeros((size, _CHUNK), np.int64),
            parents=np.zeros(steps, np.int32),
            tokens=np.zeros(steps, np.int32),
            totals=np.zeros(steps, np.float32),
            spare=np.zeros((MOST_ROWS, _CHUNK), np.bool_),
        )

    def enter(self, index: int, request: GenerationRequest, decoder_start: int, *, part: int = MOST_ROWS) -> None:
        """Write down what a request asks for, at a free index; `search.start` begins the search.

        `decoder_start` is the model's; `part` is how many tokens of the prefix are fed in one step at most.
        """
        start = decoder_start if request.decoder_start is None else request.decoder_start
        prefix, options = (start, *request.target_prefix), request.options
        if len(prefix) > self.arrays.prefix.shape[1]:
            self._grow(prefix=len(prefix))
        self.arrays.prefix[index, : len(prefix)] = prefix
        # All at once: to set a field of a record alone takes numpy a microsecond or more.
        self._asked[index] = (
            options.length_penalty_kind is LengthPenaltyKind.GNMT,
            # Greedy search stops at its first end of sequence, whatever the rule.
            options.beam_size == 1 or options.early_stopping is EarlyStopping.WHEN_FULL,
            options.early_stopping is EarlyStopping.NEVER,
            options.beam_size,
            options.min_new_tokens,
            options.max_new_tokens,
            bounded_exponent(options.length_penalty, options.max_new_tokens),
            len(request.source),
            len(prefix),
            part,
            NO_TOKEN if request.forced_first is None else request.forced_first,
        )

    def leave(self, index: int) -> None:
        """A sequence goes, however it ended."""
        self._records["done"][index] = False

    def done(self) -> list[int]:
        """Indices of the sequences that are over."""
        over: list[int] = self._records["done"].nonzero()[0].tolist()
        return over

    def steps(self, index: int) -> int:
        """Decoder steps that a sequence has taken."""
        sequence = self._records[index]
        return int(sequence["length"]) + -(-int(sequence["prefix_length"]) // int(sequence["part"])) - 1

    def reserve(self, *, slots: int, steps: int) -> None:
        """Have room for a step after which no sequence has more slots and generated tokens."""
        if slots > self.arrays.spare.shape[1]:
            self._grow(slots=slots)
        if steps > self.arrays.tokens.shape[1]:
            self._grow(steps=steps)

    def _grow(self, *, slots: int = 0, steps: int = 0, prefix: int = 0) -> None:
        arrays = self.arrays
        self.arrays = Table(
            sequences=arrays.sequences,
            ancestors=_grown(arrays.ancestors, 2, slots),
            prefix=_grown(arrays.prefix, 1, prefix),
            parents=_grown(arrays.parents, 1, steps),
            tokens=_grown(arrays.tokens, 1, steps),
            totals=_grown(arrays.totals, 1, steps),
            spare=_grown(arrays.spare, 1, slots),
        )

    def hypotheses(self, index: int, count: int) -> tuple[Hypothesis, ...]:
        """The best finished hypotheses of a sequence, best first: `count`, or as many as there are."""
        sequence = self._records[index]
        scores, lengths = sequence["finished_score"][:count].tolist(), sequence["finished_length"][:count].tolist()
        found = []
        for k, (score, length) in enumerate(zip(scores, lengths, strict=True)):
            if score > DEAD:
                tokens, logprobs = np.empty(length, np.int64), np.empty(length, np.float64)
                finished(self.arrays, index, k, tokens, logprobs)
                ids = tuple(tokens.tolist())
                finish = Finish.END_OF_SEQUENCE if ids[-1] in self._eos else Finish.LENGTH
                found.append(Hypothesis(ids, score, tuple(logprobs.tolist()), finish))
        return tuple(found)

    def certain(self, index: int, known: int) -> tuple[int, ...]:
        """Tokens that the best hypothesis will have after the first `known`, whatever follows.

        `known` is how many earlier calls have told; what was certain once stays so.
        """
        length = int(self.arrays.sequences[index].length)
        tokens, totals = np.empty(length, np.int64), np.empty(length, np.float32)
        return tuple(tokens[known : certain(self.arrays, index, known, tokens, totals)].tolist())


def table_bytes(size: int, *, slots: int, steps: int) -> int:
    """The memory of a table of so many sequences, each of which has so many slots and steps, and as long a prefix."""
    slots, steps = slots + _CHUNK, steps + _CHUNK
    of_each = _SEQUENCE.itemsize + MOST_ROWS * (slots + 12 * steps) + 8 * steps
    return size * of_each + MOST_ROWS * slots


def bounded_exponent(exponent: float, longest: int) -> float:
    """The length penalty, or the nearest one whose divisors fp32 can divide by for up to `longest` tokens.

    Further out all scores would be zero or infinite, and no order would be left among them.
    """
    most = _MAGNITUDE / math.log10(max(longest, 2))
    return min(max(exponent, -most), most)


def _grown(array: NDArray[Any], axis: int, needed: int) -> NDArray[Any]:
    """An array with room for as much as is needed along an axis, zeros behind what it holds."""
    more = -(-(needed - array.shape[axis]) // _CHUNK) * _CHUNK
    if more <= 0:
        return array
    return np.pad(array, [(0, more if a == axis else 0) for a in range(array.ndim)])


@compiled
def path(table: Table, index: int, length: int, hypothesis: int, tokens: IntArray, totals: FloatArray) -> None:
    """Write the first `length` tokens, and running totals, that lead to a hypothesis of that many."""
    for step in range(length - 1, -1, -1):
        tokens[step] = table.tokens[index, step, hypothesis]
        totals[step] = table.totals[index, step, hypothesis]
        hypothesis = table.parents[index, step, hypothesis]


@compiled
def finished(table: Table, index: int, k: int, tokens: IntArray, logprobs: NDArray[np.float64]) -> None:
    """Write the tokens of a finished hypothesis, and the log-probability of each, (T,)."""
    sequence, length = table.sequences[index], len(tokens)
    totals = np.empty(length, np.float32)
    path(table, index, length - 1, sequence.finished_parent[k], tokens, totals)
    tokens[length - 1], totals[length - 1] = sequence.finished_token[k], sequence.finished_total[k]
    before = 0.0
    for i in range(length):
        total = np.float64(totals[i])
        logprobs[i] = total - before
        before = total


@compiled
def certain(table: Table, index: int, known: int, tokens: IntArray, totals: FloatArray) -> int:
    """How many tokens the best hypothesis is certain to begin with, at least the first `known`; writes them.

    They are what all live hypotheses share with each other and with the best finished one: finished scores do not
    change, so no other finished hypothesis can still win.
    """
    sequence = table.sequences[index]
    step, count = sequence.length, sequence.live
    leads_on = np.zeros(MOST_ROWS, np.bool_)
    for k in range(count):
        leads_on[k] = True
    while count > 1 and step > known:
        step -= 1
        count = continued(table, index, step, leads_on)
    if count > 1:
        # Siblings that part at the last known step may still agree on a token; only wider searches could tell, and
        # waiting one step longer is right for all.
        return known
    hypothesis = 0
    while not leads_on[hypothesis]:
        hypothesis += 1
    path(table, index, step, hypothesis, tokens, totals)
    if sequence.finished_score[0] > DEAD:
        return agreed(table, index, tokens, step)
    return int(step)


@compiled
def continued(table: Table, index: int, step: int, leads_on: BoolArray) -> int:
    """Replace some hypotheses of a step, (K,), by those that they continue; returns how many these are."""
    parents = np.zeros(MOST_ROWS, np.bool_)
    for k in range(MOST_ROWS):
        if leads_on[k]:
            parents[table.parents[index, step, k]] = True
    count = 0
    for k in range(MOST_ROWS):
        leads_on[k] = parents[k]
        count += parents[k]
    return count


@compiled
def agreed(table: Table, index: int, tokens: IntArray, known: int) -> int:
    """How many of the first `known` tokens the best finished hypothesis begins with."""
    sequence = table.sequences[index]
    length = sequence.finished_length[0]
    best, totals = np.empty(length, np.int64), np.empty(length, np.float32)
    path(table, index, length - 1, sequence.finished_parent[0], best, totals)
    best[length - 1] = sequence.finished_token[0]
    count = 0
    while count < min(length, known) and best[count] == tokens[count]:
        count += 1
    return count


def example() -> Table:
    """A table as calls of compiled functions get it, for their entry points."""
    return SequenceTable(1, ()).arrays


_TOKENS, _TOTALS = np.zeros(1, np.int64), np.zeros(1, np.float32)
entry_point(finished, lambda: (example(), 0, 0, _TOKENS, np.zeros(1, np.float64)))
entry_point(certain, lambda: (example(), 0, 0, _TOKENS, _TOTALS))
