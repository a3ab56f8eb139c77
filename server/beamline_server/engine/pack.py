"""How much running sequences need in a step, and sources as the inputs of the encoder. Compiled.

A row is one live hypothesis, one token of a prefix, or one source token. Rows of all sequences are packed one after
another, so that matrix products see no padding; attention in a graph works on a rectangle. `pad_index` says which row
stands at each place of the rectangle, `unpad_index` at which place each row stands.

Arrays may be larger than what is packed; what is left over is padding that changes nothing and stays finite.

Axes: S sources, N rows, R source positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beamline_server.engine.compiled import compiled, entry_point
from beamline_server.engine.table import IntArray, Table, example

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


class EncoderInputs(NamedTuple):
    """Inputs of the encoder.

    Attributes:
        ids: The token of each row, (N,).
        positions: Its position, (N,).
        pad_index: (S, R).
        unpad_index: (N,).
        source_length: (S,).
    """

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


_NUMBERS, _RECTANGLE = np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
entry_point(extent, lambda: (example(), _NUMBERS))
entry_point(
    pack_encoder, lambda: (_NUMBERS, _NUMBERS, EncoderInputs(_NUMBERS, _NUMBERS, _RECTANGLE, _NUMBERS, _NUMBERS))
)


def flat(sources: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """The tokens of all sources, one after another, and how many each has."""
    lengths = np.array([len(source) for source in sources], np.int64)
    return np.fromiter((token for source in sources for token in source), np.int64, int(lengths.sum())), lengths
