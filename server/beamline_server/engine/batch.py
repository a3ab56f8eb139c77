"""Builds the arrays of one encoder or decoder call. Pure.

Axes: S sentences, N rows, Q query length, R source length, P slots, K beams.
"""

from collections.abc import Sequence

import numpy as np

from beamline_server.engine.beam import BoolArray, IntArray
from beamline_server.engine.runner import EncoderBatch, StepBatch

LEAST_QUERY_LENGTH = 2
"""Attention over one query takes another kernel, whose last bits differ: a lone row is computed twice instead."""


def encoder_batch(sources: Sequence[Sequence[int]], *, source_width: int) -> EncoderBatch:
    """Pack source sequences.

    Args:
        sources: Token ids of each sentence, none empty.
        source_width: R, at least the longest source.
    """
    length = np.array([len(source) for source in sources], np.int64)
    source_width = max(source_width, LEAST_QUERY_LENGTH)
    column = np.arange(source_width)
    inside = column < length[:, None]
    first = np.cumsum(length) - length
    return EncoderBatch(
        ids=np.concatenate([np.asarray(source, np.int64) for source in sources]),
        positions=np.broadcast_to(column, inside.shape)[inside],
        # Padding repeats the sentence's last row: any finite row will do, since source_length hides it.
        row_of=first[:, None] + np.minimum(column, length[:, None] - 1),
        back=np.flatnonzero(inside),
        source_length=length,
    )


def step_batch(  # noqa: PLR0913 - a step is these arrays; most of them are the graph's inputs
    *,
    token: IntArray,
    live: BoolArray,
    step: IntArray,
    slot: IntArray,
    ancestors: BoolArray,
    source_length: IntArray,
    candidates: int,
) -> StepBatch:
    """Pack live beams.

    Args:
        token: Last token of each beam, (S, K).
        live: Which beams exist, (S, K); at least one per sentence.
        step: Tokens generated so far, which is the position of the new one, (S,).
        slot: Slot of each beam's new key and value, (S, K).
        ancestors: Which slots each beam descends from, (S, 1, Q, P), with Q at least K and `LEAST_QUERY_LENGTH`.
        source_length: Tokens of each source, (S,).
        candidates: C.
    """
    sentences, beams = live.shape
    query_length = ancestors.shape[2]
    sentence, beam = np.nonzero(live)
    row = np.cumsum(live.ravel()).reshape(live.shape) - 1
    # Places of the rectangle that no beam stands at repeat a row of the sentence: finite, and thrown away.
    row_of = np.empty((sentences, query_length), np.int64)
    row_of[:, :beams] = np.maximum(row, 0)
    row_of[:, beams:] = row_of[:, :1]
    return StepBatch(
        ids=token[sentence, beam],
        positions=step[sentence],
        slot=np.stack([sentence, slot[sentence, beam]], axis=1),
        row_of=row_of,
        back=sentence * query_length + beam,
        ancestors=ancestors,
        source_length=source_length,
        candidates=candidates,
    )
