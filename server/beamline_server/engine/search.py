"""One step of the search of one sequence: plain loops, compiled.

    the rows of a sequence have run → rank their candidates → finish or continue each → rows and slots of the next step

The definition is Hugging Face `generate`'s (transformers 5.x, `_beam_search`): per step the best
`max(2, 1 + #eos) * beams` continuations of all live hypotheses are ranked by their summed log-probability; those among
the first `beams` that end are finished hypotheses; the first `beams` that do not end live on. Greedy search is a search
of one beam. Its slow twin, written for reading, is `beamline_export.reference_search`.

Ranking is stable: of equal scores the better-ranked hypothesis, then its better candidate wins. So a sequence's answer
depends on nothing but its own scores.

A hypothesis is a set of slots, its ancestors, in the key-value pool of its sequence. A step writes the key and value of
every row into a free slot, and nothing is moved when hypotheses are reordered:

    hypothesis 0   slots {0, 1, 4}     after a step in which both continue hypothesis 1:
    hypothesis 1   slots {0, 2, 3}     0 has {0, 2, 3, 1}, 1 has {0, 2, 3, 4}: the slots 1 and 4, which no live
                                       hypothesis descends from any more, are used again, lowest first

So slot numbers depend on the sequence's own history alone, and so do the last bits of its attention, which sums in
slot order.
"""

from typing import Any, NamedTuple

import numpy as np

from beamline_server.engine.admission import MOST_ROWS
from beamline_server.engine.compiled import compiled, entry_point
from beamline_server.engine.processors import Rules, SearchRules, is_one_of, process
from beamline_server.engine.table import DEAD, BoolArray, FloatArray, IntArray, Table, example


class Room(NamedTuple):
    """Room for the candidates of one sequence while they are ranked.

    Attributes:
        logprob: What the processors leave of each hypothesis' candidates, best first, (K, C).
        token: Their tokens, (K, C).
        left: How many they leave, (K,).
        head: Which of them is the best that has not been ranked, (K,).
        total: Summed log-probabilities of the ranked continuations, best first, (M,).
        parent: The hypothesis that each of them continues, (M,).
        chosen: The token that it adds, (M,).
    """

    logprob: FloatArray
    token: IntArray
    left: IntArray
    head: IntArray
    total: FloatArray
    parent: IntArray
    chosen: IntArray


@compiled
def decide(rules: Rules, table: Table, members: IntArray, logprob: FloatArray, token: IntArray) -> int:
    """Advance sequences by what their rows came to.

    Args:
        rules: What the model fixes.
        table: The running sequences; those that are over are marked as done.
        members: Indices of the sequences whose rows these are, in order.
        logprob: The best log-probabilities of each row, best first, (N, C).
        token: Their tokens, (N, C).

    Returns:
        How many of them are over.
    """
    room = Room(
        np.empty((MOST_ROWS, token.shape[1]), np.float32),
        np.empty((MOST_ROWS, token.shape[1]), np.int64),
        np.empty(MOST_ROWS, np.int64),
        np.empty(MOST_ROWS, np.int64),
        np.empty(MOST_ROWS * rules.candidates_per_beam, np.float32),
        np.empty(MOST_ROWS * rules.candidates_per_beam, np.int64),
        np.empty(MOST_ROWS * rules.candidates_per_beam, np.int64),
    )
    end, over = 0, 0
    for index in members:
        sequence = table.sequences[index]
        end += sequence.rows
        if sequence.fed < sequence.prefix_length:
            feed(table, index)
        else:
            first = end - sequence.live
            advance(rules, table, index, logprob[first:end], token[first:end], room)
            over += sequence.done
    return over


@compiled
def start(table: Table, index: int) -> None:
    """Begin the search that a record asks for: one live hypothesis, and the first rows of the prefix."""
    sequence = table.sequences[index]
    sequence.fed = sequence.length = sequence.slots_end = 0
    sequence.live, sequence.done = 1, False
    sequence.score[0] = 0.0
    for k in range(MOST_ROWS):
        sequence.finished_score[k] = DEAD
        for p in range(table.ancestors.shape[2]):
            table.ancestors[index, k, p] = False
    feed(table, index)


@compiled
def feed(table: Table, index: int) -> None:
    """Make rows of the next tokens of the prefix, in consecutive slots: each attends to itself and to all before it."""
    sequence = table.sequences[index]
    sequence.rows = min(sequence.part, sequence.prefix_length - sequence.fed)
    for row in range(sequence.rows):
        position = sequence.fed + row
        sequence.token[row] = table.prefix[index, position]
        sequence.position[row] = sequence.slot[row] = position
        for p in range(position + 1):
            table.ancestors[index, row, p] = True
    sequence.fed += sequence.rows
    sequence.slots_end = sequence.fed


@compiled
def advance(rules: Rules, table: Table, index: int, logprob: FloatArray, token: IntArray, room: Room) -> None:
    """Advance one sequence by a token.

    Args:
        rules: What the model fixes.
        table: The running sequences.
        index: Of the sequence.
        logprob: The best log-probabilities of its live hypotheses, best first, (live, C).
        token: Their tokens, (live, C).
        room: To work in.
    """
    sequence = table.sequences[index]
    ranked = rank(rules, sequence, logprob, token, room)
    length = sequence.length + 1
    at_limit = length >= sequence.max_new
    divisor = length_divisor(length, sequence.exponent, sequence.gnmt)
    live = 0
    for r in range(ranked):
        if at_limit or is_one_of(room.chosen[r], rules.eos):
            if r < sequence.beams:
                finish(sequence, length, room.total[r], room.total[r] / divisor, room.parent[r], room.chosen[r])
        elif live < sequence.beams:
            # Those that live on move to the front: no place is written before it has been read.
            room.total[live], room.parent[live], room.chosen[live] = room.total[r], room.parent[r], room.chosen[r]
            live += 1
    for k in range(live):
        sequence.score[k] = table.totals[index, length - 1, k] = room.total[k]
        table.parents[index, length - 1, k] = room.parent[k]
        table.tokens[index, length - 1, k] = room.chosen[k]
    sequence.length = length
    sequence.done = at_limit or is_over(sequence, live, divisor)
    take_slots(table, index, live, room.parent)
    for k in range(live):
        sequence.token[k] = room.chosen[k]
        sequence.position[k] = sequence.prefix_length + length - 1


@compiled
def rank(rules: Rules, sequence: Any, logprob: FloatArray, token: IntArray, room: Room) -> int:
    """Write the best continuations of all live hypotheses into the room, best first; returns how many.

    The candidates of each hypothesis come best first, and adding its score keeps their order: so the best of all is
    always one of those that come first, and the whole is a merge of sorted lists.
    """
    for k in range(sequence.live):
        room.head[k] = 0
        room.left[k] = process(rules, sequence, logprob[k], token[k], room.logprob[k], room.token[k])
    ranked = 0
    while ranked < rules.candidates_per_beam * sequence.beams:
        best, parent = DEAD, -1
        for k in range(sequence.live):
            if room.head[k] < room.left[k]:
                total = sequence.score[k] + room.logprob[k, room.head[k]]
                if total > best:
                    best, parent = total, k
        if parent < 0:
            break
        room.total[ranked], room.parent[ranked] = best, parent
        room.chosen[ranked] = room.token[parent, room.head[parent]]
        room.head[parent] += 1
        ranked += 1
    return ranked


@compiled
def finish(sequence: Any, length: int, total: np.float32, score: np.float32, parent: int, token: int) -> None:
    """Put a hypothesis among the best finished ones, as many as there are beams; of equals the older comes first."""
    place = sequence.beams
    while place > 0 and sequence.finished_score[place - 1] < score:
        place -= 1
    for k in range(sequence.beams - 1, place, -1):
        sequence.finished_score[k] = sequence.finished_score[k - 1]
        sequence.finished_total[k] = sequence.finished_total[k - 1]
        sequence.finished_length[k] = sequence.finished_length[k - 1]
        sequence.finished_parent[k] = sequence.finished_parent[k - 1]
        sequence.finished_token[k] = sequence.finished_token[k - 1]
    if place < sequence.beams:
        sequence.finished_score[place], sequence.finished_total[place] = score, total
        sequence.finished_length[place], sequence.finished_parent[place] = length, parent
        sequence.finished_token[place] = token


@compiled
def is_over(sequence: Any, live: int, divisor: np.float32) -> bool:
    """Whether nothing that lives can change the result, by the sequence's rule of stopping."""
    if live == 0:
        return True
    worst = sequence.finished_score[sequence.beams - 1]
    if worst == DEAD:
        return False
    if sequence.when_full:
        return True
    if sequence.never and sequence.exponent > 0:
        divisor = length_divisor(sequence.max_new, sequence.exponent, sequence.gnmt)
    return bool(sequence.score[0] / divisor <= worst)


@compiled
def length_divisor(length: int, exponent: float, gnmt: bool) -> np.float32:
    """What divides the summed log-probabilities of a hypothesis of so many tokens, end-of-sequence included.

    n^p (Hugging Face `generate`), or ((5 + n) / 6)^p where `gnmt` is set (Wu et al. 2016, eq. 14).
    """
    base = (5.0 + length) / 6.0 if gnmt else float(length)
    # Divided in fp32, as Hugging Face divides: the same operands give the same bits.
    return np.float32(base**exponent)


@compiled
def take_slots(table: Table, index: int, live: int, parent: IntArray) -> None:
    """Let each live hypothesis continue its parent, in a row of its own whose token takes the lowest free slot.

    Args:
        table: The running sequences.
        index: Of the sequence.
        live: How many hypotheses live from now on.
        parent: The hypothesis that each of them continues, (K,).
    """
    sequence = table.sequences[index]
    first, ancestors, spare = sequence.rows - sequence.live, table.ancestors[index], table.spare
    # Slots from the highest in use on are free, so this many hold all that is in use and a free one for each.
    end = sequence.slots_end + live
    for k in range(live):
        for p in range(end):
            spare[k, p] = ancestors[first + parent[k], p]
    slot = 0
    for k in range(live):
        while is_taken(spare, live, slot):
            slot += 1
        spare[k, slot] = True
        sequence.slot[k] = slot
    for k in range(max(live, sequence.rows)):
        for p in range(end):
            ancestors[k, p] = k < live and spare[k, p]
    while end > 0 and not is_taken(spare, live, end - 1):
        end -= 1
    sequence.rows = sequence.live = live
    sequence.slots_end = end


@compiled
def is_taken(ancestors: BoolArray, live: int, slot: int) -> bool:
    """Whether a live hypothesis descends from a slot."""
    for k in range(live):
        if ancestors[k, slot]:
            return True
    return False


_MEMBERS, _LOGPROB, _TOKEN = np.zeros(1, np.int64), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int64)
entry_point(decide, lambda: (SearchRules(()).arrays(), example(), _MEMBERS, _LOGPROB, _TOKEN))
entry_point(start, lambda: (example(), 0))
entry_point(feed, lambda: (example(), 0))
