"""The seam between the engine and what computes: batches in, scores out.

Axes: S sentences, N rows (live beams, or source tokens), Q query length, P slots, R source length, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from beamline_server.engine.beam import BoolArray, IntArray
from beamline_server.engine.scoring import FloatArray


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    """Packed source tokens: the inputs of the encoder graph."""

    ids: IntArray
    positions: IntArray
    row_of: IntArray
    back: IntArray
    source_length: IntArray


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Packed live beams: the inputs of the decoder step but for its caches."""

    ids: IntArray
    positions: IntArray
    slot: IntArray
    row_of: IntArray
    back: IntArray
    ancestors: BoolArray
    source_length: IntArray
    candidates: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """Cross-attention keys and values of one encoder batch; what they are is the runner's business."""

    tensors: Any


@dataclass(frozen=True, slots=True)
class FromSeat:
    """A sentence that is in the same cache already."""

    seat: int


@dataclass(frozen=True, slots=True)
class FromEncoder:
    """A newcomer: one sentence of an encoder batch."""

    encoded: Encoded
    index: int


@dataclass(frozen=True, slots=True)
class FromCache:
    """A sentence that moves over from another cache; that cache must not have been arranged meanwhile."""

    cache: "Cache"
    seat: int


Origin = FromSeat | FromEncoder | FromCache


class Cache(Protocol):
    """Keys and values of the sentences of one lane: seats of P slots and R source positions each."""

    @property
    def slots(self) -> int:
        """P: slots of every seat."""
        ...

    @property
    def source_width(self) -> int:
        """R: source positions of every seat."""
        ...

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """Seat sentences anew: seat i takes over from origins[i]. Every seat gets `slots` and `source_width`."""
        ...


class StepRunner(Protocol):
    """Computes. One object serves all workers; each method may be called from several threads at once."""

    device: str

    def encode(self, batch: EncoderBatch) -> Encoded:
        """Encode newcomers."""
        ...

    def new_cache(self) -> Cache:
        """An empty cache; belongs to the thread that asks for it."""
        ...

    def step(self, cache: Cache, batch: StepBatch) -> tuple[FloatArray, IntArray]:
        """One decoder step for the sentences seated in the cache, in seat order.

        Returns:
            The best log-probabilities of each row and their tokens, (N, C) each, best first. The next step with the
            same cache may overwrite them.
        """
        ...
