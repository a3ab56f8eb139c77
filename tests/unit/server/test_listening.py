"""Where a server listens, both ports alike, and what an operator is told where it cannot."""

import resource
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry

from beamline_server.app import main
from beamline_server.listening import address_of, connections, listening_sockets
from beamline_server.metrics_server import MetricsServer
from beamline_server.rpc.server import bind
from beamline_server.settings import SettingsError, read_command

REACHED = [
    ("127.0.0.1", ["127.0.0.1"]),
    ("0.0.0.0", ["127.0.0.1"]),
    pytest.param("::1", ["::1"], marks=pytest.mark.ipv6),
    pytest.param("::", ["::1", "127.0.0.1"], marks=pytest.mark.ipv6),
    ("localhost", ["127.0.0.1"]),
]
"""Hosts, and addresses on which somebody answers then."""


@pytest.mark.parametrize(("host", "addresses"), REACHED)
def test_the_metrics_answer_on_each_address_of_the_host(host: str, addresses: Sequence[str]) -> None:
    with MetricsServer(CollectorRegistry(), host, 0) as server:
        for address in addresses:
            with socket.create_connection((address, server.port), timeout=10) as connection:
                connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(("host", "addresses"), REACHED)
async def test_calls_are_answered_on_each_address_of_the_host(host: str, addresses: Sequence[str]) -> None:
    server = grpc.aio.server()
    port = bind(server, host, 0)
    await server.start()
    try:
        for address in addresses:
            async with grpc.aio.insecure_channel(address_of(address, port)) as channel:
                call = channel.unary_unary("/nobody/knows")(b"", timeout=10)
                assert await call.code() == grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(None)


def test_all_addresses_of_a_name_have_the_same_port() -> None:
    with ExitStack() as opened:
        sockets = [opened.enter_context(each) for each in listening_sockets("localhost", 0)]
        assert len({each.getsockname()[1] for each in sockets}) == 1


def test_a_name_is_refused_if_its_port_is_taken_on_one_of_its_addresses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        listening_sockets("localhost", taken.getsockname()[1])


@pytest.mark.parametrize(("given", "meant"), [("[::1]", "::1"), ("[::]", "::"), ("::1", "::1"), ("[x]", "[x]")])
def test_an_address_may_be_written_as_in_a_url(given: str, meant: str) -> None:
    assert read_command(["bundle", "--host", given], {}).settings.host == meant


def test_there_are_no_more_connections_than_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert connections(None) == 1024 - 128
    assert connections(500) == 500
    with pytest.raises(SettingsError, match=r"max_connections: 1000 connections need 1128 descriptors \(ulimit -n\)"):
        connections(1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert connections(None) == 4096
    assert connections(100_000) == 100_000


ON_NAMES = "expected an address of this machine"


@pytest.mark.parametrize(
    ("host", "advice"),
    [
        ("eth0", ON_NAMES),
        ("lo", ON_NAMES),
        ("no such host", ON_NAMES),
        ("127.0.0.1:8001", ON_NAMES),
        ("[::1", ON_NAMES),
        ("[x]", ON_NAMES),
        ("http://localhost", ON_NAMES),
        (".", ON_NAMES),
        ("x" * 70, ON_NAMES),
        ("203.0.113.1", "it is no address of this machine; 0.0.0.0 and :: stand for all that it has"),
        ("2001:db8::1", "it is no address of this machine; 0.0.0.0 and :: stand for all that it has"),
    ],
)
def test_a_host_that_is_none_is_told_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str, advice: str
) -> None:
    assert main([str(tmp_path), "--host", host, "--metrics-port", "0", "--grpc-port", "0"]) == 2

    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"beamline serve: {address_of(host, 0)} cannot be listened on for metrics (")
    assert advice in line
