"""grpcio's asyncio server, which bears any method name and refuses calls before it reads them.

grpcio (seen with 1.85.1) decodes the name of an unknown method in the loop that takes all calls: one call whose name is
no UTF-8 raises there, and nobody is answered any more. Here that loop takes the calls of known methods alone, whose
names it need not read. Calls of all others are taken by a loop that does not ask for their name, and answered alike.

grpcio takes a call of each method at a time, reads it and makes some tasks for it. Here several are taken at a time,
and those that a gate refuses are answered at once: nothing is read, and no task of grpcio's is made.

Both are made of grpcio's own parts, private ones: where another version has none of them, its server is taken as it is,
and the log says so.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

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
_TAKEN_AT_A_TIME = 128
Gate = Callable[[bytes | None, Any], RpcStatus | None]
"""Says how to end a call of a path (None: of no method that there is), given its context; or None to let it in."""
_log = logging.getLogger(__name__)


def _let_in(path: bytes | None, context: Any) -> None:
    del path, context


class AioServer(_Server):  # type: ignore[misc]  # grpc has no type information
    """A `grpc.aio.Server`.

    Args:
        interceptors: What calls go through.
        options: The transport's options.
        gate: What calls come to first.
    """

    def __init__(
        self, interceptors: Sequence[Any] = (), options: Sequence[tuple[str, int]] = (), gate: Gate = _let_in
    ) -> None:
        if all(hasattr(where, part) for where, parts in _PARTS.items() for part in parts):
            self._loop = _Core.get_working_loop()
            self._server = _Tolerant(self._loop, None, (), tuple(interceptors), tuple(options), None)
            self._server.guards, self._server.gate = tuple(interceptors), gate
            return
        super().__init__(None, (), interceptors, options, None, None)
        message = "grpcio has other parts than expected: a call whose path is no UTF-8 can end the server"
        _log.warning(message, extra={"event": "grpc_as_it_is", "grpcio": grpc.__version__})

    async def ended(self) -> None:
        """Wait until it takes no calls any more; by itself, unless it has been stopped."""
        while self._server.is_running():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(_LOOK_EVERY_S)


async def _refuse(context: Any, status: RpcStatus) -> None:
    with suppress(grpc.aio.AbortError, _Core.InternalError, _Core.ExecuteBatchError):  # it is over, or the caller gone
        await context.abort(status.code, status.text, status.trailers)


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

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """The next call of a method that is let in; for None, one that never comes."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if method is None:
            self._keep(loop.create_task(self._take_others(future)))
            return future
        if method not in self._let_in:
            self._let_in[method], self._waiting[method] = deque(), None
            for _ in range(_TAKEN_AT_A_TIME):
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
                state = await self._request_registered_call(method)
                if self._is_refused(method, state):
                    continue
                if (waiting := self._waiting[method]) is not None and not waiting.done():
                    self._waiting[method] = None
                    waiting.set_result(state)
                else:
                    self._let_in[method].append(state)
        except Exception as error:  # grpcio's loop knows which ones belong to its end
            self._broken[method] = error
            if (waiting := self._waiting[method]) is not None and not waiting.done():
                waiting.set_exception(error)

    def _is_refused(self, method: bytes | None, state: Any) -> bool:
        """Whether the gate refuses a call; if so, it is answered."""
        loop = asyncio.get_running_loop()
        context = _Core._ServicerContext(state, None, None, loop)
        try:
            status = self.gate(method, context)
        except Exception:  # a fault of the gate refuses nobody
            _log.exception("the gate has failed", extra={"event": "gate_failed"})
            return False
        if status is not None:
            self._keep(loop.create_task(_refuse(context, status)))
        return status is not None

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_others(self, ended: asyncio.Future[Any]) -> None:
        """Take calls of methods that there are not, whatever they are called; tell grpcio's loop what ends this one."""
        loop, nobody = asyncio.get_running_loop(), _Core._MethodResolver([], {})
        try:
            while True:
                state = await self._request_call()
                if self._is_refused(None, state):
                    continue
                answer = _Core._handle_rpc(UNKNOWN_METHOD_PATH, nobody, self.guards, state, loop, False)
                self._keep(loop.create_task(_Core._schedule_rpc_coro(answer, state, loop, UNKNOWN_METHOD_PATH)))
        except Exception as error:  # as above
            if not ended.done():
                ended.set_exception(error)
