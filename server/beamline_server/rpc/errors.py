"""What goes wrong and what the caller is told: the one table from errors to gRPC statuses.

The code follows from what the caller should do about it: fix the request, come back later, try another replica, or
report an error id. Besides the engine's errors there are the door's own:

RequestError
├── InvalidRequest        fields are not valid; names every violation
├── MalformedMessage      the bytes are no message of the method
├── MetadataTooLarge      there is more metadata than a call may have
├── MethodNotFound        there is no such method
├── ModelNotFound         another model is asked for
├── NotAccepting          the server is loading or draining
├── ServerFull            there is no room for the call or its bytes
└── UnexpectedFailure     a fault of ours; the log has the cause under its id
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as PackedMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from beamline_server.engine.errors import (
    DeadlineExceeded,
    EngineStopped,
    QueueFull,
    RequestCancelled,
    RequestTooLarge,
    SourceTooLong,
    StepFailed,
    Violation,
    WouldBeLate,
)
from beamline_server.metrics import Outcome

DOMAIN = "beamline"
"""The domain of every `google.rpc.ErrorInfo`."""
ERROR_ID_KEY = "x-error-id"
"""Trailing metadata key of the id under which the log has the cause."""
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata key that tells gRPC's own retries how long to wait."""

SHORTEST_PUSHBACK_S, LONGEST_PUSHBACK_S = 0.02, 5.0
# Clients refuse trailing metadata of more than 8 KiB, and would then not even see the status. Violations of more than
# this many bytes together are summed up.
_VIOLATIONS_BYTES = 4096
_VIOLATIONS_IN_TEXT = 3
_JITTER = 0.2


class RequestError(Exception):
    """Base of what the RPC layer itself finds wrong with a request."""


@dataclass
class InvalidRequest(RequestError):
    """Fields are not valid; names every violation, by its path in the request."""

    violations: tuple[Violation, ...]

    def __str__(self) -> str:
        return _summary(self.violations)


class MalformedMessage(RequestError):
    """The bytes are no message of the method."""

    def __str__(self) -> str:
        return "malformed protobuf message"


@dataclass
class MetadataTooLarge(RequestError):
    """There is more metadata than a call may have."""

    size: int
    most: int

    def __str__(self) -> str:
        return f"the metadata has {self.size} bytes; expected at most {self.most}"


class MethodNotFound(RequestError):
    """There is no such method."""

    def __str__(self) -> str:
        return "there is no such method here; beamline.v1.GenerationService has Generate, GenerateStream and GetInfo"


@dataclass
class ModelNotFound(RequestError):
    """The request names another model than the served one."""

    name: str
    served: str

    def __str__(self) -> str:
        return f"there is no model {self.name[:128]!r} here; this server has {self.served!r}"


@dataclass
class NotAccepting(RequestError):
    """The server does not accept requests now; `reason` is LOADING or DRAINING."""

    reason: str

    def __str__(self) -> str:
        return f"the server is {self.reason.lower()}"


@dataclass
class ServerFull(RequestError):
    """There is no room for the call, or for its bytes; `full` says what there is too much of."""

    full: str
    retry_after_s: float = 1.0

    def __str__(self) -> str:
        return self.full


@dataclass
class UnexpectedFailure(RequestError):
    """A fault of ours; `error_id` finds the log entry with the cause."""

    error_id: str

    def __str__(self) -> str:
        return f"internal error {self.error_id}"


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """How to end a call."""

    code: grpc.StatusCode
    text: str
    trailers: tuple[tuple[str, str | bytes], ...]
    outcome: Outcome


_Code = grpc.StatusCode
_Later = QueueFull | WouldBeLate | ServerFull


@dataclass(frozen=True, slots=True)
class _Rule:
    code: grpc.StatusCode
    outcome: Outcome
    details: Callable[[Any], Sequence[Message]] = lambda _: ()
    trailers: Callable[[Any], tuple[tuple[str, str], ...]] = lambda _: ()
    text: Callable[[Any], str] = str


def stretched(jitter: random.Random) -> float:
    """A factor around 1: refused callers should not all come back at once."""
    return jitter.uniform(1 - _JITTER, 1 + _JITTER)


def rpc_status_of(error: Exception, *, stretch: float) -> RpcStatus:
    """The status for an error.

    Args:
        error: One of the engine's or of this module's errors.
        stretch: Factor for the advised delay.

    Raises:
        KeyError: the error is none that callers are told of.
    """
    if isinstance(error, _Later):
        delay_s = min(max(error.retry_after_s * stretch, SHORTEST_PUSHBACK_S), LONGEST_PUSHBACK_S)
        error = replace(error, retry_after_s=delay_s)
    rule = STATUSES[type(error)]
    text = rule.text(error)
    status = status_pb2.Status(code=rule.code.value[0], message=text)
    for detail in rule.details(error):
        packed = PackedMessage()
        packed.Pack(detail)
        status.details.append(packed)
    rich = rpc_status.to_status(status).trailing_metadata if status.details else ()
    return RpcStatus(rule.code, text, (*rich, *rule.trailers(error)), rule.outcome)


def _summary(violations: Sequence[Violation]) -> str:
    told = [f"{violation.field}: {violation.problem}" for violation in violations[:_VIOLATIONS_IN_TEXT]]
    more = len(violations) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more else "")


def _bad_request(violations: Sequence[Violation]) -> Sequence[Message]:
    message = error_details_pb2.BadRequest()
    room = _VIOLATIONS_BYTES
    for told, violation in enumerate(violations):
        room -= len(violation.field) + len(violation.problem)
        if room < 0:
            message.field_violations.add(description=f"and {len(violations) - told} more violations")
            break
        message.field_violations.add(field=violation.field, description=violation.problem)
    return (message,)


def _violates(field: str) -> Callable[[Any], Sequence[Message]]:
    return lambda error: _bad_request([Violation(field, str(error))])


def _because(reason: str) -> Callable[[Any], Sequence[Message]]:
    return lambda _: (error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN),)


def _later(reason: str) -> _Rule:
    def details(error: _Later) -> Sequence[Message]:
        delay = Duration()
        delay.FromMilliseconds(_milliseconds(error))
        return (*_because(reason)(error), error_details_pb2.RetryInfo(retry_delay=delay))

    def trailers(error: _Later) -> tuple[tuple[str, str], ...]:
        return ((PUSHBACK_KEY, str(_milliseconds(error))),)

    return _Rule(_Code.RESOURCE_EXHAUSTED, Outcome.QUEUE_FULL, details, trailers)


def _milliseconds(error: _Later) -> int:
    return round(error.retry_after_s * 1000)


def _error_id(error: StepFailed | UnexpectedFailure) -> tuple[tuple[str, str], ...]:
    return ((ERROR_ID_KEY, error.error_id),)


STATUSES: Mapping[type[Exception], _Rule] = {
    # Fix the request.
    InvalidRequest: _Rule(_Code.INVALID_ARGUMENT, Outcome.INVALID, lambda e: _bad_request(e.violations)),
    SourceTooLong: _Rule(_Code.INVALID_ARGUMENT, Outcome.INVALID, _violates("inputs")),
    RequestTooLarge: _Rule(_Code.INVALID_ARGUMENT, Outcome.INVALID, _violates("search")),
    MalformedMessage: _Rule(_Code.INVALID_ARGUMENT, Outcome.INVALID),
    MetadataTooLarge: _Rule(_Code.INVALID_ARGUMENT, Outcome.INVALID),
    DecodeError: _Rule(_Code.INVALID_ARGUMENT, Outcome.INVALID, text=lambda _: str(MalformedMessage())),
    MethodNotFound: _Rule(_Code.UNIMPLEMENTED, Outcome.NOT_FOUND, _because("METHOD_NOT_FOUND")),
    ModelNotFound: _Rule(_Code.NOT_FOUND, Outcome.NOT_FOUND, _because("MODEL_NOT_FOUND")),
    # Come back later.
    QueueFull: _later("QUEUE_FULL"),
    WouldBeLate: _later("DEADLINE_UNREACHABLE"),
    ServerFull: _later("QUEUE_FULL"),
    # Try another replica: the request was not executed, or not to its end.
    NotAccepting: _Rule(_Code.UNAVAILABLE, Outcome.UNAVAILABLE, lambda e: _because(e.reason)(e)),
    EngineStopped: _Rule(_Code.UNAVAILABLE, Outcome.UNAVAILABLE, _because("DRAINING")),
    # The caller's own doing.
    DeadlineExceeded: _Rule(_Code.DEADLINE_EXCEEDED, Outcome.DEADLINE),
    RequestCancelled: _Rule(_Code.CANCELLED, Outcome.CANCELLED),
    # Ours.
    StepFailed: _Rule(_Code.INTERNAL, Outcome.ERROR, trailers=_error_id),
    UnexpectedFailure: _Rule(_Code.INTERNAL, Outcome.ERROR, trailers=_error_id),
}
"""Which status each error class becomes."""
