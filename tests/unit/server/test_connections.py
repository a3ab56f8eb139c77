"""Clients' connections: how often pings may come, what becomes of those that overdo it, and of those that say nothing.

gRPC's own clients refuse to ping often, so these are HTTP/2 frames written by hand.
"""

import asyncio
import resource
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from beamline_server.metrics_server import MOST_CONNECTIONS
from beamline_server.rpc.server import bind, server_options
from beamline_server.settings import Settings

FLOOR = "grpc.http2.min_ping_interval_without_data_ms"
GRPC_FLOOR_MS = 300_000
"""What gRPC bears if it is told nothing."""
HANDSHAKE = "grpc.server_handshake_timeout_ms"
GRPC_HANDSHAKE_MS = 120_000
DOCUMENTED_INTERVAL_MS = 20_000
"""How often clients may ping, as docs/api.md has it."""
SCALE = 100
"""So many times faster than in production, or the tests would take minutes."""
CONNECTIONS = "grpc.max_allowed_incoming_connections"
LONGEST_SILENCE_S = 10
PINGS = 8
"""Two more than enough: gRPC ends the connection at the third that comes too early."""

DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
ACK = END_STREAM = 1
END_HEADERS = 4


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    payload: bytes


class Connection:
    """The client's end of an HTTP/2 connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        self._writer.write(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    async def frames(self) -> AsyncIterator[Frame]:
        """What the server sends, until it closes the connection."""
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3]))
                if head[3] == SETTINGS and not head[4] & ACK:
                    self.send(SETTINGS, ACK)
                yield Frame(head[3], head[4], payload)
        except asyncio.IncompleteReadError:
            return

    async def goaway_to_pings_every(self, interval_s: float) -> bytes | None:
        """Send pings this far apart; returns why the server ends the connection, None if it answers all of them."""
        answered = 0
        self.send(PING, payload=bytes(8))
        async for frame in self.frames():
            if frame.kind == GOAWAY:
                return frame.payload[8:]
            if frame.kind == PING and frame.flags & ACK:
                answered += 1
                if answered == PINGS:
                    return None
                asyncio.get_running_loop().call_later(interval_s, self.send, PING, 0, 0, bytes(8))
        raise AssertionError("the connection has ended without a reason")


def literal(name: bytes, value: bytes) -> bytes:
    """A header as HPACK has it without tables and compression."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def watch_headers() -> Iterator[bytes]:
    yield literal(b":method", b"POST")
    yield literal(b":scheme", b"http")
    yield literal(b":path", b"/grpc.health.v1.Health/Watch")
    yield literal(b":authority", b"localhost")
    yield literal(b"content-type", b"application/grpc")
    yield literal(b"te", b"trailers")


@asynccontextmanager
async def streams_to_a_server() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server with the options of production, but for times that the tests await, which are scaled."""
    options = {HANDSHAKE: GRPC_HANDSHAKE_MS, FLOOR: GRPC_FLOOR_MS} | dict(server_options(Settings()))
    options |= {name: options[name] // SCALE for name in (HANDSHAKE, FLOOR)}
    server = grpc.aio.server(options=[*options.items()])
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)  # type: ignore[attr-defined, no-untyped-call, unused-ignore]  # stubs lack aio
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await server.stop(None)


@asynccontextmanager
async def connected() -> AsyncIterator[Connection]:
    """The same, as a connection that speaks HTTP/2."""
    async with streams_to_a_server() as (reader, writer):
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        connection = Connection(reader, writer)
        connection.send(SETTINGS)
        yield connection


def test_the_floor_leaves_room_for_pings_that_arrive_close_together() -> None:
    """A ping that was held up on its way comes close to the next one."""
    assert dict(server_options(Settings())).get(FLOOR, GRPC_FLOOR_MS) <= DOCUMENTED_INTERVAL_MS / 2


@pytest.mark.parametrize("calling", [False, True], ids=["idle", "watching"])
async def test_pings_as_often_as_documented_are_answered(calling: bool) -> None:
    async with connected() as connection:
        if calling:
            connection.send(HEADERS, END_HEADERS, 1, b"".join(watch_headers()))
            connection.send(DATA, END_STREAM, 1, bytes(5))
        assert await connection.goaway_to_pings_every(DOCUMENTED_INTERVAL_MS / 1000 / SCALE) is None


async def test_pings_far_more_often_cost_the_connection() -> None:
    async with connected() as connection:
        assert await connection.goaway_to_pings_every(0) == b"too_many_pings"


@pytest.mark.parametrize("sent", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], ids=["nothing", "the preface alone"])
async def test_who_does_not_begin_to_speak_is_closed_within_seconds(sent: bytes) -> None:
    async with streams_to_a_server() as (reader, writer):
        writer.write(sent)
        async with asyncio.timeout(LONGEST_SILENCE_S / SCALE * 10):  # ten times as long, for slow machines
            await reader.read()


def test_there_are_descriptors_left_when_all_callers_have_come() -> None:
    most, (allowed, _) = dict(server_options(Settings()))[CONNECTIONS], resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most + MOST_CONNECTIONS < allowed
