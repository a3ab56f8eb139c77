"""Where calls wait for the engine: hands in requests, routes the engine's events back, and cancels what nobody awaits.

All of it runs on the event loop, but `Desk.deliver`, which the engine's threads call.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from beamline_server.engine.errors import EngineError, QueueFull, WouldBeLate
from beamline_server.engine.request import (
    Completed,
    Event,
    Failed,
    GenerationRequest,
    Piece,
    Priority,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.workers import EngineLoad
from beamline_server.rpc.call import Call
from beamline_server.rpc.errors import NotAccepting

_log = logging.getLogger(__name__)


class EngineLike(Protocol):
    """What the service needs of an engine. Thread-safe; no method but `stop` blocks."""

    def start(self) -> None:
        """Begin to work."""
        ...

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Accept all requests or none; each accepted one ends with one `Completed` or `Failed`.

        Raises:
            QueueFull | WouldBeLate | RequestTooLarge | SourceTooLong | EngineStopped: none was accepted.
        """
        ...

    def foreseen_refusal(self, caller: str, remaining_s: float, ahead: int) -> QueueFull | WouldBeLate | None:
        """Why a request that is not read yet, so many ahead of it, would be refused now; None if it may be accepted."""
        ...

    def cancel(self, ids: Sequence[RequestId]) -> None:
        """Drop these requests; each that has not ended yet ends with `Failed(RequestCancelled)`."""
        ...

    def load(self) -> EngineLoad:
        """What it holds now."""
        ...

    def give_up(self, number: int) -> None:
        """Give the worker of this number nothing more, and fail what it has."""
        ...

    def stop(self, grace_s: float) -> None:
        """Finish what was accepted, for up to `grace_s` seconds, and fail the rest with `EngineStopped`. Blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """One source sequence of a call, and how to search for its target.

    Of a model without an encoder, the source is a prompt; `context` are then the last of its tokens, behind which the
    text of the target is read.
    """

    tokens: tuple[int, ...]
    truncated: bool
    options: SearchOptions
    target_prefix: tuple[int, ...] = ()
    priority: Priority = Priority.NORMAL
    decoder_start: int | None = None
    forced_first: int | None = None
    context: tuple[int, ...] = ()


class _Ticket(Protocol):
    """Stands for requests whose call waits."""

    def take(self, event: Event) -> None: ...

    def open_ids(self) -> Sequence[RequestId]: ...


class Desk:
    """The one way from calls to the engine. Accepts requests from `open` until `close`.

    Args:
        loop: The event loop on which calls wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._engine: EngineLike | None = None
        self._closed = False
        self._numbers = itertools.count(1)
        self._tickets: dict[RequestId, _Ticket] = {}
        self._calls = 0
        self._finished, self._drained = asyncio.Event(), asyncio.Event()

    def open(self, engine: EngineLike) -> None:
        """Accept requests from now on, for this engine."""
        self._engine = engine

    def foreseen_refusal(self, caller: str, remaining_s: float, ahead: int) -> QueueFull | WouldBeLate | None:
        """As the engine's, while there is one."""
        engine = self._engine
        return None if engine is None or self._closed else engine.foreseen_refusal(caller, remaining_s, ahead)

    def require_open(self) -> None:
        """Raise NotAccepting while the model is loading."""
        if self._engine is None:
            raise NotAccepting("LOADING")

    def close(self) -> None:
        """Refuse new requests from now on; those in flight go on."""
        self._closed = True
        self._notice_drained()

    @property
    def is_closed(self) -> bool:
        """Whether it refuses new requests for good."""
        return self._closed

    @property
    def has_finished(self) -> bool:
        """Whether it is closed and every request has its outcome."""
        return self._finished.is_set()

    async def finished(self) -> None:
        """Wait until that is so."""
        await self._finished.wait()

    async def drained(self) -> None:
        """Wait until it has finished and every call that waited has sent its outcome, or its caller has gone."""
        await self._drained.wait()

    @property
    def in_flight(self) -> int:
        """Requests that the engine has accepted and not ended."""
        return len(self._tickets)

    def deliver(self, events: Sequence[Event]) -> None:
        """Take the engine's events, on any thread; a `Deliver`."""
        try:
            self._loop.call_soon_threadsafe(self._route, events)
        except RuntimeError:  # the loop is closed: nobody waits any more
            _log.debug("events came after the end", extra={"event": "late_events", "count": len(events)})

    async def ask(self, sources: Sequence[Source], call: Call) -> Sequence[Completed]:
        """Generate for all sources; if one fails, the others are cancelled.

        Returns:
            One outcome per source, in their order.

        Raises:
            NotAccepting: the desk is not open.
            EngineError: the engine's, for the first source that failed.
        """
        requests = self._requests(sources, call, stream=False)
        ticket = _Batch(self._loop, requests[0].id, len(requests))
        with self._placed(requests, ticket):
            return await ticket.answers()

    @contextmanager
    def stream(self, source: Source, call: Call) -> Iterator["TokenStream"]:
        """Generate for one source, with pieces on the way; leaving the block early cancels.

        Raises:
            NotAccepting: the desk is not open.
            EngineError: the engine's refusal.
        """
        requests = self._requests([source], call, stream=True)
        ticket = TokenStream(requests[0].id)
        with self._placed(requests, ticket):
            yield ticket

    def _requests(self, sources: Sequence[Source], call: Call, *, stream: bool) -> tuple[GenerationRequest, ...]:
        return tuple(
            GenerationRequest(
                id=RequestId(next(self._numbers)),
                source=source.tokens,
                options=source.options,
                deadline=call.deadline_s,
                stream=stream,
                target_prefix=source.target_prefix,
                caller=call.caller,
                priority=source.priority,
                decoder_start=source.decoder_start,
                forced_first=source.forced_first,
            )
            for source in sources
        )

    @contextmanager
    def _placed(self, requests: Sequence[GenerationRequest], ticket: _Ticket) -> Iterator[None]:
        engine = self._engine
        if engine is None or self._closed:
            raise NotAccepting("DRAINING" if self._closed else "LOADING")
        engine.submit(requests)
        # The engine's events come by way of the loop, so none can have come yet.
        for request in requests:
            self._tickets[request.id] = ticket
        self._calls += 1
        if _log.isEnabledFor(logging.DEBUG):
            fields = {"event": "request_accepted", "ids": [request.id for request in requests]}
            _log.debug("request_accepted", extra=fields)
        try:
            yield
        finally:
            if unfinished := ticket.open_ids():
                engine.cancel(unfinished)
            self._calls -= 1
            self._notice_drained()

    def _route(self, events: Sequence[Event]) -> None:
        tickets = self._tickets
        for event in events:
            ticket = tickets.get(event.id) if isinstance(event, Piece) else tickets.pop(event.id, None)
            if ticket is not None:
                ticket.take(event)
        self._notice_drained()

    def _notice_drained(self) -> None:
        if self._closed and not self._tickets:
            self._finished.set()
            if not self._calls:
                self._drained.set()


class _Batch:
    """Collects the outcomes of requests with consecutive ids."""

    __slots__ = ("_answers", "_error", "_first", "_missing", "_wake")

    def __init__(self, loop: asyncio.AbstractEventLoop, first: RequestId, count: int) -> None:
        self._first = first
        self._answers: list[Completed | None] = [None] * count
        self._missing = set(range(count))
        self._error: EngineError | None = None
        self._wake: asyncio.Future[None] = loop.create_future()

    def take(self, event: Event) -> None:
        """Note an outcome; the last one and the first failure wake the call."""
        index = event.id - self._first
        self._missing.discard(index)
        if isinstance(event, Completed):
            self._answers[index] = event
            if not self._missing:
                self._done()
        elif isinstance(event, Failed):
            self._error = self._error or event.error
            self._done()

    def open_ids(self) -> Sequence[RequestId]:
        """Requests that have not ended."""
        return [RequestId(self._first + index) for index in sorted(self._missing)]

    async def answers(self) -> Sequence[Completed]:
        """Wait for all of them."""
        await self._wake
        if self._error is not None:
            raise self._error
        return [answer for answer in self._answers if answer is not None]

    def _done(self) -> None:
        if not self._wake.done():
            self._wake.set_result(None)


class TokenStream:
    """The events of one request, as they come.

    Pieces that come while the reader is busy become one, so a slow reader holds up nobody and costs no more memory
    than its answer.
    """

    __slots__ = ("_end", "_id", "_tokens", "_wake")

    def __init__(self, number: RequestId) -> None:
        self._id = number
        self._tokens: list[int] = []
        self._end: Completed | Failed | None = None
        self._wake = asyncio.Event()

    def take(self, event: Event) -> None:
        """Note an event."""
        if isinstance(event, Piece):
            self._tokens.extend(event.tokens)
        else:
            self._end = event
        self._wake.set()

    def open_ids(self) -> Sequence[RequestId]:
        """The request, if it has not ended."""
        return [self._id] if self._end is None else []

    async def next(self) -> tuple[int, ...] | Completed:
        """Wait for further tokens, or for the end, which has all tokens whether they were told or not.

        Raises:
            EngineError: the request has failed.
        """
        await self._wake.wait()
        self._wake.clear()
        if isinstance(self._end, Failed):
            raise self._end.error
        if self._end is not None:
            return self._end
        tokens, self._tokens = tuple(self._tokens), []
        return tokens
