"""Writes a batch into the larger arrays that its bucket has, so that what is added changes nothing and stays finite.

Seat 0 of a cache belongs to nobody. Padding rows write their keys and values there, all the same ones into the same
slot; they attend from there, to it and to a source of one position. Padding seats attend to their first slot. What
comes of all this is finite, since caches hold finite numbers only, and nobody reads it.

Letters as in runner.py; S, Q, N, P, R here are the bucket's, at least as large as the batch's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.beam import IntArray
from beamline_server.engine.runner import EncoderBatch, StepBatch

NOBODYS_SEAT = 0
_MASKED = np.float16(-1e4)
"""What an additive mask adds where a beam has no ancestor: finite, so that a row without any gives no NaN in fp16."""
_ADDED = np.array([_MASKED, 0], np.float16).view(np.uint16)
"""By whether a slot is an ancestor. As bits: NumPy has no fast arithmetic for half precision."""


def fill_step(into: Mapping[str, NDArray[Any]], batch: StepBatch, seat: IntArray) -> None:
    """Write a step.

    Args:
        into: The bucket's inputs by name: ids, positions and back (N,), slot (N, 2) or (N, 1, 3) with a last zero,
            row_of (S, Q), ancestors (S, 1, Q, P) boolean or fp16 and then additive, source_length (S,).
        batch: The step.
        seat: Where each sentence of the batch sits, none at `NOBODYS_SEAT`.
    """
    rows = len(batch.ids)
    beams = batch.row_of.shape[1]
    query_length = into["row_of"].shape[1]
    sentence, beam = np.divmod(batch.back, beams)
    for name, present in (("ids", batch.ids), ("positions", batch.positions)):
        into[name][:rows] = present
        into[name][rows:] = 0
    slot = into["slot"].reshape(len(into["slot"]), -1)
    slot[:rows, 0] = seat[batch.slot[:, 0]]
    slot[:rows, 1] = batch.slot[:, 1]
    slot[rows:] = NOBODYS_SEAT, *([0] * (slot.shape[1] - 1))
    into["back"][:rows] = seat[sentence] * query_length + beam
    into["back"][rows:] = NOBODYS_SEAT * query_length
    row_of = into["row_of"]
    row_of[:] = 0
    row_of[seat, :beams] = batch.row_of
    row_of[seat, beams:] = batch.row_of[:, :1]
    _fill_mask(into["ancestors"], batch.ancestors, seat)
    into["source_length"][:] = 1
    into["source_length"][seat] = batch.source_length


def _fill_mask(mask: NDArray[Any], ancestors: NDArray[np.bool_], seat: IntArray) -> None:
    _, _, beams, slots = ancestors.shape
    if mask.dtype == np.bool_:
        mask[:] = False
        mask[..., 0] = True
        mask[seat, :, :beams, :slots] = ancestors
    else:
        bits = mask.view(np.uint16)
        bits[:] = _ADDED[0]
        bits[..., 0] = _ADDED[1]
        bits[seat, :, :beams, :slots] = _ADDED[ancestors.view(np.uint8)]


def fill_encoder(into: Mapping[str, NDArray[Any]], batch: EncoderBatch) -> None:
    """Write an encoder call; `into` is by name: ids, positions and back (N,), row_of (S, R), source_length (S,)."""
    rows = len(batch.ids)
    sentences, width = batch.row_of.shape
    for name, present in (("ids", batch.ids), ("positions", batch.positions)):
        into[name][:rows] = present
        into[name][rows:] = 0
    sentence, column = np.divmod(batch.back, width)
    into["back"][:rows] = sentence * into["row_of"].shape[1] + column
    into["back"][rows:] = 0
    row_of = into["row_of"]
    row_of[:] = 0
    row_of[:sentences, :width] = batch.row_of
    row_of[:sentences, width:] = batch.row_of[:, :1]
    into["source_length"][:sentences] = batch.source_length
    into["source_length"][sentences:] = 1
