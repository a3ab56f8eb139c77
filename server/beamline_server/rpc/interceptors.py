"""What every call goes through: one guard that is put around each handler once, when the method is first called.

It refuses malformed bytes, gives the call an id and a deadline, turns errors into statuses, counts and logs. No text of
an exception that is not meant for callers leaves the server.
"""

import asyncio
import inspect
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from beamline_server import logs
from beamline_server.engine.errors import DeadlineExceeded
from beamline_server.metrics import Clock, MethodMetrics, MethodName, Metrics, Outcome
from beamline_server.rpc.call import Call, current_call
from beamline_server.rpc.errors import (
    STATUSES,
    MalformedMessage,
    RpcStatus,
    UnexpectedFailure,
    rpc_status_of,
)

REQUEST_ID_KEY = "x-request-id"
"""Metadata key of the request id, both ways."""
_ATTEMPTS_KEY = "grpc-previous-rpc-attempts"
_LONGEST_REQUEST_ID = 128
_JITTER = 0.2

# What goes well is for debugging. So are refusals: a line for each would cost an overloaded server more than refusing.
_LEVELS = dict.fromkeys(Outcome, logging.INFO) | dict.fromkeys(
    (Outcome.OK, Outcome.QUEUE_FULL, Outcome.UNAVAILABLE), logging.DEBUG
)

GENERATING_METHODS = frozenset(
    {"/beamline.v1.GenerationService/Generate", "/beamline.v1.GenerationService/GenerateStream"}
)
"""The methods whose calls count as requests for generation, and have a deadline in any case."""

Behaviour = Callable[[Any, Any], Awaitable[Any]]

_ServerInterceptor: Any = grpc.aio.ServerInterceptor
_CallIsDead: Any = grpc.aio.InternalError
"""What sending raises when the caller is gone and gRPC has not cancelled the handler yet."""
_log = logging.getLogger(__name__)


class _Malformed:
    """Takes the place of a request message that could not be read."""


class Guard(_ServerInterceptor):  # type: ignore[misc]  # grpc has no type information
    """The one interceptor of the server.

    Args:
        metrics: Counts the calls.
        max_duration_s: Longest time for a request for generation, in seconds.
        clock: Monotonic seconds.
        jitter: Spreads the delays that refused callers are advised.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        max_duration_s: float,
        clock: Clock = time.monotonic,
        jitter: random.Random | None = None,
    ) -> None:
        self._metrics = metrics
        self._max_duration_s = max_duration_s
        self._clock = clock
        self._jitter = jitter or random.Random()
        self._guarded: dict[str, Any] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The guarded handler of the called method; None if there is no such method."""
        guarded = self._guarded.get(details.method)
        if guarded is None:
            handler = await continuation(details)
            if handler is None:
                self._metrics.unknown_method()
                return None
            guarded = self._guarded[details.method] = self._guard(details.method, handler)
        return guarded

    def _guard(self, path: str, handler: Any) -> Any:
        method = _GuardedMethod(path, handler, self._metrics)
        deserialize, serialize = handler.request_deserializer, handler.response_serializer
        if not handler.request_streaming:
            deserialize = _tolerant(deserialize)
        make = _MAKE_HANDLER[handler.request_streaming, handler.response_streaming]
        behaviour = self._around(method, _behaviour(handler))
        return make(behaviour, request_deserializer=deserialize, response_serializer=serialize)

    def _around(self, method: "_GuardedMethod", behaviour: Behaviour) -> Behaviour:
        clock = self._clock

        async def call(request: Any, context: Any) -> Any:
            began = clock()
            method.metrics.started()
            identity: tuple[tuple[str, str], ...] = ()
            try:
                identity = self._identify(context)
                if request is _Malformed:
                    raise MalformedMessage
                if method.generates:
                    response = await self._limited(behaviour, request, context, began)
                else:
                    response = await behaviour(request, context)
            except (asyncio.CancelledError, _CallIsDead):
                method.count(*_why_cancelled(context), clock() - began)
                raise
            except grpc.aio.AbortError:  # the handler has ended the call by itself
                method.count(context.code(), Outcome.ERROR, clock() - began)
                raise
            except Exception as error:  # whatever it is, the caller gets a status and no internals
                status = self._status_of(error, method)
                # Counted first: whoever has the answer finds it counted, and a stopping server cannot drop it.
                method.count(status.code, status.outcome, clock() - began)
                with suppress(_CallIsDead):
                    await context.abort(status.code, status.text, (*identity, *status.trailers))
            else:
                method.count(grpc.StatusCode.OK, Outcome.OK, clock() - began)
                return response

        return call

    def _identify(self, context: Any) -> tuple[tuple[str, str], ...]:
        """Give the call its id, and echo it at the end: headers sent early would rule out a retry."""
        request_id = ""
        for key, value in context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY and not request_id:
                request_id = printable(value)
            elif key == _ATTEMPTS_KEY:
                self._metrics.retry_seen()
        request_id = request_id or secrets.token_hex(8)
        logs.request_id.set(request_id)
        identity = ((REQUEST_ID_KEY, request_id),)
        context.set_trailing_metadata(identity)
        return identity

    async def _limited(self, behaviour: Behaviour, request: Any, context: Any, began: float) -> Any:
        """Handle a request for generation within the caller's deadline, which gRPC enforces, and the server's own."""
        remaining_s, longest_s = context.time_remaining(), self._max_duration_s
        if remaining_s is None:
            self._metrics.deadline_missing()
        elif remaining_s <= 0:
            raise DeadlineExceeded("transport")
        elif remaining_s <= longest_s:
            current_call.set(Call(began, began + remaining_s))
            return await behaviour(request, context)
        current_call.set(Call(began, began + longest_s))
        limit = asyncio.timeout(longest_s)
        try:
            async with limit:
                return await behaviour(request, context)
        except TimeoutError as error:
            if limit.expired():
                raise DeadlineExceeded("execution") from error
            raise

    def _status_of(self, error: Exception, method: "_GuardedMethod") -> RpcStatus:
        if type(error) in STATUSES:
            return rpc_status_of(error, stretch=self._jitter.uniform(1 - _JITTER, 1 + _JITTER))
        error_id = secrets.token_hex(8)
        fields = {"event": "handler_failed", "method": method.path, "error_id": error_id}
        _log.error("handler_failed", exc_info=error, extra=fields)
        return rpc_status_of(UnexpectedFailure(error_id), stretch=1)


class _GuardedMethod:
    """One method as the guard counts and logs it."""

    def __init__(self, path: str, handler: Any, metrics: Metrics) -> None:
        self.path = path
        self.generates = path in GENERATING_METHODS
        self.metrics: MethodMetrics = metrics.method(_method_name(path, handler))
        self._all = metrics

    def count(self, code: grpc.StatusCode, outcome: Outcome, seconds: float) -> None:
        """Note how a call has ended."""
        self.metrics.handled(code.name, seconds)
        if self.generates:
            self._all.request_ended(outcome, seconds)
            level = _LEVELS[outcome]
            if _log.isEnabledFor(level):
                fields = {"event": "request_ended", "method": self.path, "code": code.name, "seconds": seconds}
                _log.log(level, "request_ended", extra={**fields, "outcome": outcome.value})


def printable(value: str | bytes) -> str:
    """At most 128 printable ASCII characters of a request id."""
    text = value[:_LONGEST_REQUEST_ID]
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    if text.isascii() and text.isprintable():
        return text
    return "".join(character for character in text if character.isascii() and character.isprintable())


_MAKE_HANDLER: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}


def _method_name(path: str, handler: Any) -> MethodName:
    _, service, method = path.split("/")
    return MethodName(service, method, _KINDS[handler.request_streaming, handler.response_streaming])


def _behaviour(handler: Any) -> Behaviour:
    """The handler's function; one that yields its responses becomes one that writes them."""
    behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    if not inspect.isasyncgenfunction(behaviour):
        function: Behaviour = behaviour
        return function

    async def write_all(request: Any, context: Any) -> None:
        responses: AsyncIterator[Any] = behaviour(request, context)
        async for response in responses:
            await context.write(response)

    return write_all


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that does not raise: gRPC would tell the caller the exception's text."""

    def read(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError:
            return _Malformed

    return read


def _why_cancelled(context: Any) -> tuple[grpc.StatusCode, Outcome]:
    remaining_s = context.time_remaining()
    if remaining_s is not None and remaining_s <= 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED, Outcome.DEADLINE
    return grpc.StatusCode.CANCELLED, Outcome.CANCELLED
