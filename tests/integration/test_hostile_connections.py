"""Connections that speak no gRPC, say nothing, or never end: they cost others nothing and hold up no stop."""

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from beamline_client import Client
from beamline_server.bundle import Bundle
from beamline_server.metrics_server import MOST_CONNECTIONS
from beamline_server.process import BEAMLINE, ServerProcess

IDLE_CONNECTIONS = {"grpc_port": 200, "metrics_port": 600}
A_FEW_FILES = 8
LONGEST_SCRAPE_S = 1
LONGEST_STOP_S = 5
GARBAGE = {
    "zeros": bytes(1000),
    "http 1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "broken http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 500,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00" + bytes(200),
}


@pytest.fixture
def connect() -> Iterator[Callable[[ServerProcess, str], socket.socket]]:
    """Opens a connection to a port of a server."""
    with ExitStack() as opened:

        def open_one(server: ServerProcess, port: str) -> socket.socket:
            address = ("127.0.0.1", server.log.wait_for("listening")[port])
            return opened.enter_context(socket.create_connection(address, timeout=5))

        yield open_one


@pytest.mark.parametrize("port", ["grpc_port", "metrics_port"])
@pytest.mark.parametrize("sent", GARBAGE.values(), ids=GARBAGE)
def test_garbage_harms_nobody(
    server: ServerProcess,
    client: Client,
    connect: Callable[[ServerProcess, str], socket.socket],
    port: str,
    sent: bytes,
) -> None:
    connection = connect(server, port)
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        while connection.recv(4096):
            pass  # until the server has enough of it

    assert client.generate_one("Bonjour.").hypotheses
    assert server.samples()["beamline_ready"] == 1


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n"], ids=["nothing", "half a request"])
def test_idle_connections_hold_up_neither_calls_nor_the_stop(
    serve: Callable[..., ServerProcess], connect: Callable[[ServerProcess, str], socket.socket], sent: bytes
) -> None:
    server = serve()
    server.samples()
    process = Path("/proc", str(server.process.pid))
    threads, files = (len(list((process / kind).iterdir())) for kind in ("task", "fd"))
    with Client(server.target) as client:
        for port, connections in IDLE_CONNECTIONS.items():
            for _ in range(connections):
                connect(server, port).sendall(sent if port == "metrics_port" else b"")
                assert len(list((process / "task").iterdir())) <= threads + 1

        began = time.monotonic()
        assert server.samples()["beamline_ready"] == 1
        assert time.monotonic() - began < LONGEST_SCRAPE_S
        assert client.generate_one("Bonjour.", timeout_s=5).hypotheses
        server.wait_until_serving(within_s=5)
        held = len(list((process / "fd").iterdir())) - files - IDLE_CONNECTIONS["grpc_port"]
        assert held <= MOST_CONNECTIONS + A_FEW_FILES

    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < LONGEST_STOP_S
    assert [line for line in server.log.text().splitlines() if not line.startswith("{")] == []


def with_limit(flags: str) -> tuple[str, ...]:
    """A program for `ServerProcess`: the server, with this limit of descriptors."""
    return "sh", "-c", f'ulimit {flags}; exec "$0" "$@"', str(BEAMLINE), "serve"


def test_more_silent_callers_than_descriptors_leave_the_metrics_readable(
    fr_en_int8: Bundle, connect: Callable[[ServerProcess, str], socket.socket]
) -> None:
    with ServerProcess(fr_en_int8.path, program=with_limit("-n 256")) as server:
        server.wait_until_serving()
        crowd = [connect(server, "grpc_port") for _ in range(400)]

        began = time.monotonic()
        assert server.samples()["beamline_ready"] == 1
        assert time.monotonic() - began < LONGEST_SCRAPE_S
        for connection in crowd:
            connection.close()
        with Client(server.target) as client:
            client.wait_ready(20)  # the server lets go of them one by one; until then it refuses whoever else comes
            assert client.generate_one("Bonjour.").hypotheses
        assert server.stop() == 0
        assert [line for line in server.log.text().splitlines() if not line.startswith("{")] == []


def test_the_server_takes_all_descriptors_that_it_may_have(fr_en_int8: Bundle) -> None:
    with ServerProcess(fr_en_int8.path, program=with_limit("-S -n 300")) as server:
        server.wait_until_serving()
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)

    assert soft == hard > 300
