"""The seam between the engine and what computes.

The engine knows sequences by their indices in its table, rows and slots. How they are laid out for a graph - which of
them run together, where in the batch each stands, how long a batch is, what is copied when - is a backend's own
business: a worker's cache says which buckets there are to run, and a bucket runs.

Axes: N rows, C candidates, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from beamline_server.engine.pack import Extent
from beamline_server.engine.table import FloatArray, IntArray, Table


@dataclass(frozen=True, slots=True)
class Encoded:
    """Cross-attention keys and values of one encoder call; what they are is the backend's business.

    Attributes:
        tensors: Of all sources.
        padded_tokens: Places of the attention rectangle that held no source token.
    """

    tensors: Any
    padded_tokens: int


NOT_ENCODED = Encoded(None, 0)
"""Of a model without an encoder."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has computed, row by row; the next step of the same bucket may overwrite it.

    Attributes:
        top_logprob: The best log-probabilities, best first, (N, C).
        top_token: Their tokens, (N, C).
        logprob: Those of all tokens, (N, V), if they were asked for.
    """

    top_logprob: FloatArray
    top_token: IntArray
    logprob: FloatArray | None = None


class Bucket(Protocol):
    """Sequences that run together."""

    @property
    def members(self) -> IntArray:
        """Indices of the sequences, in the order of their rows."""
        ...

    @property
    def needed(self) -> Extent:
        """What their rows need, as `Cache.place` found it."""
        ...

    def run(self, table: Table, candidates: int, *, logprobs: bool = False) -> StepResult:
        """Compute the rows that the table has of the members.

        Args:
            table: The running sequences.
            candidates: C.
            logprobs: Whether the log-probabilities of all tokens are wanted, too.
        """
        ...


class Cache(Protocol):
    """Keys and values of a worker's running sequences; belongs to the thread that asked for it."""

    def enter(self, index: int, encoded: Encoded, number: int) -> None:
        """A sequence comes, whose source was the one of that number in an encoder call."""
        ...

    def leave(self, index: int) -> None:
        """A sequence goes; its index may be taken by another one."""
        ...

    def place(self, table: Table, going: Sequence[int] | None = None) -> Sequence[Bucket]:
        """Give sequences room for the rows that the table has of them; each that goes is in one of these buckets.

        Args:
            table: The running sequences.
            going: Indices of those that go in the next step; None for all. Where a step of few takes as long as one of
                many, all may go nevertheless.
        """
        ...


class Backend(Protocol):
    """Computes. One object serves all workers; each method may be called from several threads at once.

    Attributes:
        device: Where.
        encode_tokens: Source tokens of an encoder call at most, padding included: as many as do not hold up for long
            those who run. A source that is longer is encoded nevertheless.
        has_encoder: Whether the model has one. If not, sources are empty: what is given it is what targets begin with.
    """

    device: str
    encode_tokens: int
    has_encoder: bool

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """Encode sources, each a sequence of token ids, none empty unless the model has no encoder."""
        ...

    def new_cache(self) -> Cache:
        """An empty cache."""
        ...
