"""What can go wrong with a call, one class per thing that the caller should do about it.

BeamlineError
├── InvalidRequest        fix the request; `violations` names every problem
├── NotFound              ask for a model that this server serves
├── Overloaded            come back later, after `retry_after_s`
├── Unavailable           try another replica, or try again
├── DeadlineExceeded      allow more time or ask for less
├── Cancelled             nothing: somebody gave up
├── ServerError           tell the operator `error_id`
└── ProtocolError         check the address: what answers there does not keep to Beamline's API
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from beamline_client.reachability import hint_for

REQUEST_ID_KEY = "x-request-id"
"""Metadata key of the request id, both ways."""

_ERROR_ID_KEY = "x-error-id"
_ERROR_ID_IN_MESSAGE = re.compile(r"internal error:? ([\w-]+)$")
# The text is gRPC's own: a message over the limit has the status of a full server, but waiting does not help.
_MESSAGE_TOO_LARGE = "message larger than max"

DetailT = TypeVar("DetailT", bound=Message)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One problem of a request: which field, as a path such as `search.beam_size`, and what would be valid."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class BeamlineError(Exception):
    """Base of every error that a call raises.

    Its text is what happened and what to do next.

    Attributes:
        code: The gRPC status, `grpc.StatusCode`.
        message: What happened, in words.
        request_id: The `x-request-id` under which the server knows the call; None when it was never sent.
        hint: Why no server was reached, where that is known; None otherwise.
    """

    default_code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.request_id = request_id
        self.hint = hint

    @property
    def next_step(self) -> str:
        """What to do about it; empty where the message says it."""
        return ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.message, self.next_step)))


class InvalidRequest(BeamlineError):
    """The request breaks the API's rules or the server's limits; sending it again cannot help.

    Attributes:
        violations: Every problem that was found, may be empty.
    """

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.violations = tuple(violations)

    def __str__(self) -> str:
        unsaid = [str(violation) for violation in self.violations if violation.description not in self.message]
        return f"{self.message} ({'; '.join(unsaid)})" if unsaid else self.message


class NotFound(BeamlineError):
    """The server does not serve what was asked for."""

    default_code = grpc.StatusCode.NOT_FOUND


class Overloaded(BeamlineError):
    """The server has no room now, and the client's own retries met the same.

    Attributes:
        retry_after_s: The server's estimate of when it will have room, in seconds; None when it gives none.
    """

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.retry_after_s = retry_after_s

    @property
    def next_step(self) -> str:
        """When to come back."""
        return "try again later" if self.retry_after_s is None else f"try again in {self.retry_after_s:.1f} s"


class Unavailable(BeamlineError):
    """No server can be reached, or it is loading or draining; the client's own retries met the same."""

    default_code = grpc.StatusCode.UNAVAILABLE

    @property
    def next_step(self) -> str:
        """What most likely helps."""
        return "; ".join(filter(None, (self.hint, "try again in a moment, or ask another replica")))


class DeadlineExceeded(BeamlineError):
    """The call's time ran out before the answer was complete."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED

    @property
    def next_step(self) -> str:
        """What most likely helps."""
        return "; ".join(filter(None, ("allow more time, or ask for less at once", self.hint)))


class Cancelled(BeamlineError):
    """The call was cancelled, by the server or by closing the `Client` in another thread."""

    default_code = grpc.StatusCode.CANCELLED

    @property
    def next_step(self) -> str:
        """Whether to send it again."""
        return "send it again if the answer is still wanted"


class ServerError(BeamlineError):
    """A fault of the server.

    Attributes:
        error_id: What finds the cause in the server's log; None when the server gives none.
    """

    default_code = grpc.StatusCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
        error_id: str | None = None,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.error_id = error_id

    @property
    def next_step(self) -> str:
        """What the operator needs to know."""
        ids = (("error id", self.error_id), ("request id", self.request_id))
        told = ", ".join(f"{name} {value}" for name, value in ids if value)
        return f"tell its operator ({told or 'no id known'})"


class ProtocolError(BeamlineError):
    """The answer is none that Beamline's API has: most likely something else listens at that address."""

    @property
    def next_step(self) -> str:
        """Where to look."""
        return "check the address: what answers there does not keep to the API of Beamline"


@dataclass(frozen=True, slots=True)
class _Report:
    """What a failed call tells, apart from gRPC's classes."""

    code: grpc.StatusCode
    message: str
    target: str
    request_id: str | None
    trailers: Mapping[str, str]
    details: status_pb2.Status
    answered: bool

    def detail(self, kind: type[DetailT]) -> DetailT | None:
        """The first google.rpc detail of this kind, if there is one."""
        for packed in self.details.details:
            message = kind()
            if packed.Unpack(message):
                return message
        return None


def from_rpc_error(
    error: grpc.RpcError, *, target: str, request_id: str | None = None, answered: bool = False
) -> BeamlineError:
    """Turns an error of grpc or grpc.aio into the class that says what to do.

    Args:
        error: What the call raised.
        target: Where it was sent.
        request_id: The id that was sent; the server's own, if it tells one, takes precedence.
        answered: Whether anything has come from there before.
    """
    report = _read(error, target, request_id, answered)
    return _BY_CODE.get(report.code, _protocol_error)(report)


def _read(error: grpc.RpcError, target: str, request_id: str | None, answered: bool) -> _Report:
    failed: Any = error  # grpc and grpc.aio have the same methods, but no base class that says so
    if not hasattr(failed, "code"):  # grpc.RpcError itself promises nothing
        return _Report(grpc.StatusCode.UNKNOWN, str(error), target, request_id, {}, status_pb2.Status(), answered)
    trailers = {key: value for key, value in failed.trailing_metadata() or () if isinstance(value, str)}
    try:
        details = rpc_status.from_call(failed) or status_pb2.Status()
    except (ValueError, DecodeError):  # contradicts the status, or is no google.rpc.Status: the status alone counts
        details = status_pb2.Status()
    message = failed.details() or failed.code().name
    request_id = trailers.get(REQUEST_ID_KEY, request_id)
    return _Report(failed.code(), message, target, request_id, trailers, details, answered)


def _plain(kind: type[BeamlineError]) -> Callable[[_Report], BeamlineError]:
    return lambda report: kind(report.message, code=report.code, request_id=report.request_id)


def _unreached(kind: type[BeamlineError]) -> Callable[[_Report], BeamlineError]:
    def convert(report: _Report) -> BeamlineError:
        # A server that tells its reason was reached.
        hint = None if report.details.details else hint_for(report.message, report.target, answered=report.answered)
        return kind(report.message, code=report.code, request_id=report.request_id, hint=hint)

    return convert


def _invalid_request(report: _Report) -> BeamlineError:
    bad_request = report.detail(error_details_pb2.BadRequest) or error_details_pb2.BadRequest()
    return InvalidRequest(
        report.message,
        code=report.code,
        request_id=report.request_id,
        violations=[FieldViolation(v.field, v.description) for v in bad_request.field_violations],
    )


def _resource_exhausted(report: _Report) -> BeamlineError:
    if _MESSAGE_TOO_LARGE in report.message:
        message = f"{report.message}: send fewer or shorter inputs at once"
        return InvalidRequest(message, code=report.code, request_id=report.request_id)
    retry_info = report.detail(error_details_pb2.RetryInfo)
    return Overloaded(
        report.message,
        code=report.code,
        request_id=report.request_id,
        retry_after_s=None if retry_info is None else retry_info.retry_delay.ToTimedelta().total_seconds(),
    )


def _server_error(report: _Report) -> BeamlineError:
    in_message = _ERROR_ID_IN_MESSAGE.search(report.message)
    error_id = report.trailers.get(_ERROR_ID_KEY) or (in_message.group(1) if in_message else None)
    return ServerError(report.message, code=report.code, request_id=report.request_id, error_id=error_id)


def _protocol_error(report: _Report) -> BeamlineError:
    message = f"unexpected status {report.code.name}: {report.message}"
    return ProtocolError(message, code=report.code, request_id=report.request_id)


# By what the caller should do. Statuses that Beamline never answers with are absent: _protocol_error.
_BY_CODE: Mapping[grpc.StatusCode, Callable[[_Report], BeamlineError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: _invalid_request,
    grpc.StatusCode.OUT_OF_RANGE: _invalid_request,
    grpc.StatusCode.NOT_FOUND: _plain(NotFound),
    grpc.StatusCode.RESOURCE_EXHAUSTED: _resource_exhausted,
    grpc.StatusCode.UNAVAILABLE: _unreached(Unavailable),
    grpc.StatusCode.DEADLINE_EXCEEDED: _unreached(DeadlineExceeded),
    grpc.StatusCode.CANCELLED: _plain(Cancelled),
    grpc.StatusCode.INTERNAL: _server_error,
    grpc.StatusCode.UNKNOWN: _server_error,
    grpc.StatusCode.DATA_LOSS: _server_error,
}
