"""grpcio's asyncio server, which bears any method name and refuses calls before it reads them.

grpcio (seen with 1.85.1) decodes the name of an unknown method in the loop that takes all calls: one call whose name is
no UTF-8 raises there, and nobody is answered any more. Here that loop takes the calls of known methods alone, whose
names it need not read. Calls of all others are taken by a loop that does not ask for their name, and answered alike.

grpcio takes a call of each method at a time, reads it and makes some tasks for it. Here many are taken at a time, and
those that a gate refuses are answered at once: nothing is read, and no task of grpcio's is made.

To answer is what costs most of a refusal. Where more calls come than can be answered, the newest are decided first,
which have most of their time left; those whose time is over need no answer any more. First come, first served would
spend all time on calls that are nearly late, and let in none in time.

Both are made of grpcio's own parts, private ones: where another version has none of them, its server is taken as it is,
and the log says so.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

from beamline_server.metrics import Outcome
from beamline_server.rpc.call import end_call
from beamline_server.rpc.errors import RpcStatus

UNKNOWN_METHOD_PATH = "/unknown/unknown"
_LOOK_EVERY_S = 0.2
_Core: Any = cygrpc
_Server: Any = _server.Server
_PARTS = {
    _Core: ("_handle_rpc", "_schedule_rpc_coro", "_MethodResolver", "_ServicerContext"),
    _Core.AioServer: ("_request_call", "_request_registered_call", "_make_request_call_future"),
}
"""What is needed of grpcio, and where."""
_TAKEN_AT_A_TIME, OTHERS_AT_A_TIME = 256, 8
"""Calls that are taken at a time, of each method that generates and of each other one."""
_ANSWERED_WITHIN_S = 0.05
"""Who does not take its refusal within so long is not waited for."""
_DECIDED_AT_A_TIME = 32
MOST_UNDECIDED = 4096
_OLDEST_EVERY = 8
"""One of so many that are decided is the oldest, so that those without a deadline have their turn, too."""
_log = logging.getLogger(__name__)
_grpcio_log = logging.getLogger("grpc._cython.cygrpc")


def _is_no_fault(record: logging.LogRecord) -> bool:
    """Whether grpcio tells of something else than that its handler does not know who has ended the call: a gate has."""
    return not str(record.msg).startswith("Abort error unexpectedly suppressed")


class Gate(Protocol):
    """What calls come to first."""

    def __call__(self, path: bytes | None, context: Any) -> RpcStatus | None:
        """How to end a call of a path (None: of no method that there is), given its context; or None to let it in."""
        ...

    def is_to_decide(self, path: bytes) -> bool:
        """Whether calls of a path may be refused for what comes at the same time."""
        ...

    def too_late(self, path: bytes) -> None:
        """A call has not been decided by its deadline."""
        ...

    @property
    def draining(self) -> RpcStatus:
        """How calls end that come when there are no more to come."""
        ...

    def turn(self, path: bytes) -> asyncio.Future[None] | None:
        """What a call that was let in has to wait for before it may send its message; None for nothing."""
        ...

    def may_send(self, path: bytes, context: Any) -> None:
        """A call that has waited for its turn may send its message."""
        ...


class _OpenGate:
    """Lets everybody in."""

    def __call__(self, path: bytes | None, context: Any) -> None:
        del path, context

    def is_to_decide(self, path: bytes) -> bool:
        del path
        return False

    def too_late(self, path: bytes) -> None:
        del path

    draining = RpcStatus(grpc.StatusCode.UNAVAILABLE, "the server is draining", (), Outcome.UNAVAILABLE)

    def turn(self, path: bytes) -> None:
        del path

    def may_send(self, path: bytes, context: Any) -> None:
        del path, context


class AioServer(_Server):  # type: ignore[misc]  # grpc has no type information
    """A `grpc.aio.Server`.

    Args:
        interceptors: What calls go through.
        options: The transport's options.
        gate: What calls come to first; by default all are let in.
    """

    def __init__(
        self, interceptors: Sequence[Any] = (), options: Sequence[tuple[str, int]] = (), gate: Gate | None = None
    ) -> None:
        if all(hasattr(where, part) for where, parts in _PARTS.items() for part in parts):
            self._loop = _Core.get_working_loop()
            self._server = _Tolerant(self._loop, None, (), tuple(interceptors), tuple(options), None)
            _grpcio_log.addFilter(_is_no_fault)
            self._server.guards, self._server.gate = tuple(interceptors), gate or _OpenGate()
            return
        super().__init__(None, (), interceptors, options, None, None)
        message = "grpcio has other parts than expected: a call whose path is no UTF-8 can end the server"
        _log.warning(message, extra={"event": "grpc_as_it_is", "grpcio": grpc.__version__})

    async def ended(self) -> None:
        """Wait until it takes no calls any more; by itself, unless it has been stopped."""
        while self._server.is_running():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(_LOOK_EVERY_S)


@dataclass(slots=True)
class _Call:
    """A call that has come.

    Attributes:
        method: Its path.
        state: What grpcio has of it.
        context: What handlers see of it.
    """

    method: bytes
    state: Any
    context: Any

    @property
    def is_late(self) -> bool:
        """Whether its deadline has come."""
        remaining_s = self.context.time_remaining()
        return remaining_s is not None and remaining_s <= 0


async def _refuse(context: Any, status: RpcStatus) -> None:
    try:
        await end_call(context, status.code, status.text, status.trailers)
    except Exception:  # one call that cannot be ended ends no other
        _log.exception("a call could not be refused", extra={"event": "refusal_failed"})


class Undecided:
    """Calls that wait to be decided: the newest is next, but for every eighth, which is the oldest."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque()
        self._turns = itertools.count(1)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: _Call) -> list[_Call]:
        """One more has come; returns the oldest ones whose time is over, which are here no more."""
        late = []
        while self._calls and self._calls[0].is_late:
            late.append(self._calls.popleft())
        self._calls.append(call)
        return late

    def next(self) -> _Call:
        """The one to decide, which is here no more."""
        return self._calls.pop() if next(self._turns) % _OLDEST_EVERY else self._calls.popleft()


class _Tolerant(_Core.AioServer):  # type: ignore[misc]  # as above
    """What is inside of it.

    Attributes:
        guards: What calls go through.
        gate: What they come to first.
    """

    guards: tuple[Any, ...]
    gate: Gate

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._let_in: dict[bytes, deque[Any]] = {}
        self._waiting: dict[bytes, asyncio.Future[Any] | None] = {}
        self._broken: dict[bytes, Exception] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._undecided = Undecided()
        self._deciding = 0

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """The next call of a method that is let in; for None, one that never comes."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if method is None:
            self._keep(loop.create_task(self._take_others(future)))
            return future
        if method not in self._let_in:
            self._let_in[method], self._waiting[method] = deque(), None
            for _ in range(_TAKEN_AT_A_TIME if self.gate.is_to_decide(method) else OTHERS_AT_A_TIME):
                self._keep(loop.create_task(self._take(method)))
        if self._let_in[method]:
            future.set_result(self._let_in[method].popleft())
        elif method in self._broken:
            future.set_exception(self._broken[method])
        else:
            self._waiting[method] = future
        return future

    async def _take(self, method: bytes) -> None:
        """Take calls of a method; hand those that are let in to grpcio's loop, with what ends this one."""
        try:
            while True:
                await self._take_one(method)
        except Exception as error:  # grpcio's loop knows which ones belong to its end
            self._broken[method] = error
            if (waiting := self._waiting[method]) is not None and not waiting.done():
                waiting.set_exception(error)

    async def _take_one(self, method: bytes) -> None:
        """Take a call. A coroutine of its own, of which nothing stays: it would keep all that the call has brought."""
        state = await self._request_registered_call(method)
        call = _Call(method, state, _Core._ServicerContext(state, None, None, asyncio.get_running_loop()))
        if not self.gate.is_to_decide(method):
            await self._decide(call)
        elif self._deciding >= _DECIDED_AT_A_TIME and len(self._undecided) < MOST_UNDECIDED:
            for late in self._undecided.add(call):
                self.gate.too_late(late.method)
        else:
            self._deciding += 1
            try:
                await self._decide(call)
                del call
                while len(self._undecided):
                    await self._decide(self._undecided.next())
            finally:
                self._deciding -= 1

    async def _decide(self, call: "_Call") -> None:
        """Refuse a call, or hand it to grpcio's loop."""
        if await self._is_refused(call.method, call.context):
            return
        if (turn := self.gate.turn(call.method)) is None:
            self._hand_over(call)
        else:
            self._keep(asyncio.get_running_loop().create_task(self._hand_over_after(turn, call)))

    async def _hand_over_after(self, turn: asyncio.Future[None], call: _Call) -> None:
        await turn
        self._hand_over(call)

    def _hand_over(self, call: _Call) -> None:
        """A call may send its message, and grpcio's loop takes it; if that has ended, nobody would."""
        self.gate.may_send(call.method, call.context)
        if call.method in self._broken:
            self._keep(asyncio.get_running_loop().create_task(_refuse(call.context, self.gate.draining)))
        elif (waiting := self._waiting[call.method]) is not None and not waiting.done():
            self._waiting[call.method] = None
            waiting.set_result(call.state)
        else:
            self._let_in[call.method].append(call.state)

    async def _is_refused(self, method: bytes | None, context: Any) -> bool:
        """Whether the gate refuses a call; if so, it is answered."""
        try:
            status = self.gate(method, context)
        except Exception:  # a fault of the gate refuses nobody
            _log.exception("the gate has failed", extra={"event": "gate_failed"})
            return False
        if status is None:
            return False
        task = asyncio.get_running_loop().create_task(_refuse(context, status))
        self._keep(task)
        await asyncio.wait({task}, timeout=_ANSWERED_WITHIN_S)
        return True

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_others(self, ended: asyncio.Future[Any]) -> None:
        """Take calls of methods that there are not, whatever they are called; tell grpcio's loop what ends this one."""
        try:
            while True:
                await self._take_other()
        except Exception as error:  # as above
            if not ended.done():
                ended.set_exception(error)

    async def _take_other(self) -> None:
        loop, nobody = asyncio.get_running_loop(), _Core._MethodResolver([], {})
        state = await self._request_call()
        if not await self._is_refused(None, _Core._ServicerContext(state, None, None, loop)):
            answer = _Core._handle_rpc(UNKNOWN_METHOD_PATH, nobody, self.guards, state, loop, False)
            self._keep(loop.create_task(_Core._schedule_rpc_coro(answer, state, loop, UNKNOWN_METHOD_PATH)))
