"""What can go wrong with a request, as facts.

EngineError
├── SourceTooLong         more source tokens than the model has positions
├── RequestTooLarge       could never fit, however empty the engine is
├── QueueFull             no room now; come back later
├── WouldBeLate           its deadline cannot be met now; come back later
├── DeadlineExceeded      its time ran out, in the queue or while decoding
├── RequestCancelled      its caller gave up
├── EngineStopped         the engine is shutting down
└── StepFailed            computing failed; ours

The classes carry facts and know no transport: `rpc/errors.py` maps each to a status code.
"""

from dataclasses import dataclass


class EngineError(Exception):
    """Base of everything that the engine reports about a request."""


@dataclass(frozen=True)
class Violation:
    """One invalid option: which, and what would be valid."""

    field: str
    problem: str


@dataclass
class SourceTooLong(EngineError):
    """The source has more tokens than the model has positions."""

    tokens: int
    limit: int

    def __str__(self) -> str:
        return f"the source has {self.tokens} tokens; the model reads at most {self.limit}"


@dataclass
class RequestTooLarge(EngineError):
    """The request could never be admitted: at its worst it needs more than the engine has."""

    resource: str
    needed: int
    capacity: int

    def __str__(self) -> str:
        return f"the request needs up to {self.needed} {self.resource}; this server has {self.capacity}"


@dataclass
class QueueFull(EngineError):
    """The queue has no room now; `retry_after_s` estimates when it will."""

    queued_rows: int
    limit_rows: int
    retry_after_s: float

    def __str__(self) -> str:
        return f"the queue is full ({self.queued_rows} of {self.limit_rows} rows waiting)"


@dataclass
class WouldBeLate(EngineError):
    """The answer is expected after the deadline, so nothing was begun; `retry_after_s` is as of `QueueFull`."""

    expected_s: float
    remaining_s: float
    retry_after_s: float

    def __str__(self) -> str:
        return "the answer is expected after the deadline; nothing was begun"


@dataclass
class DeadlineExceeded(EngineError):
    """The deadline passed before the result was ready."""

    phase: str

    def __str__(self) -> str:
        return f"the deadline passed during {self.phase}"


class RequestCancelled(EngineError):
    """The caller cancelled the request."""

    def __str__(self) -> str:
        return "the request was cancelled"


class EngineStopped(EngineError):
    """The engine is shutting down or has stopped; the request was not executed to its end."""

    def __str__(self) -> str:
        return "the engine is stopping"


@dataclass
class StepFailed(EngineError):
    """Encoding or a decode step failed; `error_id` finds the log entry with the cause."""

    error_id: str

    def __str__(self) -> str:
        return f"internal error {self.error_id}"
