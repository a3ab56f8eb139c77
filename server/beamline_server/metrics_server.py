"""Serves the metrics over HTTP: one page, one request per connection, on one thread.

Whatever the peers do, it holds a fixed number of connections, each for some seconds, and costs the service no more than
the rendering of pages.
"""

import asyncio
import functools
import http.client
import io
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, make_wsgi_app

from beamline_server.listening import listening_sockets

PATH = "/metrics"
MOST_CONNECTIONS = 64
"""Connections at a time; for a further one, the one that is there longest has to go."""

_LONGEST_HEAD = 16 * 1024
_PAUSE_S = 0.1
_TEXT = ("Content-Type", "text/plain; charset=utf-8")

Headers = Sequence[tuple[str, str]]
_log = logging.getLogger(__name__)


class MetricsServer:
    """Serves a registry at /metrics from a thread of its own, until it is closed.

    Args:
        registry: What is served.
        host: Where to listen.
        port: The port; a free one for 0.
        request_s: Time for a request to arrive, in seconds.
        response_s: Time for a response to be taken, in seconds.
        failed: Is called, on another thread, if it ends without having been closed.

    Raises:
        OSError | ValueError: the address cannot be listened on.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        *,
        request_s: float = 5,
        response_s: float = 5,
        failed: Callable[[], object] = lambda: None,
    ) -> None:
        self._page = make_wsgi_app(registry)
        self._request_s = request_s
        self._response_s = response_s
        self._failed = failed
        self._connections: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._sockets = listening_sockets(host, port)
        self.port: int = self._sockets[0].getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop all connections and free the port. Closing twice is allowed."""
        with suppress(RuntimeError):  # the loop is closed, and with it everything
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # cancels all tasks at its end
                runner.run(self._serve())
        except Exception:
            _log.exception("the metrics are served no more", extra={"event": "metrics_stopped"})
            self._failed()
        finally:
            for each in self._sockets:
                each.close()

    async def _serve(self) -> None:
        for each in self._sockets:
            self._listen(each)
        await self._stop.wait()
        for each in self._sockets:
            self._loop.remove_reader(each)

    def _listen(self, listening: socket.socket) -> None:
        if not self._stop.is_set():
            self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except (BlockingIOError, ConnectionError):  # the peer has gone again
            return
        except OSError:  # no descriptor is free
            self._loop.remove_reader(listening)
            self._loop.call_later(_PAUSE_S, self._listen, listening)
            return
        if len(self._connections) >= MOST_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        connection.setblocking(False)
        task = self._loop.create_task(self._connected(connection))
        self._connections[task] = None
        task.add_done_callback(functools.partial(self._ended, connection))

    def _ended(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._connections.pop(task, None)
        connection.close()

    async def _connected(self, connection: socket.socket) -> None:
        with suppress(TimeoutError, EOFError, OSError):  # it is too slow, or gone
            async with asyncio.timeout(self._request_s):
                head = await self._head(connection)
            response = self._response(head)
            async with asyncio.timeout(self._response_s):
                await self._loop.sock_sendall(connection, response)
                connection.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(connection, _LONGEST_HEAD):
                    pass  # closed with something unread, the connection would be reset, and the response perhaps lost

    async def _head(self, connection: socket.socket) -> bytes:
        """The request up to its empty line, or as much of it as is borne."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) <= _LONGEST_HEAD:
            received = await self._loop.sock_recv(connection, _LONGEST_HEAD)
            if not received:
                raise EOFError
            head += received
        return head

    def _response(self, head: bytes) -> bytes:
        head, end, _ = head.partition(b"\r\n\r\n")
        if not end or len(head) > _LONGEST_HEAD:
            return _message("431 Request Header Fields Too Large", _text("the request's head is too long"))
        try:
            method, target, fields = _parsed(head)
        except (ValueError, http.client.HTTPException):
            return _message("400 Bad Request", _text("expected an HTTP/1.1 request"))
        if target.path != PATH:
            return _message("404 Not Found", _text(f"the metrics are at {PATH}"), method)
        if method not in ("GET", "HEAD"):
            return _message("405 Method Not Allowed", _text("use GET or HEAD"), method, [("Allow", "GET, HEAD")])
        return self._rendered(method, target.query, fields)

    def _rendered(self, method: str, query: str, fields: http.client.HTTPMessage) -> bytes:
        """The page, in the format and encoding that the request prefers."""
        started: list[tuple[str, Headers]] = []
        wanted = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": PATH,
            "QUERY_STRING": query,
            "HTTP_ACCEPT": fields.get("Accept"),
            "HTTP_ACCEPT_ENCODING": fields.get("Accept-Encoding"),
        }
        try:
            body = b"".join(self._page(wanted, lambda status, headers: started.append((status, headers))))
        except Exception:
            _log.exception("metrics_failed", extra={"event": "metrics_failed"})
            return _message("500 Internal Server Error", _text("the log has the cause"), method)
        ((status, headers),) = started
        return _message(status, (body, headers), method)


def _parsed(head: bytes) -> tuple[str, Any, http.client.HTTPMessage]:
    line, _, fields = (head + b"\r\n\r\n").partition(b"\r\n")
    method, target, version = line.decode("ascii").split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    return method, urlsplit(target), http.client.parse_headers(io.BytesIO(fields))


def _text(line: str) -> tuple[bytes, Headers]:
    return f"{line}\n".encode(), [_TEXT]


def _message(status: str, content: tuple[bytes, Headers], method: str = "GET", more: Headers = ()) -> bytes:
    body, headers = content
    fields = [*headers, *more, ("Content-Length", str(len(body))), ("Connection", "close")]
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("ascii") + (b"" if method == "HEAD" else body)
