"""What a caller passes in and gets back: plain frozen values, without protobuf."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Source: TypeAlias = str | Sequence[int]
"""One source: text for the served model's tokenizer, or token ids as its encoder expects them."""
TargetPrefix: TypeAlias = str | Sequence[int]
"""What a target begins with: text, or token ids as the model's decoder expects them, without its start token."""


@dataclass(frozen=True, slots=True)
class Input:
    """One source and what its target begins with; without a prefix, the same as the source alone."""

    source: Source
    target_prefix: TargetPrefix | None = None
    """Given by the caller; generation continues from there. Part of the text that comes back, and not of the token
    ids. None lets the model begin."""


class Priority(enum.Enum):
    """Who waits for whom."""

    NORMAL = "normal"
    """Callers share the server fairly."""
    BATCH = "batch"
    """Starts when no request of normal priority waits; for what nobody waits for."""


class LengthPenaltyKind(enum.Enum):
    """How the length of a hypothesis weighs in its score."""

    POWER = "power"
    """score = S / n^length_penalty (Hugging Face generate)."""
    GNMT = "gnmt"
    """score = S / ((5 + n) / 6)^length_penalty (GNMT, Tensor2Tensor)."""


class EarlyStopping(enum.Enum):
    """When a beam search ends."""

    WHEN_FULL = "when_full"
    """As soon as `beam_size` hypotheses are finished."""
    HEURISTIC = "heuristic"
    """When no live beam scores better at its current length than the worst finished hypothesis."""
    NEVER = "never"
    """When no live beam can beat the worst finished hypothesis at any length."""


class FinishReason(enum.Enum):
    """Why a hypothesis ended."""

    END_OF_SEQUENCE = "end_of_sequence"
    """The model produced end-of-sequence."""
    LENGTH = "length"
    """`max_new_tokens` was reached."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search. What is None takes the served model's default (`ServerInfo.default_search`)."""

    beam_size: int | None = None
    """Number of beams; 1 is greedy search."""
    n_best: int | None = None
    """Number of hypotheses to return, at most `beam_size`."""
    length_penalty: float | None = None
    """Exponent of the length penalty: above 0 favours longer, below 0 shorter hypotheses."""
    length_penalty_kind: LengthPenaltyKind | None = None
    """Which length penalty the exponent belongs to."""
    early_stopping: EarlyStopping | None = None
    """When the search ends. Has no effect on greedy search."""
    min_new_tokens: int | None = None
    """Least number of generated tokens before end-of-sequence; a target prefix is not counted."""
    max_new_tokens: int | None = None
    """Greatest number of generated tokens, end-of-sequence included; a target prefix is not counted."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One generated sequence."""

    text: str
    """The text of the whole target, `Input.target_prefix` included; empty when the model has no tokenizer."""
    score: float
    """What hypotheses are ranked by: the length-penalized sum of the generated tokens' log-probabilities (natural)."""
    finish_reason: FinishReason | None
    """Why it ended; None when the server gives a reason that this client does not know."""
    token_ids: tuple[int, ...] | None = None
    """Generated token ids, end-of-sequence included and a target prefix not; None when they were not asked for."""
    token_logprobs: tuple[float, ...] | None = None
    """Log-probability of each generated token (natural log); None when they were not asked for."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one input went on the server."""

    queue_s: float
    """From acceptance to the start of encoding, in seconds."""
    encode_s: float
    """Encoding, shared with the other inputs of the same encoder batch, in seconds."""
    decode_s: float
    """From the end of encoding to the last step, in seconds."""
    steps: int
    """Number of decoder steps."""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome for one input."""

    hypotheses: tuple[Hypothesis, ...]
    """The `n_best` best hypotheses, best first; never empty."""
    source_tokens: int
    """Number of source tokens that the model has read."""
    source_truncated: bool
    """Whether the source was cut to `Limits.max_source_tokens`."""
    timing: Timing
    """Where the time went."""

    @property
    def best(self) -> Hypothesis:
        """The hypothesis with the highest score."""
        return self.hypotheses[0]

    @property
    def text(self) -> str:
        """The text of the best hypothesis."""
        return self.best.text


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the best hypothesis that will not change any more."""

    text: str
    """Text to append to what was received before; that of a target prefix comes with the first pieces."""
    token_ids: tuple[int, ...] = ()
    """The generated token ids that have become certain; empty when they were not asked for."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model."""

    name: str
    architecture: str
    """marian, bart, nn_transformer, …"""
    precision: str
    """Of its weights: fp32, fp16 or int8."""
    device: str
    """Where it runs: cpu or cuda."""
    source_vocabulary_size: int
    target_vocabulary_size: int
    has_tokenizer: bool
    """Without one, inputs and outputs are token ids."""
    fingerprint: str
    """SHA-256 of its manifest, in hexadecimal: the same value means the same model."""
    ignored_settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of its checkpoint that would change answers and have no effect, by name."""
    source_languages: tuple[str, ...] = ()
    """What a call can give as `source_language`; empty if it can give none."""
    target_languages: tuple[str, ...] = ()
    """What a call can give as `target_language`; empty if it can give none."""
    default_source_language: str | None = None
    """Of sources whose call gives none; None if there is none."""
    default_target_language: str | None = None
    """Of targets whose call gives none; None if there is none."""
    decoder_only: bool = False
    """Whether it has no encoder: an input is then a prompt, which the text of a result continues."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for."""

    max_inputs: int
    """Most inputs in one request."""
    max_text_bytes: int
    """Most bytes of UTF-8 in one text."""
    max_source_tokens: int
    """Most tokens in one source, end-of-sequence included."""
    max_new_tokens: int
    """Most generated tokens."""
    max_beam_size: int
    """Widest beam."""
    max_message_bytes: int
    """Most bytes in one request message."""
    max_duration_s: float
    """Longest time that a request may take, in seconds."""
    max_target_tokens: int = 0
    """Most tokens in one target, a prefix and what is generated together; 0 if the server does not know prefixes."""
    max_request_cost: int = 0
    """Most of `beam_size * max_new_tokens`, summed over the inputs of a request; 0 if the server does not limit it."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server serves and accepts."""

    model: ModelInfo
    limits: Limits
    default_search: SearchOptions
    """What an unset search option means."""
    versions: Mapping[str, str]
    """Versions of the server's parts, by name: beamline, onnxruntime, grpcio, python."""
