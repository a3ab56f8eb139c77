"""Both faces of the client against a real server; one set of tests for what they share."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeAlias

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Input,
    InvalidRequest,
    Piece,
    Priority,
    ProtocolError,
    Result,
    SearchOptions,
    ServerInfo,
    Unavailable,
)
from beamline_client.testing import FakeServer

METHODS = ["generate", "generate_one", "stream", "info", "wait_ready", "close"]

Call: TypeAlias = Callable[..., Any]
"""Calls a method of a new client, by name, and returns its value; of a stream, the list of its events."""


def test_both_faces_have_the_same_methods() -> None:
    for name in METHODS:
        ours = inspect.signature(getattr(AsyncClient, name)).parameters
        assert ours == inspect.signature(getattr(Client, name)).parameters
    assert inspect.signature(AsyncClient.__init__) == inspect.signature(Client.__init__)


def test_results_come_in_the_order_of_the_inputs(server: FakeServer, call: Call) -> None:
    results = call(server.target, "generate", ["one", [5, 6], "three"])

    assert [result.text for result in results] == ["ONE", "5 6", "THREE"]


def test_targets_begin_as_they_are_told_to(server: FakeServer, call: Call) -> None:
    results = call(server.target, "generate", ["one", Input("two", "deux"), Input([5, 6], [7])], token_ids=True)

    assert [result.text for result in results] == ["ONE", "deux TWO", "7 5 6"]
    assert [result.best.token_ids for result in results] == [(0,), (0,), (0, 1)]
    assert call(server.target, "generate_one", Input("two", "deux")).text == "deux TWO"


def test_a_stream_has_what_its_target_begins_with_in_its_first_piece(server: FakeServer, call: Call) -> None:
    *pieces, result = call(server.target, "stream", Input("two three", "un deux"), token_ids=True)

    assert pieces == [Piece("un deux TWO", (0,)), Piece(" THREE", (1,))]
    assert result.text == "un deux TWO THREE"


def test_one_input_gives_one_result(server: FakeServer, call: Call) -> None:
    result = call(server.target, "generate_one", "one two", token_ids=True, token_logprobs=True)

    assert isinstance(result, Result)
    assert result.best.token_ids == (0, 1)
    assert result.best.token_logprobs == (-0.25, -0.25)


@pytest.mark.parametrize("method", ["generate_one", "stream"])
def test_every_option_reaches_the_server(server: FakeServer, call: Call, method: str) -> None:
    search = SearchOptions(beam_size=4, n_best=2)
    languages = {"source_language": "fra", "target_language": "eng"}
    call(server.target, method, "x", search=search, token_ids=True, truncate=True, priority=Priority.BATCH, **languages)

    request = server.calls[0].request
    assert request.search == pb.SearchOptions(beam_size=4, n_best=2)
    assert request.output == pb.OutputOptions(token_ids=True, token_logprobs=False)
    assert request.truncate_source
    assert request.priority == pb.PRIORITY_BATCH
    assert (request.source_language, request.target_language) == ("fra", "eng")
    assert request.model == ""


@pytest.mark.parametrize("method", ["generate_one", "stream"])
def test_a_language_that_is_not_given_is_not_sent(server: FakeServer, call: Call, method: str) -> None:
    call(server.target, method, "x", source_language=None)

    assert not server.calls[0].request.HasField("source_language")
    assert not server.calls[0].request.HasField("target_language")


def test_an_unknown_option_is_a_type_error(server: FakeServer, call: Call) -> None:
    with pytest.raises(TypeError, match="beams"):
        call(server.target, "generate", ["x"], beams=4)
    with pytest.raises(TypeError, match=r"unknown options: timeout \(did you mean timeout_s\?\)$"):
        call(server.target, "generate_one", "x", timeout=3)

    assert server.calls == []


def test_a_stream_is_pieces_and_then_the_result(server: FakeServer, call: Call) -> None:
    *pieces, result = call(server.target, "stream", "one two three", token_ids=True)

    assert pieces == [Piece("ONE", (0,)), Piece(" TWO", (1,)), Piece(" THREE", (2,))]
    assert isinstance(result, Result)
    assert result.text == "".join(piece.text for piece in pieces)


def test_a_stream_without_a_result_is_a_protocol_error(server: FakeServer, call: Call) -> None:
    server.stream = lambda _request, _context: iter([pb.GenerateStreamResponse(piece=pb.Piece(text="x"))])

    with pytest.raises(ProtocolError):
        call(server.target, "stream", "x")


def test_a_server_that_answers_for_other_inputs_is_a_protocol_error(server: FakeServer, call: Call) -> None:
    server.generate = lambda _request, _context: pb.GenerateResponse()

    with pytest.raises(ProtocolError, match="0 results for 1 inputs"):
        call(server.target, "generate_one", "x")


def test_info_describes_the_server(server: FakeServer, call: Call) -> None:
    server.info = pb.GetInfoResponse(model=pb.ModelInfo(name="fr-en"), limits=pb.Limits(max_inputs=64))

    info = call(server.target, "info")

    assert isinstance(info, ServerInfo)
    assert info.model.name == "fr-en"
    assert info.limits.max_inputs == 64


@pytest.mark.parametrize(
    ("method", "args"), [("generate", [["x"]]), ("generate_one", ["x"]), ("stream", ["x"]), ("info", [])]
)
class TestDeadline:
    def test_there_is_always_one(self, server: FakeServer, call: Call, method: str, args: list[Any]) -> None:
        call(server.target, method, *args)

        remaining_s = server.calls[0].time_remaining_s
        assert remaining_s is not None
        assert remaining_s == pytest.approx(30.0, abs=5.0)

    def test_a_client_can_have_another(self, server: FakeServer, call: Call, method: str, args: list[Any]) -> None:
        call(server.target, method, *args, client={"timeout_s": 100.0})

        remaining_s = server.calls[0].time_remaining_s
        assert remaining_s is not None
        assert remaining_s == pytest.approx(100.0, abs=5.0)

    def test_a_call_can_have_another(self, server: FakeServer, call: Call, method: str, args: list[Any]) -> None:
        call(server.target, method, *args, timeout_s=200.0)

        remaining_s = server.calls[0].time_remaining_s
        assert remaining_s is not None
        assert remaining_s == pytest.approx(200.0, abs=5.0)


@pytest.mark.parametrize("method", ["generate_one", "stream"])
def test_a_server_that_does_not_answer_exceeds_the_deadline(server: FakeServer, call: Call, method: str) -> None:
    server.generate = server.stream = server.hang

    with pytest.raises(DeadlineExceeded):
        call(server.target, method, "x", timeout_s=0.05)


def test_each_call_has_its_own_request_id(server: FakeServer, call: Call) -> None:
    call(server.target, "generate_one", "x")
    call(server.target, "generate_one", "x")
    call(server.target, "stream", "x", request_id="mine")

    first, second, third = [received.metadata["x-request-id"] for received in server.calls]
    assert first != second
    assert len(first) == 32
    assert third == "mine"


def test_a_request_id_that_cannot_be_sent_is_refused(server: FakeServer, call: Call) -> None:
    with pytest.raises(InvalidRequest, match="request_id: must be printable ASCII"):
        call(server.target, "generate_one", "x", request_id="line\nbreak")


@pytest.mark.parametrize("method", ["generate_one", "stream"])
def test_a_request_that_is_too_large_fails_here(server: FakeServer, call: Call, method: str) -> None:
    with pytest.raises(InvalidRequest, match="at most 100: send fewer or shorter inputs"):
        call(server.target, method, "x" * 100, client={"max_send_bytes": 100})

    assert server.calls == []


def test_a_megabyte_is_the_default_limit(server: FakeServer, call: Call) -> None:
    call(server.target, "generate_one", "x" * 1_000_000)
    with pytest.raises(InvalidRequest):
        call(server.target, "generate_one", "x" * 1_048_577)


@pytest.mark.parametrize("method", ["generate_one", "stream"])
def test_an_answer_is_never_too_large(server: FakeServer, call: Call, method: str) -> None:
    large = pb.Result(hypotheses=[pb.Hypothesis(text="x" * 5_000_000)])
    server.generate = lambda _request, _context: pb.GenerateResponse(results=[large])
    server.stream = lambda _request, _context: iter([pb.GenerateStreamResponse(result=large)])

    answer = call(server.target, method, "x")

    result = answer[-1] if method == "stream" else answer
    assert len(result.text) == 5_000_000


def test_no_server_is_unavailable(call: Call) -> None:
    with FakeServer() as stopped:
        target = stopped.target

    with pytest.raises(Unavailable):
        call(target, "generate_one", "x")


def test_a_dns_target_works(server: FakeServer, call: Call) -> None:
    port = server.target.rpartition(":")[2]

    assert call(f"dns:///localhost:{port}", "generate_one", "x").text == "X"


async def test_many_calls_share_a_client(server: FakeServer) -> None:
    async with AsyncClient(server.target) as client:
        results = await asyncio.gather(*[client.generate_one(f"text {i}") for i in range(50)])

    assert [result.text for result in results] == [f"TEXT {i}" for i in range(50)]


async def test_the_async_stream_yields_pieces_before_the_result_exists(server: FakeServer) -> None:
    released = threading.Event()

    def stream(request: pb.GenerateStreamRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
        yield pb.GenerateStreamResponse(piece=pb.Piece(text="first"))
        released.wait(30)
        yield pb.GenerateStreamResponse(result=pb.Result(hypotheses=[pb.Hypothesis(text="first")]))

    server.stream = stream
    async with AsyncClient(server.target) as client:
        events: AsyncIterator[Piece | Result] = client.stream("x")
        assert await anext(events) == Piece("first")
        released.set()
        assert [type(event) async for event in events] == [Result]
