"""Rounds the shapes of a step or an encoder call up to few enough that each can have a captured graph.

A captured CUDA graph replays one shape at fixed addresses. Rounding up costs padding, which is computed and thrown
away: rows and batch indices at most a half more, and where they are few a GPU does not notice; slots and source
positions at most twice as many, of which attention alone reads the padding.
"""

from dataclasses import dataclass

from beamline_server.engine.pack import LEAST_QUERIES, Extent

LEAST_ROWS = 4
LEAST_SLOTS = 32
LEAST_SOURCE_WIDTH = 32
LEAST_CANDIDATES = 8
_DOUBLING_UP_TO = 64
"""Larger numbers are also rounded to one and a half powers of two: their padding costs more than another graph."""


def doubled(needed: int, least: int) -> int:
    """The first of least, 2 least, 4 least, … that holds `needed`."""
    size = least
    while size < needed:
        size *= 2
    return size


def stepped(needed: int, least: int) -> int:
    """As `doubled`, with steps of a half power of two where the numbers are large."""
    size = doubled(needed, least)
    return size * 3 // 4 if size > _DOUBLING_UP_TO and needed <= size * 3 // 4 else size


def batch_size(sequences: int) -> int:
    """Batch indices for some sequences: one more, which belongs to nobody, takes what padding writes."""
    return stepped(sequences, 1) + 1


@dataclass(frozen=True, slots=True)
class StepShape:
    """The axes of a decoder step as it is computed, padding included, letters as in pack.py; and what comes back."""

    batch: int
    query_length: int
    rows: int
    slots: int
    source_width: int
    candidates: int
    logprobs: bool

    def axes(self) -> dict[str, int]:
        """By the letters that the graph gives them."""
        return {
            "S": self.batch,
            "Q": self.query_length,
            "N": self.rows,
            "P": self.slots,
            "R": self.source_width,
            "C": self.candidates,
        }


def step_shape(  # noqa: PLR0913 - the axes of a step
    needed: Extent, candidates: int, *, batch: int, slots: int, source_width: int, vocabulary: int, logprobs: bool
) -> StepShape:
    """The shape that a step is computed in; batch, slots and source width are those of its memory."""
    return StepShape(
        batch=batch,
        query_length=doubled(needed.queries, LEAST_QUERIES),
        rows=stepped(needed.rows, LEAST_ROWS),
        slots=slots,
        source_width=source_width,
        candidates=min(doubled(candidates, LEAST_CANDIDATES), vocabulary),
        logprobs=logprobs,
    )


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """The axes of an encoder call as it is computed: every source has as many rows as the widest."""

    sources: int
    source_width: int

    def axes(self) -> dict[str, int]:
        """By the letters that the graph gives them."""
        return {"S": self.sources, "R": self.source_width, "N": self.sources * self.source_width}


def encoder_shape(sources: int, width: int) -> EncoderShape:
    """The shape in which sources are encoded, the longest of which has `width` tokens."""
    return EncoderShape(stepped(sources, 1), doubled(width, LEAST_SOURCE_WIDTH))
