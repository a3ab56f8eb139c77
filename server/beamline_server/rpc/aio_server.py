"""grpcio's asyncio server, which bears any method name, and tells if its loop ends.

grpcio (seen with 1.85.1) decodes the name of an unknown method in the loop that takes all calls: one call whose name is
no UTF-8 raises there, and nobody is answered any more. Here that loop takes the calls of known methods alone, whose
names it need not read. Calls of all others are taken by a loop that does not ask for their name, and answered alike.

Both are made of grpcio's own parts, private ones: where another version has none of them, its server is taken as it is,
and the log says so.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

UNKNOWN_METHOD_PATH = "/unknown/unknown"
_LOOK_EVERY_S = 0.2
_Core: Any = cygrpc
_Server: Any = _server.Server
_PARTS = ("_request_call", "_make_request_call_future", "_serving_task_crash_handler")
_log = logging.getLogger(__name__)


class AioServer(_Server):  # type: ignore[misc]  # grpc has no type information
    """A `grpc.aio.Server`.

    Args:
        interceptors: What calls go through.
        options: The transport's options.
    """

    def __init__(self, interceptors: Sequence[Any] = (), options: Sequence[tuple[str, int]] = ()) -> None:
        if all(hasattr(_Core.AioServer, part) for part in _PARTS) and hasattr(_Core, "_schedule_rpc_coro"):
            self._loop = _Core.get_working_loop()
            self._server = _Tolerant(self._loop, None, (), tuple(interceptors), tuple(options), None)
            self._server.guards = tuple(interceptors)
            return
        super().__init__(None, (), interceptors, options, None, None)
        message = "grpcio has other parts than expected: a call whose path is no UTF-8 can end the server"
        _log.warning(message, extra={"event": "grpc_as_it_is", "grpcio": grpc.__version__})

    async def ended(self) -> None:
        """Wait until it takes no calls any more; by itself, unless it has been stopped."""
        while self._server.is_running():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(_LOOK_EVERY_S)


class _Tolerant(_Core.AioServer):  # type: ignore[misc]  # as above
    """What is inside of it.

    Attributes:
        guards: What calls go through.
    """

    guards: tuple[Any, ...]

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        future: asyncio.Future[Any]
        if method is not None:
            future = super()._make_request_call_future(method)
        else:
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._others = loop.create_task(self._take_others(future))
        return future

    async def _take_others(self, ended: asyncio.Future[Any]) -> None:
        """Take calls of methods that there are not, whatever they are called; tell grpcio's loop what ends this one."""
        loop, nobody = asyncio.get_running_loop(), _Core._MethodResolver([], {})
        answers: set[asyncio.Task[None]] = set()
        try:
            while True:
                state = await self._request_call()
                answer = _Core._handle_rpc(UNKNOWN_METHOD_PATH, nobody, self.guards, state, loop, False)
                task = loop.create_task(_Core._schedule_rpc_coro(answer, state, loop, UNKNOWN_METHOD_PATH))
                answers.add(task)
                task.add_done_callback(answers.discard)
        except Exception as error:  # grpcio's loop knows which ones belong to its end
            if not ended.done():
                ended.set_exception(error)
