"""Writes the running sequences, or the sources of newcomers, into the input arrays of a graph. Compiled.

A row is one live hypothesis, one token of a prefix, or one source token. Rows of all sequences are packed one after
another, so that matrix products see no padding; attention alone works on a rectangle, of S batch indices with Q rows
each. `pad_index` says which row stands at each place of the rectangle, `unpad_index` at which place each row stands.

The arrays may be larger than what is packed; what is left over is padding that changes nothing and stays finite, since
caches hold finite numbers only. Then batch index 0 belongs to nobody: padding rows write their keys and values there.

Axes: S batch indices, N rows, Q rows of a sequence, P slots, R source positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.compiled import compiled
from beamline_server.engine.table import IntArray, Table

LEAST_QUERIES = 2
"""Attention over one query takes another kernel, whose last bits differ: a lone row is computed twice instead."""


class Extent(NamedTuple):
    """How much some sequences need in a step.

    Attributes:
        rows: N.
        queries: Q, without padding.
        slots: P, one past the highest slot in use.
        source_length: R.
        beams: Of the widest search.
        length: Generated tokens of the longest.
    """

    rows: int
    queries: int
    slots: int
    source_length: int
    beams: int
    length: int


class StepInputs(NamedTuple):
    """Inputs of the decoder step but for its caches.

    Attributes:
        ids: The token of each row, (N,).
        positions: Its position, (N,).
        slot: Batch index and slot of its key and value, and zeros, (N, 2 or 3).
        pad_index: (S, Q).
        unpad_index: (N,).
        mask: Which slots each query attends to, (S, Q, P), as `attended` and `masked`.
        source_length: (S,).
    """

    ids: IntArray
    positions: IntArray
    slot: IntArray
    pad_index: IntArray
    unpad_index: IntArray
    mask: NDArray[Any]
    source_length: IntArray


class EncoderInputs(NamedTuple):
    """Inputs of the encoder, as in `StepInputs`; R positions are the queries of a source."""

    ids: IntArray
    positions: IntArray
    pad_index: IntArray
    unpad_index: IntArray
    source_length: IntArray


@compiled
def extent(table: Table, members: IntArray) -> Extent:
    """What some sequences need in the next step."""
    rows, queries, slots, source_length, beams, length = 0, 0, 0, 0, 0, 0
    for index in members:
        sequence = table.sequences[index]
        rows += sequence.rows
        queries = max(queries, sequence.rows)
        slots = max(slots, sequence.slots_end)
        source_length = max(source_length, sequence.source_length)
        beams = max(beams, sequence.beams)
        length = max(length, sequence.length)
    return Extent(rows, queries, slots, source_length, beams, length)


@compiled
def widths(table: Table, indices: IntArray) -> IntArray:
    """Slots or source positions of each of some sequences, whichever are more."""
    result = np.empty(len(indices), np.int64)
    for i in range(len(indices)):
        sequence = table.sequences[indices[i]]
        result[i] = max(sequence.slots_end, sequence.source_length)
    return result


@compiled
def pack_step(
    table: Table, members: IntArray, batch_index: IntArray, attended: Any, masked: Any, into: StepInputs
) -> None:
    """Write the rows of some sequences.

    Args:
        table: The running sequences.
        members: Indices of those that are meant, (M,).
        batch_index: The place of each of them in the batch, (M,).
        attended: What the mask holds for a slot that a row descends from,
        masked: and for others.
        into: The inputs.
    """
    queries = into.pad_index.shape[1]
    into.pad_index[:] = 0
    into.source_length[:] = 1
    into.mask[:] = masked
    into.mask[:, :, 0] = attended
    first = 0
    for m in range(len(members)):
        index, b = members[m], batch_index[m]
        sequence = table.sequences[index]
        into.source_length[b] = sequence.source_length
        for query in range(queries):
            # Places at which no row stands repeat the sequence's first one: finite, and thrown away.
            r = query if query < sequence.rows else 0
            into.pad_index[b, query] = first + r
            write_mask(table.ancestors[index, r], attended, masked, into.mask[b, query])
        for r in range(sequence.rows):
            row = first + r
            into.ids[row], into.positions[row] = sequence.token[r], sequence.position[r]
            into.slot[row, 0], into.slot[row, 1] = b, sequence.slot[r]
            into.unpad_index[row] = b * queries + r
        first += sequence.rows
    into.ids[first:] = 0
    into.positions[first:] = 0
    into.slot[first:, :2] = 0
    into.unpad_index[first:] = 0


@compiled
def write_mask(ancestors: Any, attended: Any, masked: Any, mask: Any) -> None:
    """Write the mask of one query, (P,), from the ancestors of its row, of which there may be more or fewer."""
    for slot in range(min(len(ancestors), len(mask))):
        mask[slot] = attended if ancestors[slot] else masked


@compiled
def pack_encoder(ids: IntArray, lengths: IntArray, into: EncoderInputs) -> None:
    """Write sources.

    Args:
        ids: The tokens of all sources, one after another.
        lengths: Tokens of each, none 0.
        into: The inputs.
    """
    width = into.pad_index.shape[1]
    into.pad_index[:] = 0
    into.source_length[:] = 1
    first = 0
    for b in range(len(lengths)):
        length = lengths[b]
        into.source_length[b] = length
        for column in range(width):
            # Padding repeats the last row: any finite row will do, since source_length hides it.
            into.pad_index[b, column] = first + min(column, length - 1)
        for column in range(length):
            row = first + column
            into.ids[row], into.positions[row] = ids[row], column
            into.unpad_index[row] = b * width + column
        first += length
    into.ids[first:] = 0
    into.positions[first:] = 0
    into.unpad_index[first:] = 0


def flat(sources: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """The tokens of all sources, one after another, and how many each has."""
    lengths = np.array([len(source) for source in sources], np.int64)
    return np.fromiter((token for source in sources for token in source), np.int64, int(lengths.sum())), lengths
