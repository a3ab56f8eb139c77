"""The metrics over HTTP: what is answered to whom, and that no peer can keep others out."""

import http.client
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import NoReturn

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from beamline_server.metrics_server import MOST_CONNECTIONS, MetricsServer

CROWD = 600
A_FEW = 8
"""Connections that are just being closed."""
Fetch = Callable[..., http.client.HTTPResponse]


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("beamline_ready", "Whether.", registry=registry).set(1)
    return registry


@pytest.fixture
def server(registry: CollectorRegistry) -> Iterator[MetricsServer]:
    with MetricsServer(registry, "127.0.0.1", 0) as running:
        yield running


@pytest.fixture
def fetch(server: MetricsServer) -> Iterator[Fetch]:
    """Asks the server; the response's body is read already."""
    with ExitStack() as opened:

        def ask(method: str, target: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            opened.callback(connection.close)
            connection.request(method, target, body, headers)
            return connection.getresponse()

        yield ask


@pytest.fixture
def connect(server: MetricsServer) -> Iterator[Callable[[], socket.socket]]:
    with ExitStack() as opened:

        def open_one() -> socket.socket:
            return opened.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))

        yield open_one


def raw_answer(connection: socket.socket, sent: bytes) -> bytes:
    """Everything that comes back until the server closes the connection."""
    connection.sendall(sent)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def send_for_ever(connection: socket.socket) -> NoReturn:
    while True:
        connection.sendall(b"more")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("target", ["/metrics", "/metrics?x=1", "http://somewhere/metrics"])
def test_the_page_is_at_metrics(fetch: Fetch, target: str) -> None:
    response = fetch("GET", target)
    page = response.read()

    assert response.status == 200
    assert b"beamline_ready 1.0\n" in page
    assert response.headers["Content-Type"].startswith("text/plain")
    assert int(response.headers["Content-Length"]) == len(page)
    assert response.headers["Connection"] == "close"


def test_prometheus_gets_the_format_and_the_encoding_that_it_prefers(fetch: Fetch) -> None:
    response = fetch("GET", "/metrics", **{"Accept": "application/openmetrics-text", "Accept-Encoding": "gzip"})

    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert response.headers["Content-Encoding"] == "gzip"
    assert response.read().startswith(b"\x1f\x8b")


def test_head_has_the_headers_of_get_and_no_page(server: MetricsServer, fetch: Fetch) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = raw_answer(connection, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert f"Content-Length: {len(fetch('GET', '/metrics').read())}\r\n".encode() in head


@pytest.mark.parametrize("target", ["/", "/metric", "/metrics/", "/favicon.ico", "/health", "*"])
def test_there_is_nothing_else(fetch: Fetch, target: str) -> None:
    response = fetch("GET", target)

    assert (response.status, response.read()) == (404, b"the metrics are at /metrics\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_it_can_only_be_read(fetch: Fetch, method: str) -> None:
    response = fetch(method, "/metrics", b"x" * 50_000)

    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")
    assert response.read() == b"use GET or HEAD\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"\xff\xfe /metrics HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/2.0\r\n\r\n", b"400"),
        (b"GET //[x HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nCookie: " + b"x" * 100_000, b"431"),
    ],
    ids=["words", "bytes", "version", "target", "many headers", "long head"],
)
def test_what_is_no_request_is_told_so(connect: Callable[[], socket.socket], sent: bytes, status: bytes) -> None:
    assert raw_answer(connect(), sent).startswith(b"HTTP/1.1 " + status)


def test_a_page_that_cannot_be_rendered_is_an_error_of_the_server(
    registry: CollectorRegistry, fetch: Fetch, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenOnce(Collector):
        def describe(self) -> Iterator[GaugeMetricFamily]:
            yield GaugeMetricFamily("x", "X.")

        def collect(self) -> Iterator[GaugeMetricFamily]:
            if not caplog.records:
                raise RuntimeError("secret")
            yield GaugeMetricFamily("x", "X.", 1)

    registry.register(BrokenOnce())
    response = fetch("GET", "/metrics")

    assert (response.status, response.read()) == (500, b"the log has the cause\n")
    assert "secret" in caplog.text
    assert fetch("GET", "/metrics").status == 200


def test_a_crowd_that_says_nothing_keeps_nobody_out(fetch: Fetch, connect: Callable[[], socket.socket]) -> None:
    threads, files = set(threading.enumerate()), open_files()
    crowd = [connect() for _ in range(CROWD)]
    response = fetch("GET", "/metrics")

    assert response.status == 200
    assert set(threading.enumerate()) <= threads
    assert open_files() - files - CROWD <= MOST_CONNECTIONS + A_FEW
    assert [connection.recv(1) for connection in crowd[: CROWD - MOST_CONNECTIONS]] == [b""] * (
        CROWD - MOST_CONNECTIONS
    )


def test_a_crowd_that_does_not_read_keeps_nobody_out(fetch: Fetch, connect: Callable[[], socket.socket]) -> None:
    for _ in range(2 * MOST_CONNECTIONS):
        connect().sendall(b"GET /metrics HTTP/1.1\r\n\r\n")

    assert fetch("GET", "/metrics").status == 200


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half a request"])
def test_who_does_not_finish_asking_is_closed(registry: CollectorRegistry, sent: bytes) -> None:
    with (
        MetricsServer(registry, "127.0.0.1", 0, request_s=0.1) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
        suppress(ConnectionError),
    ):  # a client that was held up may send to a connection that is closed already
        assert raw_answer(connection, sent) == b""


def test_who_does_not_take_the_answer_is_closed(registry: CollectorRegistry) -> None:
    with (
        MetricsServer(registry, "127.0.0.1", 0, response_s=0.1) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        assert raw_answer(connection, b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        with pytest.raises(ConnectionError):  # it is not half open, but gone
            send_for_ever(connection)


def test_it_closes_with_connections_open_and_frees_its_port(registry: CollectorRegistry) -> None:
    threads = set(threading.enumerate())
    with ExitStack() as opened:
        with MetricsServer(registry, "127.0.0.1", 0) as server:
            address = ("127.0.0.1", server.port)
            silent = [opened.enter_context(socket.create_connection(address, timeout=10)) for _ in range(10)]
        assert set(threading.enumerate()) <= threads
        for connection in silent:
            with suppress(ConnectionResetError):  # what was not accepted yet
                assert connection.recv(1) == b""
        with MetricsServer(registry, *address) as again:
            assert again.port == address[1]


def test_closing_twice_is_no_error(registry: CollectorRegistry) -> None:
    with MetricsServer(registry, "127.0.0.1", 0) as server:
        server.close()


def test_a_thread_that_dies_is_told_in_the_log_and_leaves_a_server_that_can_be_closed(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    class Dying(MetricsServer):
        async def _serve(self) -> None:
            raise RuntimeError("no such file descriptor")

    with Dying(registry, "127.0.0.1", 0) as server:
        server._thread.join(10)
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", server.port), timeout=10)

    [record] = caplog.records
    assert (record.levelname, getattr(record, "event", None)) == ("ERROR", "metrics_stopped")
    assert "no such file descriptor" in caplog.text


def test_a_taken_port_is_an_error(registry: CollectorRegistry, server: MetricsServer) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsServer(registry, "127.0.0.1", server.port)
