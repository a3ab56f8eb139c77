"""The two faces of the client: `AsyncClient` for asyncio and `Client` for everything else.

Both only send and receive. What is sent is built in `calls`, what comes back is read in `converters` and `errors`, and
when to try again is decided by gRPC (`channel`) and, while waiting for a server to come up, by `readiness`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_client import converters
from beamline_client.address import endpoints
from beamline_client.calls import (
    DEFAULT_MAX_SEND_BYTES,
    DEFAULT_TIMEOUT_S,
    Call,
    CallBuilder,
    CallOptions,
    require_result,
)
from beamline_client.channel import channel_credentials, channel_options
from beamline_client.errors import BeamlineError
from beamline_client.readiness import ReadinessWait
from beamline_client.results import Input, Piece, Result, ServerInfo, Source


class AsyncClient:
    """Calls a Beamline server from asyncio.

    Create it inside a running event loop, use it from that loop only, and share it: any number of calls may run at
    once. Connecting happens in the background, at the first call. Every call has a deadline. A call that fails with
    UNAVAILABLE or RESOURCE_EXHAUSTED is retried up to two times within its deadline, if there are several replicas on
    another one. A server that is silent for three seconds, pings included, is UNAVAILABLE.

    All methods raise a `BeamlineError`, by what the caller should do (see `beamline_client.errors`), and TypeError for
    values that are of no use at all.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_send_bytes: int = DEFAULT_MAX_SEND_BYTES,
        root_certificates: bytes | None = None,
    ) -> None:
        """Prepares a client; nothing is sent yet.

        Args:
            target: `host:port`, or a gRPC name such as `dns:///host:port`; all addresses behind it take turns. What is
                on this machine is never reached through a proxy.
            timeout_s: Time for a call that does not say otherwise, retries included, in seconds.
            max_send_bytes: Largest request message that is sent; a larger one raises `InvalidRequest`.
            root_certificates: PEM certificates to verify the server with; None connects in plain text.

        Raises:
            AddressUnusable: The target is no address; a ValueError.
            RuntimeError: No event loop is running.
        """
        asyncio.get_running_loop()  # a channel made outside would bind to a loop that never runs
        endpoints(target)
        self.target = target
        self._calls = CallBuilder(target=target, timeout_s=timeout_s, max_send_bytes=max_send_bytes)
        credentials = channel_credentials(root_certificates)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=channel_options(target))
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=channel_options(target))
        self._stub = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnects; calls that are still running raise asyncio.CancelledError. Closing twice is allowed."""
        await self._channel.close(None)

    async def generate(self, inputs: Sequence[Source | Input], **options: Unpack[CallOptions]) -> list[Result]:
        """Generates for several sources in one request.

        Args:
            inputs: Texts or sequences of token ids, each alone or in an `Input` that says what its target begins with;
                at most `Limits.max_inputs`.
            **options: See `CallOptions`.

        Returns:
            One result per input, in the order of the inputs. One bad input refuses the whole request.
        """
        call = self._calls.generate(inputs, options)
        with call.errors_mapped():
            response = await self._stub.Generate(call.request, timeout=call.timeout_s, metadata=call.metadata)
        return converters.results_from_pb(response, inputs=len(inputs))

    async def generate_one(self, source: Source | Input, **options: Unpack[CallOptions]) -> Result:
        """Generates for one text, sequence of token ids or `Input`; see `generate`."""
        (result,) = await self.generate([source], **options)
        return result

    async def stream(self, source: Source | Input, **options: Unpack[CallOptions]) -> AsyncIterator[Piece | Result]:
        """Generates for one source and yields the best hypothesis piece by piece, then the result.

        What was yielded never changes: the result's best text is the pieces put together, or continues them. Leaving
        the iteration early cancels the call. Errors are raised by the iteration.
        """
        call = self._calls.stream(source, options)
        rpc = self._stub.GenerateStream(call.request, timeout=call.timeout_s, metadata=call.metadata)
        event: Piece | Result | None = None
        try:
            with call.errors_mapped():
                async for message in rpc:
                    call.answered.set()
                    event = converters.event_from_pb(message)
                    yield event
        finally:
            rpc.cancel()  # of no effect on a finished call
        require_result(event)

    async def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Describes the served model, its limits and its defaults."""
        return await self._info(self._calls.info(timeout_s))

    async def wait_ready(self, timeout_s: float) -> ServerInfo:
        """Waits until the server can be reached and answers; returns what it tells about itself.

        Raises:
            Unavailable: It did not within `timeout_s` seconds.
        """
        wait = ReadinessWait(self.target, time.monotonic(), timeout_s)
        attempt = 0
        while True:
            try:
                return await self._info(self._calls.info(wait.remaining_s(time.monotonic())), wait_for_ready=True)
            except BeamlineError as error:
                pause_s = wait.pause_s(error, attempt=attempt, now_s=time.monotonic())
            await asyncio.sleep(pause_s)
            attempt += 1

    async def _info(self, call: Call[pb.GetInfoRequest], *, wait_for_ready: bool = False) -> ServerInfo:
        with call.errors_mapped():
            response = await self._stub.GetInfo(
                call.request, timeout=call.timeout_s, metadata=call.metadata, wait_for_ready=wait_for_ready
            )
        return converters.info_from_pb(response)


class Client:
    """Calls a Beamline server from code without an event loop. Safe to share between threads.

    Everything else is as in `AsyncClient`.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_send_bytes: int = DEFAULT_MAX_SEND_BYTES,
        root_certificates: bytes | None = None,
    ) -> None:
        """Prepares a client; nothing is sent yet. Arguments as in `AsyncClient`.

        Raises:
            AddressUnusable: The target is no address; a ValueError.
        """
        endpoints(target)
        self.target = target
        self._calls = CallBuilder(target=target, timeout_s=timeout_s, max_send_bytes=max_send_bytes)
        credentials = channel_credentials(root_certificates)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=channel_options(target))
        else:
            self._channel = grpc.secure_channel(target, credentials, options=channel_options(target))
        self._stub = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnects; calls that are still running, in other threads, raise `Cancelled`. Closing twice is allowed."""
        self._channel.close()

    def generate(self, inputs: Sequence[Source | Input], **options: Unpack[CallOptions]) -> list[Result]:
        """Generates for several sources in one request; see `AsyncClient.generate`."""
        call = self._calls.generate(inputs, options)
        with call.errors_mapped():
            response = self._stub.Generate(call.request, timeout=call.timeout_s, metadata=call.metadata)
        return converters.results_from_pb(response, inputs=len(inputs))

    def generate_one(self, source: Source | Input, **options: Unpack[CallOptions]) -> Result:
        """Generates for one text, sequence of token ids or `Input`; see `AsyncClient.generate`."""
        (result,) = self.generate([source], **options)
        return result

    def stream(self, source: Source | Input, **options: Unpack[CallOptions]) -> Iterator[Piece | Result]:
        """Generates for one source and yields its pieces, then its result; see `AsyncClient.stream`."""
        call = self._calls.stream(source, options)
        rpc = self._stub.GenerateStream(call.request, timeout=call.timeout_s, metadata=call.metadata)
        event: Piece | Result | None = None
        try:
            with call.errors_mapped():
                for message in rpc:
                    call.answered.set()
                    event = converters.event_from_pb(message)
                    yield event
        finally:
            rpc.cancel()
        require_result(event)

    def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Describes the served model, its limits and its defaults."""
        return self._info(self._calls.info(timeout_s))

    def wait_ready(self, timeout_s: float) -> ServerInfo:
        """Waits until the server can be reached and answers; see `AsyncClient.wait_ready`."""
        wait = ReadinessWait(self.target, time.monotonic(), timeout_s)
        attempt = 0
        while True:
            try:
                return self._info(self._calls.info(wait.remaining_s(time.monotonic())), wait_for_ready=True)
            except BeamlineError as error:
                pause_s = wait.pause_s(error, attempt=attempt, now_s=time.monotonic())
            time.sleep(pause_s)
            attempt += 1

    def _info(self, call: Call[pb.GetInfoRequest], *, wait_for_ready: bool = False) -> ServerInfo:
        with call.errors_mapped():
            response = self._stub.GetInfo(
                call.request, timeout=call.timeout_s, metadata=call.metadata, wait_for_ready=wait_for_ready
            )
        return converters.info_from_pb(response)
