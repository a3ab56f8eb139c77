"""Every error has a status, and what callers are told fits into what they can receive."""

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from beamline_server.engine.errors import (
    DeadlineExceeded,
    EngineError,
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
from beamline_server.rpc.errors import (
    STATUSES,
    InvalidRequest,
    MalformedMessage,
    ModelNotFound,
    NotAccepting,
    RequestError,
    RpcStatus,
    UnexpectedFailure,
    rpc_status_of,
)

CODE = grpc.StatusCode


def descendants(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def status_of(error: Exception, stretch: float = 1) -> RpcStatus:
    return rpc_status_of(error, stretch=stretch)


def details(status: RpcStatus) -> status_pb2.Status:
    [raw] = [value for key, value in status.trailers if key == "grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    return status_pb2.Status.FromString(raw)


@pytest.mark.parametrize("root", [EngineError, RequestError])
def test_every_class_of_the_trees_has_a_status(root: type[Exception]) -> None:
    assert set(descendants(root)) <= set(STATUSES)


@pytest.mark.parametrize(
    ("error", "code", "outcome", "text"),
    [
        (InvalidRequest((Violation("a", "b"),)), CODE.INVALID_ARGUMENT, Outcome.INVALID, "a: b"),
        (
            SourceTooLong(9, 8),
            CODE.INVALID_ARGUMENT,
            Outcome.INVALID,
            "the source has 9 tokens; the model reads at most 8",
        ),
        (
            RequestTooLarge("rows", 9, 8),
            CODE.INVALID_ARGUMENT,
            Outcome.INVALID,
            "the request needs up to 9 rows; this server has 8",
        ),
        (MalformedMessage(), CODE.INVALID_ARGUMENT, Outcome.INVALID, "malformed protobuf message"),
        (
            ModelNotFound("x\n", "y"),
            CODE.NOT_FOUND,
            Outcome.NOT_FOUND,
            r"there is no model 'x\n' here; this server has 'y'",
        ),
        (
            QueueFull(10, 8, 1.0),
            CODE.RESOURCE_EXHAUSTED,
            Outcome.QUEUE_FULL,
            "the queue is full (10 of 8 rows waiting)",
        ),
        (
            WouldBeLate(2.0, 1.5, 1.0),
            CODE.RESOURCE_EXHAUSTED,
            Outcome.QUEUE_FULL,
            "the answer is expected after the deadline; nothing was begun",
        ),
        (NotAccepting("LOADING"), CODE.UNAVAILABLE, Outcome.UNAVAILABLE, "the server is loading"),
        (EngineStopped(), CODE.UNAVAILABLE, Outcome.UNAVAILABLE, "the engine is stopping"),
        (
            DeadlineExceeded("decoding"),
            CODE.DEADLINE_EXCEEDED,
            Outcome.DEADLINE,
            "the deadline passed during decoding",
        ),
        (RequestCancelled(), CODE.CANCELLED, Outcome.CANCELLED, "the request was cancelled"),
        (StepFailed("abc"), CODE.INTERNAL, Outcome.ERROR, "internal error abc"),
        (UnexpectedFailure("abc"), CODE.INTERNAL, Outcome.ERROR, "internal error abc"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_code_says_what_to_do(error: Exception, code: grpc.StatusCode, outcome: Outcome, text: str) -> None:
    status = status_of(error)
    assert (status.code, status.outcome, status.text) == (code, outcome, text)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueFull(10, 8, 1.0), "QUEUE_FULL"),
        (WouldBeLate(2.0, 1.5, 1.0), "DEADLINE_UNREACHABLE"),
        (NotAccepting("LOADING"), "LOADING"),
        (NotAccepting("DRAINING"), "DRAINING"),
        (EngineStopped(), "DRAINING"),
        (ModelNotFound("x", "y"), "MODEL_NOT_FOUND"),
    ],
)
def test_reasons_are_machine_readable(error: Exception, reason: str) -> None:
    info = error_details_pb2.ErrorInfo()
    assert details(status_of(error)).details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason, "beamline")


@pytest.mark.parametrize(
    ("retry_after_s", "stretch", "expected_ms"), [(0.5, 1.2, 600), (0.5, 0.8, 400), (0.0, 1, 20), (99.0, 0.8, 5000)]
)
def test_a_full_queue_tells_when_to_come_back(retry_after_s: float, stretch: float, expected_ms: int) -> None:
    status = status_of(QueueFull(10, 8, retry_after_s), stretch)
    info = error_details_pb2.RetryInfo()
    assert details(status).details[1].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == expected_ms
    assert dict(status.trailers)["grpc-retry-pushback-ms"] == str(expected_ms)


@pytest.mark.parametrize("error", [StepFailed("abc"), UnexpectedFailure("abc")])
def test_faults_of_ours_tell_their_id_and_nothing_else(error: Exception) -> None:
    assert status_of(error).trailers == (("x-error-id", "abc"),)


def test_many_violations_are_summed_up() -> None:
    violations = tuple(Violation(f"inputs[{i}].token_ids", "has the id 99999 at index 99999") for i in range(1024))
    status = status_of(InvalidRequest(violations))
    bad_request = error_details_pb2.BadRequest()
    assert details(status).details[0].Unpack(bad_request)
    told = bad_request.field_violations
    assert told[0].field == "inputs[0].token_ids"
    assert told[-1].description == f"and {1025 - len(told)} more violations"
    assert status.text.endswith("; and 1021 more")
    assert sum(len(key) + len(value) for key, value in status.trailers) < 8000


def test_violations_name_fields() -> None:
    bad_request = error_details_pb2.BadRequest()
    assert details(status_of(RequestTooLarge("rows", 9, 8))).details[0].Unpack(bad_request)
    assert [violation.field for violation in bad_request.field_violations] == ["search"]
