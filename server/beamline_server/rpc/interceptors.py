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
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from beamline_server import logs
from beamline_server.engine.errors import DeadlineExceeded
from beamline_server.metrics import UNKNOWN_METHOD, Clock, MethodMetrics, MethodName, Metrics, Outcome
from beamline_server.rpc.call import Call, CallIsDead, current_call, does_generate, end_call
from beamline_server.rpc.errors import (
    STATUSES,
    MalformedMessage,
    MethodNotFound,
    RpcStatus,
    UnexpectedFailure,
    rpc_status_of,
    stretched,
)

REQUEST_ID_KEY = "x-request-id"
"""Metadata key of the request id, both ways."""
_ATTEMPTS_KEY = "grpc-previous-rpc-attempts"
_LONGEST_NAME = 128
_LOST_CALLERS = 100
_DEADLINE_PART, _DEADLINE_NEAR_S = 0.1, 0.1
"""A caller's clock started before ours, by the time that the call took to come: who gives up when so little is left of
its time, as a part and in seconds, has come to its deadline."""

# What goes well is for debugging. So are refusals: a line for each would cost an overloaded server more than refusing.
_LEVELS = dict.fromkeys(Outcome, logging.INFO) | dict.fromkeys(
    (Outcome.OK, Outcome.QUEUE_FULL, Outcome.UNAVAILABLE), logging.DEBUG
)

Behaviour = Callable[[Any, Any], Awaitable[Any]]

_ServerInterceptor: Any = grpc.aio.ServerInterceptor
_ids = random.Random()
_log = logging.getLogger(__name__)


class Doorway(Protocol):
    """What calls have passed when they come to be handled."""

    def entered(self, path: str, context: Any) -> float | None:
        """A call has sent its message and is now being handled; returns when it came, or None if it has been ended."""
        ...

    def left(self, path: str) -> None:
        """A call is being handled no more."""
        ...


_UNREADABLE = object()
"""Takes the place of a request message that could not be read."""


class Guard(_ServerInterceptor):  # type: ignore[misc]  # grpc has no type information
    """The one interceptor of the server.

    Args:
        metrics: Counts the calls.
        max_duration_s: Longest time for a request for generation, in seconds.
        caller_key: Metadata key whose value names the caller.
        doorway: Is told of calls that are handled; by default they have just come.
        clock: Monotonic seconds.
        jitter: Spreads the delays that refused callers are advised.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        max_duration_s: float,
        caller_key: str | None = None,
        doorway: Doorway | None = None,
        clock: Clock = time.monotonic,
        jitter: random.Random | None = None,
    ) -> None:
        self._metrics = metrics
        self._doorway = doorway
        self._caller_key = caller_key
        self._max_duration_s = max_duration_s
        self._clock = clock
        self._jitter = jitter or random.Random()
        self._guarded: dict[str, Any] = {}
        self._lost = _LostCallers()
        unknown = _GuardedMethod("unknown", metrics.method(UNKNOWN_METHOD, usual="UNIMPLEMENTED"), metrics)
        # A stream of requests, none of which is read, fits whatever the caller wants to send.
        self._unknown_handler = grpc.stream_stream_rpc_method_handler(self._around(unknown, self._no_such_method))

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The guarded handler of the called method; if there is no such method, one that says so."""
        guarded = self._guarded.get(details.method)
        if guarded is None:
            handler = await continuation(details)
            if handler is None:
                return self._unknown_handler
            guarded = self._guarded[details.method] = self._guard(details.method, handler)
        return guarded

    async def _no_such_method(self, request: Any, context: Any) -> None:
        del request
        self._lost.note(context.peer())
        raise MethodNotFound

    def _guard(self, path: str, handler: Any) -> Any:
        function = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        series = self._metrics.method(_method_name(path, handler))
        method = _GuardedMethod(path, series, self._metrics, generates=does_generate(function))
        deserialize, serialize = handler.request_deserializer, handler.response_serializer
        if method.generates:
            deserialize = None  # it reads for itself, when there is time for it
        elif deserialize is not None and not handler.request_streaming:
            deserialize = _tolerant(deserialize)
        make = _MAKE_HANDLER[handler.request_streaming, handler.response_streaming]
        behaviour = self._around(method, _written(function))
        return make(behaviour, request_deserializer=deserialize, response_serializer=serialize)

    def _around(self, method: "_GuardedMethod", behaviour: Behaviour) -> Behaviour:
        clock = self._clock

        async def call(request: Any, context: Any) -> Any:
            doorway = self._doorway
            began = clock() if doorway is None else doorway.entered(method.path, context)
            if began is None:
                await asyncio.sleep(0)  # whoever ends it has begun to; grpcio then takes no answer
                return None
            method.metrics.started()
            own: tuple[tuple[str, str], ...] = ()
            try:
                own = identity(context, self._metrics)
                logs.request_id.set(own[0][1])
                logs.peer.set(printable(context.peer()))
                context.set_trailing_metadata(own)
                if request is _UNREADABLE:
                    raise MalformedMessage
                response = await self._handled(method, behaviour, request, context, began)
            except (asyncio.CancelledError, CallIsDead):
                method.count(*self._why_cancelled(context, began), clock() - began)
                raise
            except grpc.aio.AbortError:  # the handler has ended the call by itself
                method.count(context.code(), Outcome.ERROR, clock() - began)
                raise
            except Exception as error:  # whatever it is, the caller gets a status and no internals
                status = self._status_of(error, method)
                # Counted first: whoever has the answer finds it counted, and a stopping server cannot drop it.
                method.count(status.code, status.outcome, clock() - began)
            else:
                method.count(grpc.StatusCode.OK, Outcome.OK, clock() - began)
                return response
            finally:
                if doorway is not None:
                    doorway.left(method.path)
            # Not where the error is being handled: what is raised there would refer to it.
            await end_call(context, status.code, status.text, (*own, *status.trailers))
            return None

        return call

    async def _handled(
        self, method: "_GuardedMethod", behaviour: Behaviour, request: Any, context: Any, began: float
    ) -> Any:
        """Handle a call; one for generation within the caller's deadline, which gRPC enforces, and the server's own."""
        remaining_s = context.time_remaining()
        longest_s = self._max_duration_s - (self._clock() - began)
        in_time = remaining_s is not None and remaining_s <= longest_s
        deadline_s = self._clock() + (remaining_s if in_time else longest_s)
        current_call.set(Call(began, deadline_s, caller_of(context, self._caller_key)))
        if not method.generates:
            return await behaviour(request, context)
        if remaining_s is None:
            self._metrics.deadline_missing()
        elif remaining_s <= 0:
            raise DeadlineExceeded("transport")
        return await (behaviour(request, context) if in_time else _within(longest_s, behaviour(request, context)))

    def _why_cancelled(self, context: Any, began: float) -> tuple[grpc.StatusCode, Outcome]:
        """Whether its deadline ended a call, or else its caller, who waits for it no more either when it has come."""
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            whole_s = remaining_s + self._clock() - began
            if remaining_s <= min(_DEADLINE_PART * whole_s, _DEADLINE_NEAR_S):
                return grpc.StatusCode.DEADLINE_EXCEEDED, Outcome.DEADLINE
        return grpc.StatusCode.CANCELLED, Outcome.CANCELLED

    def _status_of(self, error: Exception, method: "_GuardedMethod") -> RpcStatus:
        if type(error) in STATUSES:
            return rpc_status_of(error, stretch=stretched(self._jitter))
        error_id = secrets.token_hex(8)
        fields = {"event": "handler_failed", "method": method.path, "error_id": error_id}
        _log.error("handler_failed", exc_info=error, extra=fields)
        return rpc_status_of(UnexpectedFailure(error_id), stretch=1)


class _GuardedMethod:
    """One method as the guard counts and logs it."""

    def __init__(self, path: str, series: MethodMetrics, metrics: Metrics, *, generates: bool = False) -> None:
        self.path = path
        self.generates = generates
        self.metrics = series
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


class _LostCallers:
    """Tells the log of calls to methods that there are not: of each caller's address once, and of so many at most.

    The name is not known: nobody may read it, see `aio_server`.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, peer: str) -> None:
        """A caller, as gRPC has it, has called such a method."""
        address = peer.rpartition(":")[0]
        if address in self._told or len(self._told) >= _LOST_CALLERS:
            return
        self._told.add(address)
        last = len(self._told) == _LOST_CALLERS
        _log.warning("unknown_method", extra={"event": "unknown_method", "further_ones_are_told": not last})


def identity(context: Any, metrics: Metrics) -> tuple[tuple[str, str], ...]:
    """The id of a call, as metadata that echoes it at the end: headers sent early would rule out a retry."""
    request_id = ""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and not request_id:
            request_id = printable(value)
        elif key == _ATTEMPTS_KEY:
            metrics.retry_seen()
    return ((REQUEST_ID_KEY, request_id or f"{_ids.getrandbits(64):016x}"),)


def caller_of(context: Any, key: str | None) -> str:
    """Who makes a call: what it says under a key, else the connection that it comes on."""
    if key is not None:
        for name, value in context.invocation_metadata() or ():
            if name == key:
                return printable(value)
    peer: str = context.peer()
    return peer


def printable(value: str | bytes) -> str:
    """At most 128 printable ASCII characters of what a caller calls something."""
    text = value[:_LONGEST_NAME]
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


async def _within(longest_s: float, work: Awaitable[Any]) -> Any:
    """The result of work that may take so many seconds.

    Raises:
        DeadlineExceeded: it took longer.
    """
    limit = asyncio.timeout(longest_s)
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if limit.expired():
            raise DeadlineExceeded("execution") from error
        raise


def _written(function: Any) -> Behaviour:
    """A method's function; one that yields its responses becomes one that writes them."""
    if not inspect.isasyncgenfunction(function):
        behaviour: Behaviour = function
        return behaviour

    async def write_all(request: Any, context: Any) -> None:
        responses: AsyncIterator[Any] = function(request, context)
        async for response in responses:
            await context.write(response)

    return write_all


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that does not raise: gRPC would tell the caller the exception's text."""

    def read(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError:
            return _UNREADABLE

    return read
