"""Builds the arrays of one encoder or decoder call. Pure.

Axes: S sentences, N rows, Q query length, R source length, P slots, K beams.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beamline_server.engine.beam import BoolArray, IntArray
from beamline_server.engine.runner import EncoderBatch, StepBatch
from beamline_server.engine.scoring import FloatArray

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


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows the live beams of a step become, and where they stand in the attention rectangle.

    It stays the same until a sentence comes or goes or a beam dies or is born.

    Attributes:
        live: Which beams exist, (S, K).
        rows: Their numbers, counted sentence by sentence, dead ones included, (N,).
        sentence: Their sentences, (N,).
        row_of: The row at each place of the rectangle, (S, Q).
        back: The place of each row, (N,).
    """

    live: BoolArray
    rows: IntArray
    sentence: IntArray
    row_of: IntArray
    back: IntArray


def layout(live: BoolArray) -> Layout:
    """Pack live beams, (S, K), at least one per sentence, into rows."""
    sentences, beams = live.shape
    query_length = max(beams, LEAST_QUERY_LENGTH)
    rows = live.ravel().nonzero()[0]
    sentence = rows // beams
    row = live.ravel().cumsum().reshape(live.shape) - 1
    # Places of the rectangle that no beam stands at repeat a row of the sentence: finite, and thrown away.
    row_of = np.empty((sentences, query_length), np.int64)
    row_of[:, :beams] = np.maximum(row, 0)
    row_of[:, beams:] = row_of[:, :1]
    return Layout(live, rows, sentence, row_of, rows + sentence * (query_length - beams))


def step_batch(  # noqa: PLR0913 - a step is these arrays; most of them are the graph's inputs
    at: Layout,
    *,
    token: IntArray,
    step: IntArray,
    slot: IntArray,
    ancestors: BoolArray,
    source_length: IntArray,
    candidates: int,
) -> StepBatch:
    """The inputs of a step.

    Args:
        at: Where the live beams stand.
        token: Last token of each beam, (S, K).
        step: Tokens generated so far, which is the position of the new one, (S,).
        slot: Slot of each beam's new key and value, (S, K).
        ancestors: Which slots each beam descends from, (S, 1, Q, P), with Q as in the layout.
        source_length: Tokens of each source, (S,).
        candidates: C.
    """
    slots = np.empty((len(at.rows), 2), np.int64)
    slots[:, 0] = at.sentence
    slots[:, 1] = slot.take(at.rows)
    return StepBatch(
        ids=token.take(at.rows),
        positions=step.take(at.sentence),
        slot=slots,
        row_of=at.row_of,
        back=at.back,
        ancestors=ancestors,
        source_length=source_length,
        candidates=candidates,
    )


class Candidates:
    """The best continuations of all beams of a step, put together from the rows of its lanes.

    Args:
        live: Which beams exist, (S, K).
        count: C.
    """

    def __init__(self, live: BoolArray, count: int) -> None:
        self.count = count
        self._live = live
        self._logprob: FloatArray | None = None
        self._token: IntArray | None = None

    @property
    def logprob(self) -> FloatArray:
        """Log-probabilities, best first; where no beam is live, those of another or zeros, (S, K, C)."""
        assert self._logprob is not None, "no lane has run"
        return self._logprob

    @property
    def token(self) -> IntArray:
        """Their tokens, (S, K, C)."""
        assert self._token is not None, "no lane has run"
        return self._token

    def put(self, part: slice, at: Layout, logprob: FloatArray, token: IntArray) -> None:
        """Put in what a lane has computed.

        Args:
            part: Its sentences.
            at: Which of their beams, (S', K'), its rows are.
            logprob: Of its rows, (N', C).
            token: As logprob.
        """
        if len(logprob) < at.live.size:
            # Where no beam is live stands another one's row: the score there is DEAD, and so are all totals.
            rows = at.row_of[:, : at.live.shape[1]].ravel()
            logprob, token = logprob.take(rows, axis=0), token.take(rows, axis=0)
        by_beam = (*at.live.shape, self.count)
        logprob, token = logprob.reshape(by_beam), token.reshape(by_beam)
        if at.live.shape == self._live.shape:
            self._logprob, self._token = logprob, token
            return
        if self._logprob is None or self._token is None:
            shape = (*self._live.shape, self.count)
            self._logprob, self._token = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        narrow = part, slice(at.live.shape[1])
        self._logprob[narrow], self._token[narrow] = logprob, token

    def only(self, these: Sequence[int]) -> "Candidates":
        """Those of some sentences."""
        some = Candidates(self._live[these], self.count)
        some._logprob, some._token = self.logprob[these], self.token[these]
        return some
