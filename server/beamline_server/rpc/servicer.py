"""The methods of GenerationService: convert, ask the engine, convert. Errors and counting are the guard's."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceServicer
from beamline_server.engine.request import Completed
from beamline_server.metrics import Clock, Metrics
from beamline_server.rpc.call import current_call, generates
from beamline_server.rpc.converters import Order, RequestReader
from beamline_server.rpc.desk import Desk
from beamline_server.rpc.responses import ResponseWriter
from beamline_server.rpc.streaming import PieceWriter
from beamline_server.tokenizer import Tokenizer

_THREADS = 2
_INLINE_BYTES = 4096
_BYTES_PER_TOKEN = 4  # about, in text

P = ParamSpec("P")
T = TypeVar("T")


class TextWork:
    """Runs tokenizing and detokenizing: at once where it is little, else in one of few threads.

    A kilobyte takes some hundred microseconds, less than handing it over; a megabyte would hold up every other call.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="text")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    async def run(self, size_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of this work on about so many bytes of text."""
        if size_bytes <= _INLINE_BYTES:
            return work(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))


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
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._desk = desk
        self._reader = reader
        self._writer = ResponseWriter(tokenizer)
        self._tokenizer = tokenizer
        self._info = info
        self._text = text
        self._metrics = metrics
        self._clock = clock

    @generates
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:  # noqa: N802 - gRPC's
        """See the proto."""
        del context
        order = await self._text.run(request.ByteSize(), self._reader.generate, request)
        answers = await self._desk.ask(order.sources, current_call.get())
        self._count(order, answers)
        return await self._text.run(_text_bytes(order, answers), self._writer.response, order, answers)

    @generates
    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: Any) -> None:  # noqa: N802 - gRPC's
        """See the proto."""
        call = current_call.get()
        order = await self._text.run(request.ByteSize(), self._reader.stream, request)
        (source,) = order.sources
        pieces = PieceWriter(self._tokenizer, source.target_prefix, token_ids=order.output.token_ids)
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
