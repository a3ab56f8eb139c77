"""Clients' connections: how often pings may come, what becomes of those that overdo it, and of those that say nothing.

gRPC's own clients refuse to ping often, so these are HTTP/2 frames written by hand.
"""

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from prometheus_client import CollectorRegistry

from beamline_client.channel import channel_options
from beamline_server.metrics import Metrics
from beamline_server.metrics_server import MOST_CONNECTIONS
from beamline_server.rpc.health import Health
from beamline_server.rpc.server import server_options
from beamline_server.settings import Settings
from doubles.http2 import ACK, GOAWAY, PING, Connection

FLOOR = "grpc.http2.min_ping_interval_without_data_ms"
GRPC_FLOOR_MS = 300_000
"""What gRPC bears if it is told nothing."""
HANDSHAKE = "grpc.server_handshake_timeout_ms"
GRPC_HANDSHAKE_MS = 120_000
KEEPALIVE = ("grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms")
"""When the server pings a connection, and how long it waits for the answer."""
DOCUMENTED_SILENCE_S = 60 + 20
"""Both together, as docs/api.md has them."""
DOCUMENTED_INTERVAL_MS = 1_000
"""How often clients may ping, as docs/api.md has it."""
SCALE = 100
"""So many times faster than in production, or the tests would take minutes."""
CONNECTIONS = "grpc.max_allowed_incoming_connections"
LONGEST_SILENCE_S = 10
PINGS = 8
"""Two more than enough: gRPC ends the connection at the third that comes too early."""


async def goaway_to_pings_every(connection: Connection, interval_s: float) -> bytes | None:
    """Send pings this far apart; returns why the server ends the connection, None if it answers all of them."""
    answered = 0
    connection.send(PING, payload=bytes(8))
    async for frame in connection.frames():
        if frame.kind == GOAWAY:
            return frame.payload[8:]
        if frame.kind == PING and frame.flags & ACK:
            answered += 1
            if answered == PINGS:
                return None
            asyncio.get_running_loop().call_later(interval_s, connection.send, PING, 0, 0, bytes(8))
    raise AssertionError("the connection has ended without a reason")


@asynccontextmanager
async def streams_to_a_server() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server with the options of production, but for times that the tests await, which are scaled."""
    options = {HANDSHAKE: GRPC_HANDSHAKE_MS, FLOOR: GRPC_FLOOR_MS} | dict(server_options(Settings()))
    options |= {name: options[name] // SCALE for name in (HANDSHAKE, FLOOR, *KEEPALIVE) if name in options}
    server = grpc.aio.server(options=[*options.items()])
    health_pb2_grpc.add_HealthServicer_to_server(Health(Metrics(CollectorRegistry())), server)
    port = server.add_insecure_port("127.0.0.1:0")
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
        connection = Connection(reader, writer)
        connection.begin()
        yield connection


def test_the_floor_leaves_room_for_pings_that_arrive_close_together() -> None:
    """A ping that was held up on its way comes close to the next one."""
    assert dict(server_options(Settings())).get(FLOOR, GRPC_FLOOR_MS) <= DOCUMENTED_INTERVAL_MS / 2


def test_the_client_pings_no_more_often_than_documented() -> None:
    options = dict(channel_options("localhost:8001"))
    assert options["grpc.keepalive_time_ms"] == DOCUMENTED_INTERVAL_MS


@pytest.mark.parametrize("calling", [False, True], ids=["idle", "watching"])
async def test_pings_as_often_as_documented_are_answered(calling: bool) -> None:
    async with connected() as connection:
        if calling:
            connection.call(b"/grpc.health.v1.Health/Watch")
        assert await goaway_to_pings_every(connection, DOCUMENTED_INTERVAL_MS / 1000 / SCALE) is None


async def test_pings_far_more_often_cost_the_connection() -> None:
    async with connected() as connection:
        assert await goaway_to_pings_every(connection, 0) == b"too_many_pings"


@pytest.mark.parametrize("sent", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], ids=["nothing", "the preface alone"])
async def test_who_does_not_begin_to_speak_is_closed_within_seconds(sent: bytes) -> None:
    async with streams_to_a_server() as (reader, writer):
        writer.write(sent)
        async with asyncio.timeout(LONGEST_SILENCE_S / SCALE * 10):  # ten times as long, for slow machines
            await reader.read()


async def test_who_does_not_answer_pings_is_closed() -> None:
    async with streams_to_a_server() as (reader, writer):
        Connection(reader, writer).begin()
        async with asyncio.timeout(DOCUMENTED_SILENCE_S / SCALE * 10):  # ten times as long, for slow machines
            await reader.read()


def test_there_are_descriptors_left_when_all_callers_have_come() -> None:
    most, (allowed, _) = dict(server_options(Settings()))[CONNECTIONS], resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most + MOST_CONNECTIONS < allowed
