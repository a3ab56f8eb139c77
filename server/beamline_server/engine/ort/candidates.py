"""The best continuations of each row, from the scores that a decoder gives all tokens: compiled, a row at a time.

Three readings of a row, in blocks of 64 tokens: the largest number of each block; the sum that log-softmax divides by;
and the best tokens, which most blocks cannot have, since their largest number is not above the worst one found so far.
Of equal numbers the lower token comes first. Sums go in one order, in vectors of 16: a row's result depends on nothing
but its own numbers.

Axes: N rows, V vocabulary, C candidates, B blocks of a row.
"""

from typing import NamedTuple

import numpy as np

from beamline_server.engine.compiled import compiled, entry_point
from beamline_server.engine.ort.vectors import LANES, add, exponential, larger, largest, load, splat, total, zero
from beamline_server.engine.table import DEAD, FloatArray, IntArray

_BLOCK = 64


class Room(NamedTuple):
    """Room for one row.

    Attributes:
        largest: The largest number of each block, (B,).
        rest: The last tokens of a row that fill no block, and what cannot occur behind them, (64,).
    """

    largest: FloatArray
    rest: FloatArray


class Candidates(NamedTuple):
    """The best continuations of each row, best first.

    Attributes:
        logprob: Their log-probabilities, (N, C).
        token: Their tokens, (N, C).
    """

    logprob: FloatArray
    token: IntArray


def empty(rows: int, count: int) -> Candidates:
    """Memory for so many candidates of each row."""
    return Candidates(np.empty((rows, count), np.float32), np.empty((rows, count), np.int64))


def room(vocabulary: int) -> Room:
    """Room for rows of so many tokens."""
    return Room(np.zeros(-(-vocabulary // _BLOCK), np.float32), np.zeros(_BLOCK, np.float32))


@compiled
def find_best(logits: FloatArray, room: Room, into: Candidates) -> None:
    """Write the candidates of each row.

    A row with an infinite number, or with what is no number, has log-probabilities that are no numbers. What is minus
    infinity is left out.

    Args:
        logits: Scores of all tokens, (>= N, V).
        room: To work in.
        into: Receives the candidates.
    """
    vocabulary = logits.shape[1]
    row = logits.reshape(-1)
    for n in range(len(into.token)):
        first, best = n * vocabulary, into.logprob[n]
        most, log_sum = log_partition(row, first, vocabulary, room)
        choose(row, first, vocabulary, room, best, into.token[n])
        for c in range(len(best)):
            best[c] = (best[c] - most) - log_sum


@compiled
def log_probabilities(logits: FloatArray, room: Room, into: FloatArray) -> None:
    """Write the log-probabilities of all tokens, (N, V), as `find_best` has them of the best."""
    vocabulary = logits.shape[1]
    row = logits.reshape(-1)
    for n in range(len(into)):
        most, log_sum = log_partition(row, n * vocabulary, vocabulary, room)
        for token in range(vocabulary):
            into[n, token] = (logits[n, token] - most) - log_sum


@compiled
def choose(row: FloatArray, first: int, vocabulary: int, room: Room, best: FloatArray, tokens: IntArray) -> None:
    """Write the largest numbers of a row, and where they are, once the largest of each block is known."""
    for c in range(len(best)):
        best[c], tokens[c] = DEAD, 0
    for block in range(len(room.largest)):
        if room.largest[block] > best[-1]:
            insert(room.largest[block], block, best, tokens)
    # As many numbers as are wanted are at least this large.
    least = best[-1]
    for c in range(len(best)):
        best[c], tokens[c] = DEAD, 0
    for block in range(len(room.largest)):
        if room.largest[block] >= least:
            for place in range(block * _BLOCK, min((block + 1) * _BLOCK, vocabulary)):
                number = row[first + place]
                if number >= least and number > best[-1]:
                    insert(number, place, best, tokens)


@compiled
def log_partition(row: FloatArray, first: int, vocabulary: int, room: Room) -> tuple[np.float32, np.float32]:
    """The largest number of a row, and the logarithm of the sum of exponentials of what all are above it.

    Writes the largest number of each block, too.
    """
    whole = vocabulary // _BLOCK
    for place in range(_BLOCK):
        at = whole * _BLOCK + place
        room.rest[place] = row[first + at] if at < vocabulary else DEAD
    most = DEAD
    for block in range(len(room.largest)):
        if block < whole:
            room.largest[block] = largest_of(row, first + block * _BLOCK)
        else:
            room.largest[block] = largest_of(room.rest, 0)
        most = max(most, room.largest[block])
    below, summed = splat(-most), zero()
    for at in range(first, first + whole * _BLOCK, LANES):
        summed = add(summed, exponential(add(load(row, at), below)))
    if whole < len(room.largest):
        for at in range(0, _BLOCK, LANES):
            # What is filled up adds e^-87, which changes no sum from 1 on.
            summed = add(summed, exponential(add(load(room.rest, at), below)))
    return most, np.float32(np.log(np.float64(total(summed))))


@compiled
def largest_of(numbers: FloatArray, first: int) -> np.float32:
    """The largest number of a block."""
    low = larger(load(numbers, first), load(numbers, first + LANES))
    high = larger(load(numbers, first + 2 * LANES), load(numbers, first + 3 * LANES))
    found: np.float32 = largest(larger(low, high))
    return found


@compiled
def insert(number: np.float32, token: int, best: FloatArray, tokens: IntArray) -> None:
    """Put a number that is above the worst of the best in its place, behind those that equal it."""
    c = len(best) - 1
    while c > 0 and best[c - 1] < number:
        best[c], tokens[c] = best[c - 1], tokens[c - 1]
        c -= 1
    best[c], tokens[c] = number, token


_LOGITS = np.zeros((1, 1), np.float32)
entry_point(log_probabilities, lambda: (_LOGITS, room(1), _LOGITS))
