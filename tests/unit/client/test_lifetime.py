"""From waiting for a server to closing the client: both faces, and what differs between them."""

import asyncio
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_client import AsyncClient, Cancelled, Client, Piece, ProtocolError, Unavailable
from beamline_client.testing import Failure, FakeServer

Call: TypeAlias = Callable[..., Any]


def test_closing_cancels_running_calls_of_other_threads(server: FakeServer) -> None:
    arrived = threading.Event()

    def generate(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        arrived.set()
        server.hang(request, context)
        raise AssertionError

    server.generate = generate
    client = Client(server.target)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate_one, "x")
        arrived.wait()
        client.close()
        with pytest.raises(Cancelled):
            running.result()
    client.close()


async def test_closing_cancels_running_calls_of_other_tasks(server: FakeServer) -> None:
    arrived = threading.Event()

    def generate(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        arrived.set()
        server.hang(request, context)
        raise AssertionError

    server.generate = generate
    client = AsyncClient(server.target)
    running = asyncio.create_task(client.generate_one("x"))
    await asyncio.to_thread(arrived.wait)
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await running
    await client.close()


class TestLeavingAStream:
    @pytest.fixture
    def cancelled(self, server: FakeServer) -> threading.Event:
        """Set when the server learns that its endless stream is not wanted any more."""
        cancelled = threading.Event()

        def stream(
            request: pb.GenerateStreamRequest, context: grpc.ServicerContext
        ) -> Iterator[pb.GenerateStreamResponse]:
            context.add_callback(cancelled.set)
            yield pb.GenerateStreamResponse(piece=pb.Piece(text="x"))
            server.hang(request, context)

        server.stream = stream
        return cancelled

    async def test_cancels_the_call_async(self, server: FakeServer, cancelled: threading.Event) -> None:
        async with AsyncClient(server.target) as client:
            events = client.stream("x")
            assert await anext(events) == Piece("x")
            await events.aclose()  # type: ignore[attr-defined]  # an async generator, as `break` would close it
            assert await asyncio.to_thread(cancelled.wait, 10)

    def test_cancels_the_call_sync(self, server: FakeServer, cancelled: threading.Event) -> None:
        with Client(server.target) as client:
            for event in client.stream("x"):
                assert event == Piece("x")
                break
            assert cancelled.wait(10)


def test_an_async_client_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("localhost:1")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[bytes, bytes]:
    """A self-signed certificate for localhost and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    arguments = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(
        [openssl, *arguments.split(), "-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
        check=True,
        capture_output=True,
    )
    return (tmp_path / "cert").read_bytes(), (tmp_path / "key").read_bytes()


def test_root_certificates_connect_with_tls(call: Call, certificate: tuple[bytes, bytes]) -> None:
    root, key = certificate
    with FakeServer(credentials=grpc.ssl_server_credentials([(key, root)])) as server:
        port = server.target.rpartition(":")[2]

        assert call(f"localhost:{port}", "generate_one", "x", client={"root_certificates": root}).text == "X"
        with pytest.raises(Unavailable):
            call(f"localhost:{port}", "generate_one", "x")


class TestWaitReady:
    def test_answers_with_the_servers_info(self, server: FakeServer, call: Call) -> None:
        server.info = pb.GetInfoResponse(model=pb.ModelInfo(name="fr-en"))

        assert call(server.target, "wait_ready", 10.0).model.name == "fr-en"

    def test_outlasts_a_server_that_is_loading(self, server: FakeServer, call: Call) -> None:
        server.fail(*[Failure(grpc.StatusCode.UNAVAILABLE, "loading")] * 4)

        call(server.target, "wait_ready", 30.0)

        assert [received.method for received in server.calls] == ["GetInfo"] * 5

    def test_gives_up_in_time(self, call: Call) -> None:
        with FakeServer() as stopped:
            target = stopped.target

        with pytest.raises(Unavailable, match=f"{target} did not become ready within 0.1 s: nothing answers there"):
            call(target, "wait_ready", 0.1)

    def test_does_not_wait_for_what_cannot_become_ready(self, server: FakeServer, call: Call) -> None:
        server.fail(Failure(grpc.StatusCode.UNIMPLEMENTED, "no such service"))

        with pytest.raises(ProtocolError):
            call(server.target, "wait_ready", 30.0)
