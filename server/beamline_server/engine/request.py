"""The nouns of the engine: what is asked of it and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NewType

from beamline_server.engine.errors import EngineError

RequestId = NewType("RequestId", int)

MAX_BEAMS = 16
"""The widest search: what the engine's arrays have room for."""
MAX_LENGTH_PENALTY = 10.0
"""Greatest magnitude of the exponent: beyond it, scores of long hypotheses leave fp32."""


class LengthPenaltyKind(Enum):
    """How the length n of a hypothesis enters its score; n counts generated tokens, end-of-sequence included."""

    POWER = "power"
    """S / n^p: Hugging Face `generate`."""
    GNMT = "gnmt"
    """S / ((5 + n) / 6)^p: Wu et al. 2016, eq. 14, as in Tensor2Tensor."""


class Priority(Enum):
    """Who waits for whom: a request starts when none of a lower number waits."""

    NORMAL = 0
    BATCH = 1


Account = tuple[str, Priority]
"""A caller, for what it asks of a priority: what it holds and waits for is counted for each."""


class EarlyStopping(Enum):
    """When a beam search ends; Hugging Face's `early_stopping` = True, False, "never"."""

    WHEN_FULL = "when_full"
    HEURISTIC = "heuristic"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search: resolved and valid. `beam_size` 1 is greedy search."""

    beam_size: int = 1
    n_best: int = 1
    length_penalty: float = 1.0
    length_penalty_kind: LengthPenaltyKind = LengthPenaltyKind.POWER
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    min_new_tokens: int = 0
    max_new_tokens: int = 128


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One source sequence to generate for.

    Attributes:
        id: Unique among the requests in flight; chosen by the caller.
        source: Token ids as the encoder expects them, end-of-sequence included; of a model without an encoder, the
            prompt.
        options: How to search.
        deadline: Time of the engine's clock (monotonic seconds) after which no answer is wanted.
        stream: Whether to deliver `Piece` events on the way.
        target_prefix: Target tokens that are given, after the decoder start; what is generated continues them.
        caller: Who asks; callers share the engine fairly.
        priority: Who waits for whom.
        decoder_start: First decoder input, where the request has one of its own (a language); None is the model's.
        forced_first: The first token, as in `SearchRules`, where the request has one of its own; None is the model's.
    """

    id: RequestId
    source: tuple[int, ...]
    options: SearchOptions
    deadline: float | None = None
    stream: bool = False
    target_prefix: tuple[int, ...] = ()
    caller: str = ""
    priority: Priority = Priority.NORMAL
    decoder_start: int | None = None
    forced_first: int | None = None

    @property
    def account(self) -> Account:
        """To whom it is counted."""
        return self.caller, self.priority


def prompted(request: GenerationRequest) -> GenerationRequest:
    """The same request as a decoder without an encoder takes it: a target that begins with the prompt."""
    if not request.source:
        return request
    start, *prefix = (*request.source, *request.target_prefix)
    return replace(request, source=(), decoder_start=start, target_prefix=tuple(prefix))


class Finish(Enum):
    """Why a hypothesis ended."""

    END_OF_SEQUENCE = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One generated sequence.

    Attributes:
        tokens: Generated ids, end-of-sequence included if it was produced.
        score: Length-penalized sum of the token log-probabilities.
        token_logprobs: Natural log-probability of each token, as many as tokens.
        finish: Why it ended.
    """

    tokens: tuple[int, ...]
    score: float
    token_logprobs: tuple[float, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one request went, in seconds, and its number of decoder steps."""

    queue_s: float
    encode_s: float
    decode_s: float
    steps: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Further tokens of the best hypothesis that will not change any more."""

    id: RequestId
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completed:
    """The request is done: `n_best` hypotheses, best first."""

    id: RequestId
    hypotheses: tuple[Hypothesis, ...]
    timing: Timing


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a result."""

    id: RequestId
    error: EngineError


Event = Piece | Completed | Failed
"""What the engine tells about a request. Exactly one `Completed` or `Failed` ends each accepted request."""

Deliver = Callable[[Sequence[Event]], None]
"""Receives the events of one step. Called on an engine thread: it must not block and must not raise."""
