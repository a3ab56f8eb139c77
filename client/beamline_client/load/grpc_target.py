"""Beamline's own service as the target of a load."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from beamline.v1 import generation_pb2 as pb
from beamline_client import converters
from beamline_client.channel import channel_options
from beamline_client.load.target import Answer, Outcome, Question, Request, TargetUnusable
from beamline_client.proxies import proxy_for

_SERVICE = "/beamline.v1.GenerationService/"

_OUTCOMES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Outcome.REJECTED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Outcome.DEADLINE,
    grpc.StatusCode.UNAVAILABLE: Outcome.TRANSPORT,
    # Not ours, for those never get here: what gRPC makes of a call that comes while the server closes.
    grpc.StatusCode.CANCELLED: Outcome.TRANSPORT,
}
"""What a status other than OK means; one that is not named here is an error."""


@dataclass(frozen=True, slots=True)
class BeamlineTargets:
    """Makes targets for one address; see `TargetFactory`."""

    address: str
    channels: int
    """Connections of each target. Their requests take turns."""
    retries: bool
    """Whether gRPC sends refused calls again, as `beamline_client.Client` has it do."""
    connect_within_s: float = 10.0

    def __call__(self, questions: tuple[Question, ...]) -> "BeamlineTarget":
        """See `TargetFactory`."""
        return BeamlineTarget(self, questions)


class BeamlineTarget:
    """Calls Generate and GenerateStream; see `Target`.

    Messages are built once per question and sent as bytes: what the generator spends, the server cannot have.
    """

    def __init__(self, factory: BeamlineTargets, questions: Sequence[Question]) -> None:
        self._factory = factory
        self._questions = questions
        self._messages: list[bytes | None] = [None] * len(questions)
        self._channels: list[grpc.aio.Channel] = []
        self._unary: itertools.cycle[Any] = itertools.cycle(())
        self._streams: itertools.cycle[Any] = itertools.cycle(())

    async def prepare(self) -> None:
        """See `Target`."""
        options = channel_options(self._factory.address, retries=self._factory.retries)
        # One connection carries a limited number of calls at a time; a pool of its own keeps channels from sharing one.
        options = [*options, ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(self._factory.address, options=options) for _ in range(self._factory.channels)
        ]
        try:
            ready = asyncio.gather(*(channel.channel_ready() for channel in self._channels))
            await asyncio.wait_for(ready, self._factory.connect_within_s)
        except TimeoutError:
            proxy = proxy_for(self._factory.address)
            raise TargetUnusable(
                f"cannot open {len(self._channels)} connections to {self._factory.address} within "
                f"{self._factory.connect_within_s:g} s: {proxy or 'is the server running and ready?'}"
            ) from None
        self._unary = itertools.cycle(
            [
                channel.unary_unary(f"{_SERVICE}Generate", response_deserializer=pb.GenerateResponse.FromString)
                for channel in self._channels
            ]
        )
        self._streams = itertools.cycle(
            [
                channel.unary_stream(
                    f"{_SERVICE}GenerateStream", response_deserializer=pb.GenerateStreamResponse.FromString
                )
                for channel in self._channels
            ]
        )

    async def call(self, request: Request) -> Answer:
        """See `Target`."""
        question = request.question
        message = self._messages[question.number]
        if message is None:
            message = self._messages[question.number] = _message(question)
        method = next(self._streams if question.stream else self._unary)
        call = method(message, timeout=request.deadline_s)
        loop = asyncio.get_running_loop()
        patience = None if request.cancel_after_s is None else loop.call_later(request.cancel_after_s, call.cancel)
        try:
            return await (_streamed(call) if question.stream else _answered(call))
        except grpc.aio.AioRpcError as error:
            code = error.code()
            return Answer(_OUTCOMES.get(code, Outcome.ERROR), code.value[0], error.details() or "")
        except asyncio.CancelledError:
            if patience is None or patience.when() > loop.time():  # somebody cancels us, not we the call
                call.cancel()
                raise
            return Answer(Outcome.CANCELLED, grpc.StatusCode.CANCELLED.value[0])
        finally:
            if patience is not None:
                patience.cancel()

    async def close(self) -> None:
        """See `Target`."""
        for channel in self._channels:
            await channel.close(None)


def _message(question: Question) -> bytes:
    search = converters.search_to_pb(question.search)
    output = pb.OutputOptions(token_ids=True)  # their number is what output tokens per second counts
    source = pb.Input(text=question.source)
    message: pb.GenerateStreamRequest | pb.GenerateRequest
    if question.stream:
        message = pb.GenerateStreamRequest(input=source, search=search, output=output)
    else:
        message = pb.GenerateRequest(inputs=[source], search=search, output=output)
    return message.SerializeToString()


async def _answered(call: Any) -> Answer:
    response: pb.GenerateResponse | None = await call
    if response is None:  # what grpc.aio makes of bytes that are no such message
        return _no_result("bytes that are no GenerateResponse")
    if len(response.results) != 1:
        return _no_result(f"{len(response.results)} results for one input")
    return _answer(response.results[0], None)


async def _streamed(call: Any) -> Answer:
    began = time.monotonic()
    first_piece_s: float | None = None
    last = pb.GenerateStreamResponse()
    async for message in call:
        if first_piece_s is None:
            first_piece_s = time.monotonic() - began
        last = message
    if not last.HasField("result"):
        return _no_result("a stream without a result")
    return _answer(last.result, first_piece_s)


def _no_result(what: str) -> Answer:
    return Answer(Outcome.ERROR, grpc.StatusCode.OK.value[0], f"the server sent {what}")


def _answer(result: pb.Result, first_piece_s: float | None) -> Answer:
    if not result.hypotheses:
        return _no_result("a result without hypotheses")
    queue_s = encode_s = decode_s = None
    if result.HasField("timing"):
        timing = result.timing
        queue_s, encode_s, decode_s = (_seconds(phase) for phase in (timing.queue, timing.encode, timing.decode))
    return Answer(
        Outcome.OK,
        grpc.StatusCode.OK.value[0],
        texts=tuple([hypothesis.text for hypothesis in result.hypotheses]),
        tokens=len(result.hypotheses[0].token_ids),
        first_piece_s=first_piece_s,
        queue_s=queue_s,
        encode_s=encode_s,
        decode_s=decode_s,
        steps=result.timing.steps,
    )


def _seconds(duration: Any) -> float:
    return duration.seconds + duration.nanos * 1e-9  # type: ignore[no-any-return]
