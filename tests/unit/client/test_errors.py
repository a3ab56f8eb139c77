"""Every status becomes the class that says what to do, with its rich details."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from beamline_client import (
    BeamlineError,
    Cancelled,
    Client,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
    ServerError,
    Unavailable,
)
from beamline_client.advice import advice, exit_status
from beamline_client.errors import from_rpc_error
from beamline_client.testing import Failure, FakeServer

Code = grpc.StatusCode

KINDS: dict[grpc.StatusCode, type[BeamlineError]] = {
    Code.CANCELLED: Cancelled,
    Code.UNKNOWN: ServerError,
    Code.INVALID_ARGUMENT: InvalidRequest,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.NOT_FOUND: NotFound,
    Code.ALREADY_EXISTS: ProtocolError,
    Code.PERMISSION_DENIED: ProtocolError,
    Code.UNAUTHENTICATED: ProtocolError,
    Code.RESOURCE_EXHAUSTED: Overloaded,
    Code.FAILED_PRECONDITION: ProtocolError,
    Code.ABORTED: ProtocolError,
    Code.UNIMPLEMENTED: ProtocolError,
    Code.OUT_OF_RANGE: InvalidRequest,
    Code.INTERNAL: ServerError,
    Code.UNAVAILABLE: Unavailable,
    Code.DATA_LOSS: ServerError,
}

ONE_OF_EACH = [
    InvalidRequest("no", violations=[FieldViolation("search.beam_size", "at most 8")]),
    NotFound("no such model"),
    Overloaded("full"),
    Overloaded("full", retry_after_s=0.25),
    Unavailable("failed to\nconnect"),
    DeadlineExceeded("Deadline Exceeded"),
    Cancelled("cancelled"),
    ServerError("internal error", error_id="e1", request_id="r1"),
    ServerError("internal error"),
    ProtocolError("unexpected status ABORTED"),
]


def error_from(server: FakeServer, failure: Failure) -> BeamlineError:
    """What a client raises when every attempt of a call ends like this."""
    server.fail(*[failure] * 3)
    with Client(server.target) as client, pytest.raises(BeamlineError) as caught:
        client.generate_one("hello", request_id="sent-id")
    return caught.value


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not Code.OK], ids=lambda code: code.name)
def test_every_status_maps_to_the_class_that_says_what_to_do(server: FakeServer, code: grpc.StatusCode) -> None:
    error = error_from(server, Failure(code, "because"))

    assert type(error) is KINDS[code]
    assert error.code is code
    assert "because" in error.message
    assert error.request_id == "sent-id"


def test_invalid_request_names_every_violation(server: FakeServer) -> None:
    bad_request = error_details_pb2.BadRequest()
    bad_request.field_violations.add(field="search.beam_size", description="must be at most 8")
    bad_request.field_violations.add(field="inputs[0].text", description="is empty")

    error = error_from(server, Failure(Code.INVALID_ARGUMENT, "2 problems", [bad_request]))

    assert isinstance(error, InvalidRequest)
    assert error.violations == (
        FieldViolation("search.beam_size", "must be at most 8"),
        FieldViolation("inputs[0].text", "is empty"),
    )
    assert str(error) == "2 problems (search.beam_size: must be at most 8; inputs[0].text: is empty)"


def test_a_violation_that_the_message_tells_is_not_told_twice() -> None:
    assert str(InvalidRequest("beam_size: at most 8", violations=[FieldViolation("beam_size", "at most 8")])) == (
        "beam_size: at most 8"
    )


@pytest.mark.parametrize(
    ("details", "retry_after_s"),
    [
        pytest.param(
            [error_details_pb2.RetryInfo(retry_delay=Duration(nanos=250_000_000))], 0.25, id="with-retry-info"
        ),
        pytest.param([error_details_pb2.ErrorInfo(reason="QUEUE_FULL")], None, id="without"),
    ],
)
def test_overloaded_tells_when_to_come_back(
    server: FakeServer, details: list[Message], retry_after_s: float | None
) -> None:
    error = error_from(server, Failure(Code.RESOURCE_EXHAUSTED, "the queue is full", details))

    assert isinstance(error, Overloaded)
    assert error.retry_after_s == retry_after_s


def test_a_message_over_the_servers_limit_is_no_overload(server: FakeServer) -> None:
    error = error_from(server, Failure(Code.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 8)"))

    assert isinstance(error, InvalidRequest)
    assert str(error).endswith(": send fewer or shorter inputs at once")


@pytest.mark.parametrize(
    ("failure", "error_id"),
    [
        pytest.param(Failure(Code.INTERNAL, "internal error 5f2c-9"), "5f2c-9", id="in-message"),
        pytest.param(Failure(Code.INTERNAL, "oops", trailers=[("x-error-id", "5f2c")]), "5f2c", id="in-trailer"),
        pytest.param(Failure(Code.INTERNAL, "oops"), None, id="none"),
    ],
)
def test_server_error_carries_the_error_id(server: FakeServer, failure: Failure, error_id: str | None) -> None:
    error = error_from(server, failure)

    assert isinstance(error, ServerError)
    assert error.error_id == error_id


def test_the_servers_request_id_takes_precedence(server: FakeServer) -> None:
    error = error_from(server, Failure(Code.NOT_FOUND, "no", trailers=[("x-request-id", "server-id")]))

    assert error.request_id == "server-id"


@pytest.mark.parametrize("details", [b"\xff\xff", b"\x08\x03\x12\x05other"], ids=["garbage", "contradiction"])
def test_unusable_details_leave_the_status(server: FakeServer, details: bytes) -> None:
    def generate(_request: Message, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(Code.INVALID_ARGUMENT, "because")

    server.generate = generate  # type: ignore[assignment]  # abort does not return
    with Client(server.target) as client, pytest.raises(InvalidRequest, match="because") as caught:
        client.generate_one("hello")

    assert caught.value.violations == ()


def test_an_error_without_a_status_is_still_mapped() -> None:
    assert isinstance(from_rpc_error(grpc.RpcError("odd"), target="host:1"), ServerError)


def test_one_of_each_covers_the_tree() -> None:
    assert {type(error) for error in ONE_OF_EACH} == set(BeamlineError.__subclasses__())


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_advice_is_one_line_that_says_what_to_do(error: BeamlineError) -> None:
    line = advice(error, target="host:1", timeout_s=5.0)

    assert "\n" not in line
    assert ":" in line
    assert exit_status(error) == (2 if isinstance(error, InvalidRequest | NotFound) else 1)


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_the_text_of_every_error_says_what_to_do_next(error: BeamlineError) -> None:
    assert str(error).startswith(error.message)
    assert len(str(error)) > len(error.message) or isinstance(error, NotFound)  # a server tells what it does serve


def test_texts_name_the_numbers_and_ids() -> None:
    assert str(ONE_OF_EACH[3]) == "full: try again in 0.2 s"
    assert str(ONE_OF_EACH[7]) == "internal error: tell its operator (error id e1, request id r1)"
    assert str(DeadlineExceeded("late", hint="no cable")) == "late: allow more time, or ask for less at once; no cable"


def test_advice_names_the_numbers_and_ids() -> None:
    flags = {"more_time": "raise --timeout", "less_work": "lower --batch-size"}
    lines = [advice(error, target="host:1", timeout_s=5.0, **flags) for error in ONE_OF_EACH]

    assert "search.beam_size: at most 8" in lines[0]
    assert "try again in 0.2 s, or lower --batch-size" in lines[3]
    assert "host:1" in lines[4]
    assert "within 5 s: raise --timeout, or lower --batch-size, or check --server" in lines[5]
    assert "error id e1, request id r1" in lines[7]


def test_advice_names_no_flag_that_a_command_does_not_have() -> None:
    lines = [advice(error, target="host:1", timeout_s=5.0) for error in ONE_OF_EACH]

    assert not [line for line in lines if "--timeout" in line or "--batch-size" in line or "--concurrency" in line]
