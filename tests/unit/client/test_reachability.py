"""What a person is told when something other than a ready server is at the address."""

import shutil
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from prometheus_client import CollectorRegistry

from beamline_client import BeamlineError, DeadlineExceeded, ProtocolError, Unavailable
from beamline_client.main import main
from beamline_client.reachability import hint_for
from beamline_client.testing import FakeServer
from beamline_server.metrics_server import MetricsServer

Call: TypeAlias = Callable[..., Any]


def failure(call: Call, target: str, **client: Any) -> BeamlineError:
    with pytest.raises(BeamlineError) as failed:
        call(target, "generate_one", "x", client=client)
    return failed.value


def told(command: str, target: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([command, *(["x"] if command == "translate" else []), "--server", target]) in {1, 2}
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", ["translate", "load"])
def test_the_port_of_the_metrics_is_told_apart(command: str, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsServer(CollectorRegistry(), "127.0.0.1", 0) as page:
        target = f"127.0.0.1:{page.port}"

        assert "does not speak gRPC; a server's metrics have another port" in str(failure(call, target))
        assert "does not speak gRPC; a server's metrics have another port" in told(command, target, capsys)


@pytest.mark.parametrize("command", ["translate", "load"])
def test_a_port_where_nothing_listens(command: str, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as stopped:
        target = stopped.target

    assert "nothing listens there" in str(failure(call, target))
    assert f"cannot reach a server at {target}: nothing listens there. Start one" in told(command, target, capsys)


@pytest.mark.parametrize("command", ["translate", "load"])
def test_a_port_of_localhost_where_nothing_listens(
    command: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer() as stopped:
        target = f"localhost:{stopped.target.rpartition(':')[2]}"

    for text in (str(failure(call, target)), told(command, target, capsys)):
        assert "nothing listens there that speaks gRPC without TLS" in text
        assert "Client(" not in text  # of no use in a shell


@pytest.mark.parametrize("command", ["translate", "load"])
def test_a_host_that_nobody_knows(command: str, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    target = "no-such-host.onion:8001"  # gRPC's resolver asks nobody for such a name, by RFC 7686

    error = failure(call, target)

    assert isinstance(error, Unavailable)
    assert "host" in str(error.hint)
    assert f"cannot reach a server at {target}: " in told(command, target, capsys)


def test_a_listener_that_never_says_anything(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"

        assert main(["translate", "x", "--server", target, "--timeout", "0.5"]) == 1

    err = capsys.readouterr().err
    assert f"no answer from {target} within 0.5 s: " in err
    assert "check --server" in err


def test_a_server_of_something_else(call: Call) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        error = failure(call, f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()

    assert isinstance(error, ProtocolError)
    assert "check the address" in str(error)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[bytes, bytes]:
    """A self-signed certificate for localhost and its key."""
    openssl = shutil.which("openssl")
    assert openssl is not None, "needs the openssl command"
    arguments = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(
        [openssl, *arguments.split(), "-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
        check=True,
        capture_output=True,
    )
    return (tmp_path / "cert").read_bytes(), (tmp_path / "key").read_bytes()


def test_tls_on_one_side_alone(call: Call, certificate: tuple[bytes, bytes], server: FakeServer) -> None:
    root, key = certificate
    with FakeServer(credentials=grpc.ssl_server_credentials([(key, root)])) as secure:
        assert "Client(root_certificates=...)" in str(failure(call, secure.target))
        by_name = f"localhost:{secure.target.rpartition(':')[2]}"
        assert "without TLS" in str(failure(call, by_name))
    assert "does not speak TLS" in str(failure(call, server.target, root_certificates=root))


def test_hints_are_of_no_use_to_who_was_answered(server: FakeServer, call: Call) -> None:
    server.stream = server.hang

    with pytest.raises(DeadlineExceeded) as late:
        call(server.target, "stream", "x", timeout_s=0.3)

    assert late.value.hint is None


def test_a_connection_that_breaks_later_was_the_right_one() -> None:
    assert hint_for("failed to connect to all addresses; last error: UNAVAILABLE: Socket closed", "10.0.0.1:1")
    assert hint_for("Socket closed", "10.0.0.1:1") is None
