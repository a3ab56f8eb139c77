"""What is retried, how often, and what is not."""

from collections.abc import Callable, Iterator

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_client import Client, InvalidRequest, Overloaded, Piece, Unavailable
from beamline_client.channel import SERVICE_CONFIG
from beamline_client.errors import BeamlineError
from beamline_client.testing import Failure, FakeServer

UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, "draining")
FULL = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")


@pytest.mark.parametrize("failure", [UNAVAILABLE, FULL], ids=["unavailable", "overloaded"])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda client: client.generate_one("x"), id="generate"),
        pytest.param(lambda client: list(client.stream("x")), id="stream"),
        pytest.param(lambda client: client.info(), id="info"),
    ],
)
def test_two_failures_are_retried(server: FakeServer, failure: Failure, call: Callable[[Client], object]) -> None:
    server.fail(failure, failure)

    with Client(server.target) as client:
        call(client)

    assert [received.metadata.get("grpc-previous-rpc-attempts") for received in server.calls] == [None, "1", "2"]
    assert len({received.metadata.get("x-request-id") for received in server.calls}) == 1


@pytest.mark.parametrize(("failure", "kind"), [(UNAVAILABLE, Unavailable), (FULL, Overloaded)])
def test_the_third_failure_is_final(server: FakeServer, failure: Failure, kind: type[BeamlineError]) -> None:
    server.fail(failure, failure, failure)

    with Client(server.target) as client, pytest.raises(kind):
        client.generate_one("x")

    assert len(server.calls) == 3


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ],
    ids=lambda code: code.name,
)
def test_other_failures_are_not_retried(server: FakeServer, code: grpc.StatusCode) -> None:
    server.fail(Failure(code, "no"))

    with Client(server.target) as client, pytest.raises(BeamlineError):
        client.generate_one("x")

    assert len(server.calls) == 1


def test_a_stream_that_has_begun_is_not_retried(server: FakeServer) -> None:
    complete = server.stream

    def breaks_after_one_piece(
        request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        yield next(complete(request, context))
        UNAVAILABLE.end(context)

    server.stream = breaks_after_one_piece
    with Client(server.target) as client:
        events = client.stream("one two")
        assert next(events) == Piece("ONE")
        with pytest.raises(Unavailable):
            next(events)

    assert len(server.calls) == 1


def test_retries_stop_while_failures_outweigh_successes(server: FakeServer) -> None:
    """Half of the tokens can be spent on them, and each failure costs one."""
    spent = SERVICE_CONFIG["retryThrottling"]["maxTokens"] // 2
    at_once = Failure(grpc.StatusCode.UNAVAILABLE, "draining", trailers=[("grpc-retry-pushback-ms", "1")])
    server.fail(*[at_once] * spent * 2)

    with Client(server.target) as client:
        while len(server.calls) < spent:
            with pytest.raises(Unavailable):
                client.generate_one("x")
        before = len(server.calls)
        with pytest.raises(Unavailable):
            client.generate_one("x")

    assert len(server.calls) == before + 1


def test_an_invalid_request_is_refused_once(server: FakeServer) -> None:
    server.fail(Failure(grpc.StatusCode.INVALID_ARGUMENT, "no"))

    with Client(server.target) as client:
        with pytest.raises(InvalidRequest):
            client.generate_one("x")
        assert client.generate_one("x").text == "X"

    assert len(server.calls) == 2


def test_replicas_take_turns() -> None:
    """Both addresses of the target are used: the load is balanced by the client."""
    with FakeServer() as one, FakeServer() as other:
        target = f"ipv4:{one.target},{other.target}"
        with Client(target) as client:
            client.wait_ready(10.0)
            while not (one.calls and other.calls):  # the second connection may come up a little later
                client.generate_one("x")


def test_the_service_config_names_a_service_of_the_api() -> None:
    names = [name["service"] for method in SERVICE_CONFIG["methodConfig"] for name in method["name"]]
    assert names == [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
