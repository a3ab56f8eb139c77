"""Writes rows into the inputs of a decoder step whose attention works on rectangles. Compiled.

A rectangle has S batch indices with Q rows each. The arrays may be larger than what is packed: then batch index 0
belongs to nobody, and padding rows write their keys and values there. What comes of padding is finite, since caches
hold finite numbers only, and nobody reads it.

Axes: S batch indices, N rows, Q rows of a sequence, P slots.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.compiled import compiled, entry_point
from beamline_server.engine.table import IntArray, Table, example

_MASKED = np.float16(-1e4)
"""What an additive mask adds where a row has no ancestor: finite, so that a row without any gives no NaN in fp16."""
MASK_VALUES: dict[np.dtype[Any], tuple[Any, Any]] = {
    np.dtype(np.bool_): (True, False),
    # As bits: neither NumPy nor compiled loops have fast arithmetic for half precision.
    np.dtype(np.uint16): (np.uint16(0), _MASKED.view(np.uint16)),
}
"""What the mask holds for slots that are attended to, and for others."""


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


def _example(mask: Any) -> tuple[Any, ...]:
    numbers, rectangle = np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
    inputs = StepInputs(numbers, numbers, rectangle, rectangle, numbers, mask, numbers)
    attended, masked = MASK_VALUES[mask.dtype]
    return example(), numbers, numbers, attended, masked, inputs


entry_point(widths, lambda: (example(), np.zeros(1, np.int64)))
entry_point(pack_step, lambda: _example(np.zeros((1, 1, 1), np.bool_)))
entry_point(pack_step, lambda: _example(np.zeros((1, 1, 1), np.uint16)))
