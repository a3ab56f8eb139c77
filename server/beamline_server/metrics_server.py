"""Serves the metrics over HTTP: one page, one request per connection, on one thread.

Whatever the peers do, it holds a fixed number of connections, each for some seconds, and costs the service no more than
the rendering of pages.
"""

import asyncio
import http.client
import io
import logging
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, make_wsgi_app

from beamline_server.listening import bound_sockets

PATH = "/metrics"
MOST_CONNECTIONS = 64
"""Connections at a time; for a further one, the one that is there longest has to go."""
REQUEST_S = 5.0
"""Time for a request to arrive, in seconds."""
RESPONSE_S = 5.0
"""Time for a response to be taken, in seconds."""

_LONGEST_HEAD = 16 * 1024
_BACKLOG = 128
_TEXT = ("Content-Type", "text/plain; charset=utf-8")

Headers = Sequence[tuple[str, str]]
_log = logging.getLogger(__name__)


class MetricsServer:
    """Serves a registry at /metrics from a thread of its own, until it is closed.

    Raises:
        OSError | ValueError: the address cannot be listened on.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._page = make_wsgi_app(registry)
        self._connections: dict[asyncio.Task[Any], None] = {}  # the oldest first
        self._sockets = bound_sockets(host, port)
        self.port: int = self._sockets[0].getsockname()[1]
        try:
            for each in self._sockets:
                each.listen(_BACKLOG)
        except OSError:
            self._close_sockets()
            raise
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
        """Drop all connections and free the port."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _close_sockets(self) -> None:
        for each in self._sockets:
            each.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # cancels the connections at its end
            runner.run(self._serve())

    async def _serve(self) -> None:
        serve, limit = asyncio.start_server, _LONGEST_HEAD
        servers = [await serve(self._connected, sock=each, backlog=_BACKLOG, limit=limit) for each in self._sockets]
        await self._stop.wait()
        for server in servers:
            server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MOST_CONNECTIONS:
            next(iter(self._connections)).cancel()
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = None
        try:
            await self._answer(reader, writer)
        except (asyncio.CancelledError, TimeoutError, EOFError, OSError):
            pass  # it was too slow, or is gone, or has to go
        finally:
            del self._connections[task]
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
            response = self._response(head)
        except asyncio.LimitOverrunError:
            response = _message("431 Request Header Fields Too Large", _text("the request's head is too long"))
        async with asyncio.timeout(RESPONSE_S):
            writer.write(response)
            await writer.drain()
            writer.write_eof()
            while await reader.read(_LONGEST_HEAD):
                pass  # closed with something unread, the connection would be reset, and the response perhaps lost

    def _response(self, head: bytes) -> bytes:
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
    line, _, fields = head.partition(b"\r\n")
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
