"""A client that speaks HTTP/2 by frames written by hand, for what gRPC's own clients refuse to do."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
INITIAL_WINDOW_SIZE = 4
"""The setting that bounds what a stream may send before the other side has taken it."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True)
class Frame:
    """What one side sends at a time."""

    kind: int
    flags: int
    payload: bytes


class Connection:
    """The client's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def opened(cls, port: int, *, settings: bytes = b"") -> AsyncIterator[Self]:
        """One to a port of this machine, which has said that it speaks HTTP/2."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            connection = cls(reader, writer)
            connection.begin(settings)
            yield connection
        finally:
            writer.close()

    @property
    def name(self) -> str:
        """What gRPC calls its client."""
        address, port = self._writer.get_extra_info("sockname")
        return f"ipv4:{address}:{port}"

    def begin(self, settings: bytes = b"") -> None:
        """Say that it speaks HTTP/2, and with which settings."""
        self._writer.write(_PREFACE)
        self.send(SETTINGS, payload=settings)

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        """Send a frame."""
        self._writer.write(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    def call(self, path: bytes, message: bytes = b"", *, stream: int = 1) -> None:
        """Begin a call with one message, on a stream that is new."""
        headers = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b":authority", b"localhost"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
        self.send(HEADERS, END_HEADERS, stream, b"".join(literal(name, value) for name, value in headers))
        self.send(DATA, END_STREAM, stream, struct.pack(">BI", 0, len(message)) + message)

    async def frames(self) -> AsyncIterator[Frame]:
        """What the server sends, until it closes the connection; settings and pings are acknowledged."""
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3]))
                if head[3] == SETTINGS and not head[4] & ACK:
                    self.send(SETTINGS, ACK)
                elif head[3] == PING and not head[4] & ACK:
                    self.send(PING, ACK, payload=payload)
                yield Frame(head[3], head[4], payload)
        except (asyncio.IncompleteReadError, ConnectionError):
            return


def literal(name: bytes, value: bytes) -> bytes:
    """A header as HPACK has it without tables and compression."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def setting(number: int, value: int) -> bytes:
    """One setting."""
    return struct.pack(">HI", number, value)
