"""Beamline's service as a target, against a real gRPC server that does not need a model."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_client import SearchOptions
from beamline_client.load.grpc_target import BeamlineTargets
from beamline_client.load.target import Answer, Outcome, Question, Request, TargetUnusable
from beamline_client.testing import Failure, FakeServer

QUESTION = Question(0, "two words", SearchOptions(beam_size=4, n_best=2), stream=False, bucket="any")
STREAM = Question(1, "three more words", SearchOptions(), stream=True, bucket="any")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def asked(
    server: FakeServer,
    question: Question = QUESTION,
    *,
    deadline_s: float = 30.0,
    cancel_after_s: float | None = None,
    retries: bool = False,
) -> Answer:
    """The answer to one request of a target of its own."""

    async def ask() -> Answer:
        target = BeamlineTargets(server.target, channels=2, retries=retries)((QUESTION, STREAM))
        await target.prepare()
        try:
            return await target.call(Request(question, deadline_s, cancel_after_s))
        finally:
            await target.close()

    return asyncio.run(ask())


def test_an_answer_has_the_texts_the_tokens_and_the_servers_timing(server: FakeServer) -> None:
    answer = asked(server)

    assert answer.outcome is Outcome.OK
    assert answer.texts == ("TWO WORDS", "TWO WORDS #2")
    assert (answer.tokens, answer.steps, answer.first_piece_s) == (2, 2, None)
    assert (answer.queue_s, answer.encode_s, answer.decode_s) == pytest.approx((0.001, 0.002, 0.03))


def test_what_is_sent_is_the_question(server: FakeServer) -> None:
    asked(server, deadline_s=12.5)

    (call,) = server.calls
    assert call.request.inputs[0].text == "two words"
    assert (call.request.search.beam_size, call.request.search.n_best) == (4, 2)
    assert call.time_remaining_s is not None
    assert 0 < call.time_remaining_s <= 13.5  # on the wire it is rounded up


def test_a_stream_tells_when_its_first_piece_came(server: FakeServer) -> None:
    answer = asked(server, STREAM)

    assert (answer.outcome, answer.texts, answer.tokens) == (Outcome.OK, ("THREE MORE WORDS",), 3)
    assert answer.first_piece_s is not None
    assert answer.first_piece_s > 0


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Outcome.REJECTED),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Outcome.DEADLINE),
        (grpc.StatusCode.UNAVAILABLE, Outcome.TRANSPORT),
        (grpc.StatusCode.CANCELLED, Outcome.TRANSPORT),
        (grpc.StatusCode.INVALID_ARGUMENT, Outcome.ERROR),
        (grpc.StatusCode.INTERNAL, Outcome.ERROR),
    ],
)
@pytest.mark.parametrize("question", [QUESTION, STREAM], ids=["unary", "stream"])
def test_every_status_has_its_outcome(
    server: FakeServer, code: grpc.StatusCode, outcome: Outcome, question: Question
) -> None:
    server.fail(Failure(code, "for a reason"))

    assert asked(server, question) == Answer(outcome, code.value[0], "for a reason")
    assert len(server.calls) == 1  # refused calls are not sent again


def test_with_retries_a_refused_call_is_sent_again(server: FakeServer) -> None:
    server.fail(Failure(grpc.StatusCode.UNAVAILABLE, "for a moment"))

    assert asked(server, retries=True).outcome is Outcome.OK
    assert len(server.calls) == 2


@pytest.mark.parametrize("question", [QUESTION, STREAM], ids=["unary", "stream"])
def test_a_deadline_ends_a_call(server: FakeServer, question: Question) -> None:
    server.generate = server.stream = server.hang
    assert asked(server, question, deadline_s=0.05).outcome is Outcome.DEADLINE


@pytest.mark.parametrize("question", [QUESTION, STREAM], ids=["unary", "stream"])
def test_a_caller_who_gives_up_cancels(server: FakeServer, question: Question) -> None:
    server.generate = server.stream = server.hang
    assert asked(server, question, cancel_after_s=0.05) == Answer(Outcome.CANCELLED, 1)


def test_a_caller_whose_answer_comes_first_does_not_cancel(server: FakeServer) -> None:
    assert asked(server, cancel_after_s=60.0).outcome is Outcome.OK


def test_a_task_that_is_cancelled_is_not_an_outcome(server: FakeServer) -> None:
    server.generate = server.hang

    async def abandon() -> None:
        target = BeamlineTargets(server.target, channels=1, retries=False)((QUESTION, STREAM))
        await target.prepare()
        try:
            async with asyncio.timeout(0.05):
                await target.call(Request(QUESTION, 30.0, None))
        finally:
            await target.close()

    with pytest.raises(TimeoutError):
        asyncio.run(abandon())


def no_results(request: Any, context: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse()


def no_hypotheses(request: Any, context: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(results=[pb.Result()])


@pytest.mark.parametrize("generate", [no_results, no_hypotheses])
def test_an_answer_without_content_is_an_error(server: FakeServer, generate: Any) -> None:
    server.generate = generate
    answer = asked(server)
    assert (answer.outcome, answer.code) == (Outcome.ERROR, 0)
    assert answer.message.startswith("the server sent")


def test_a_stream_without_a_result_is_an_error(server: FakeServer) -> None:
    server.stream = lambda request, context: iter([pb.GenerateStreamResponse(piece=pb.Piece(text="a"))])
    assert asked(server, STREAM) == Answer(Outcome.ERROR, 0, "the server sent a stream without a result")


def test_channels_are_connections_of_their_own(server: FakeServer) -> None:
    peers = set()

    def generate(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        peers.add(context.peer())
        return pb.GenerateResponse()

    server.generate = generate

    async def ask_often() -> None:
        target = BeamlineTargets(server.target, channels=3, retries=False)((QUESTION, STREAM))
        await target.prepare()
        for _ in range(6):
            await target.call(Request(QUESTION, 30.0, None))
        await target.close()

    asyncio.run(ask_often())
    assert len(peers) == 3


def test_a_server_that_is_not_there_is_unusable() -> None:
    async def prepare() -> None:
        target = BeamlineTargets("127.0.0.1:1", channels=1, retries=False, connect_within_s=0.2)(())
        try:
            await target.prepare()
        finally:
            await target.close()

    with pytest.raises(TargetUnusable, match=r"cannot open 1 connections to 127.0.0.1:1 within 0.2 s"):
        asyncio.run(prepare())
