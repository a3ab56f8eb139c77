"""The methods of GenerationService: convert, ask the engine, convert. Errors and counting are the guard's."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceServicer
from beamline_server.engine.request import Completed
from beamline_server.metrics import Clock, Metrics
from beamline_server.rpc.call import current_call, generates
from beamline_server.rpc.converters import Order, RequestReader
from beamline_server.rpc.desk import Desk
from beamline_server.rpc.responses import ResponseWriter
from beamline_server.rpc.streaming import PieceWriter
from beamline_server.rpc.text_work import TextWork
from beamline_server.rpc.unread import RequestMemory, refused_request
from beamline_server.tokenizer import Tokenizer

_BYTES_PER_TOKEN = 4  # about, in text
_MANY_TIMES = 4
"""Of some inputs too many all that is wrong is told; of so many times as many as there may be, nothing is read."""
MessageT = TypeVar("MessageT", pb.GenerateRequest, pb.GenerateStreamRequest)


class GenerationServicer(GenerationServiceServicer):
    """Serves one model."""

    def __init__(  # noqa: PLR0913 - the parts of the service, each once
        self,
        *,
        desk: Desk,
        reader: RequestReader,
        tokenizer: Tokenizer | None,
        info: pb.GetInfoResponse,
        text: TextWork,
        memory: RequestMemory,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._desk = desk
        self._reader = reader
        self._writer = ResponseWriter(tokenizer)
        self._tokenizer = tokenizer
        self._info = info
        self._text = text
        self._memory = memory
        self._metrics = metrics
        self._clock = clock

    @generates
    async def Generate(self, raw: bytes, context: Any) -> pb.GenerateResponse:  # noqa: N802 - gRPC's
        """See the proto."""
        del context
        with self._memory.held(len(raw)):
            order = await self._order(raw, pb.GenerateRequest, self._reader.generate)
            answers = await self._desk.ask(order.sources, current_call.get())
            self._count(order, answers)
            return await self._text.run(_text_bytes(order, answers), self._writer.response, order, answers)

    @generates
    async def GenerateStream(self, raw: bytes, context: Any) -> None:  # noqa: N802 - gRPC's
        """See the proto."""
        with self._memory.held(len(raw)):
            await self._stream(await self._order(raw, pb.GenerateStreamRequest, self._reader.stream), context)

    async def _order(self, raw: bytes, kind: type[MessageT], read: Callable[[MessageT], Order]) -> Order:
        """Read a request. It is parsed when there is time for its text: a parsed one takes many times its bytes."""
        if error := refused_request(raw, _MANY_TIMES * self._info.limits.max_inputs):
            raise error
        return await self._text.run(len(raw), lambda: read(kind.FromString(raw)))

    async def _stream(self, order: Order, context: Any) -> None:
        call = current_call.get()
        (source,) = order.sources
        wanted = order.output.token_ids
        pieces = PieceWriter(self._tokenizer, source.target_prefix, source.context, token_ids=wanted)
        first = True
        with self._desk.stream(source, call) as tokens:
            while True:
                event = await tokens.next()
                if isinstance(event, Completed):
                    break
                if (piece := pieces.piece(event)) is not None:
                    if first:
                        self._metrics.first_result(self._clock() - call.arrived_s)
                        first = False
                    await context.write(piece)
        self._count(order, [event])
        if first:
            self._metrics.first_result(self._clock() - call.arrived_s)
        if (piece := pieces.rest(event.hypotheses[0])) is not None:
            await context.write(piece)
        result = await self._text.run(_text_bytes(order, [event]), self._writer.result, source, event, order.output)
        await context.write(pb.GenerateStreamResponse(result=result))

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:  # noqa: N802 - gRPC's
        """See the proto. Refused while loading, so that an answer means that requests will be answered, too."""
        del request, context
        self._desk.require_open()
        return self._info

    def _count(self, order: Order, answers: Sequence[Completed]) -> None:
        for source, answer in zip(order.sources, answers, strict=True):
            self._metrics.generated(answer, source_tokens=len(source.tokens), beam_size=source.options.beam_size)


def _text_bytes(order: Order, answers: Sequence[Completed]) -> int:
    pairs = zip(order.sources, answers, strict=True)
    texts = ((source.target_prefix, hypothesis.tokens) for source, answer in pairs for hypothesis in answer.hypotheses)
    return _BYTES_PER_TOKEN * sum(len(prefix) + len(tokens) for prefix, tokens in texts)
