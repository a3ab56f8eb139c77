"""GenerateStream over the wire: pieces that never change, then the result."""

from typing import Any

import grpc

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.errors import QueueFull, StepFailed
from beamline_server.engine.request import Failed, GenerationRequest, Piece
from beamline_server.settings import Settings
from doubles.service import EOS, RunningService, failure_of, make_completed, serving, shouted, silent

END: Any = vars(grpc.aio)["EOF"]
REQUEST = pb.GenerateStreamRequest(input=pb.Input(text="in"), output=pb.OutputOptions(token_ids=True))


async def begun(service: RunningService, request: pb.GenerateStreamRequest = REQUEST) -> tuple[Any, GenerationRequest]:
    call = service.stub.GenerateStream(request)
    [submitted] = await service.engine.submitted()
    return call, submitted


async def read_all(call: Any) -> list[pb.GenerateStreamResponse]:
    messages = []
    while (message := await call.read()) != END:
        messages.append(message)
    return messages


def tokens(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


async def test_pieces_come_as_they_become_certain_and_the_result_ends_the_stream() -> None:
    async with serving(script=silent) as service:
        call, request = await begun(service)
        assert request.stream
        service.engine.tell(Piece(request.id, tokens("né")[:2]))
        assert (await call.read()).piece == pb.Piece(text="n", token_ids=tokens("né")[:2])
        service.engine.tell(Piece(request.id, tokens("né")[2:]))
        assert (await call.read()).piece == pb.Piece(text="é", token_ids=tokens("né")[2:])
        service.engine.tell(make_completed(request.id, (*tokens("né ici"), EOS)))
        assert (await call.read()).piece == pb.Piece(text=" ici", token_ids=(*tokens(" ici"), EOS))
        assert (await call.read()).result.hypotheses[0].text == "né ici"
        assert await call.read() == END
        first = service.metrics.registry.get_sample_value("beamline_time_to_first_result_seconds_count")
        assert first == 1


async def test_a_result_at_once_is_one_piece_and_the_result() -> None:
    async with serving() as service:
        events = [event async for event in service.stub.GenerateStream(REQUEST)]
        first = service.metrics.registry.get_sample_value("beamline_time_to_first_result_seconds_count")
    assert [event.WhichOneof("event") for event in events] == ["piece", "result"]
    assert events[0].piece.text == events[1].result.hypotheses[0].text == "IN"
    assert first == 1


async def test_the_text_of_a_target_prefix_comes_with_the_first_piece() -> None:
    request = pb.GenerateStreamRequest(input=pb.Input(text="né ici"), output=pb.OutputOptions(token_ids=True))
    request.input.target_prefix.token_ids.ids.extend(tokens("né")[:2])
    async with serving(script=silent) as service:
        call, submitted = await begun(service, request)
        assert submitted.target_prefix == tokens("né")[:2]
        service.engine.tell(Piece(submitted.id, tokens("né")[2:]))
        assert (await call.read()).piece == pb.Piece(text="né", token_ids=tokens("né")[2:])
        service.engine.tell(make_completed(submitted.id, (*tokens("né ici")[2:], EOS)))
        assert (await call.read()).piece == pb.Piece(text=" ici", token_ids=(*tokens(" ici"), EOS))
        result = (await call.read()).result
        assert result.hypotheses[0].text == "né ici"
        assert list(result.hypotheses[0].token_ids) == [*tokens("né ici")[2:], EOS]
        assert await call.read() == END


async def test_pieces_that_come_together_are_one() -> None:
    async with serving(script=silent) as service:
        call, request = await begun(service)
        service.engine.tell(*(Piece(request.id, tokens(letter)) for letter in "abc"))
        assert (await call.read()).piece.text == "abc"
        call.cancel()
        await service.engine.cancelled()


async def test_a_refused_stream_sends_nothing_before_the_refusal() -> None:
    """Else the caller's gRPC could not send it again."""
    async with serving() as service:
        service.engine.refusal = QueueFull(9, 8, 0.5)
        call = service.stub.GenerateStream(REQUEST)
        error = await failure_of(read_all(call))
        headers = await call.initial_metadata()
    assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(headers) == 0


async def test_invalid_streams_are_refused() -> None:
    async with serving() as service:
        error = await failure_of(read_all(service.stub.GenerateStream(pb.GenerateStreamRequest())))
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.text == "input: is missing; expected text or token_ids"


async def test_a_failure_in_the_middle_ends_the_stream() -> None:
    async with serving(script=silent) as service:
        call, request = await begun(service)
        service.engine.tell(Piece(request.id, tokens("a")))
        assert (await call.read()).piece.text == "a"
        service.engine.tell(Failed(request.id, StepFailed("abc")))
        error = await failure_of(read_all(call))
        assert service.desk.in_flight == 0
    assert error.code == grpc.StatusCode.INTERNAL
    assert error.text == "internal error abc"


async def test_leaving_early_cancels() -> None:
    async with serving(script=silent) as service:
        call, request = await begun(service)
        service.engine.tell(Piece(request.id, tokens("a")))
        await call.read()
        call.cancel()
        assert await service.engine.cancelled() == [request.id]
        service.desk.close()
        await service.desk.drained()


async def test_the_servers_limit_ends_a_stream() -> None:
    async with serving(script=silent, settings=Settings(max_duration_s=0.05)) as service:
        call, request = await begun(service)
        error = await failure_of(read_all(call))
        assert await service.engine.cancelled() == [request.id]
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_without_a_tokenizer_pieces_are_ids_and_without_them_there_is_only_the_result() -> None:
    request = pb.GenerateStreamRequest(input=pb.Input(token_ids=pb.TokenIds(ids=[97, EOS])))
    async with serving(tokenizer=None) as service:
        events = [event async for event in service.stub.GenerateStream(request)]
        request.output.token_ids = False
        without = [event async for event in service.stub.GenerateStream(request)]
    assert [token for event in events[:-1] for token in event.piece.token_ids] == [65, EOS]
    assert list(events[-1].result.hypotheses[0].token_ids) == [65, EOS]
    assert [event.WhichOneof("event") for event in without] == ["result"]


async def test_a_reader_that_stands_still_holds_up_nobody() -> None:
    """Its own pieces are merged, and the engine is done with it when it is done."""
    big = tuple(b"x" * 20_000)
    async with serving(script=silent) as service:
        stalled, request = await begun(service)
        for _ in range(50):
            service.engine.tell(Piece(request.id, big))
        service.engine.tell(make_completed(request.id, big * 50))
        service.engine.script = shouted
        other = service.stub.GenerateStream(REQUEST)
        assert len(await read_all(other)) == 2
        assert service.desk.in_flight == 0
        stalled.cancel()
