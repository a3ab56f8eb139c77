"""A server that answers every request for generation alike, after a time that is known exactly.

    python benchmarks/fixed_server.py [--port 0] [--service-ms 25] [--stall-ms 200 --stall-every-s 30]

It has one worker and a queue: a request leaves `service` after it came or after the one before it left, whichever is
later; what a load tester should report is therefore the Lindley recursion. With a service time of 0 it costs some 30
microseconds a request, so that it can be driven harder than any server that computes.

It speaks as much HTTP/2 (RFC 9113) as that takes. Headers are not read: a message without content asks for GetInfo,
anything else for Generate. It writes its port to standard output.
"""

import argparse
import asyncio
import selectors
import struct
import sys
from dataclasses import dataclass, field

from beamline.v1 import generation_pb2 as pb

PREFACE_BYTES = 24
HEADER_BYTES = 9
DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0x0, 0x1, 0x4, 0x6, 0x8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 0x3, 0x4
LARGEST_WINDOW, FIRST_WINDOW = 2**31 - 1, 65_535
MESSAGE_PREFIX_BYTES = 5  # gRPC's: compressed or not, and the length


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A header field, literal and not indexed (RFC 7541, section 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


RESPONSE_HEADERS = b"\x88" + header(b"content-type", b"application/grpc")  # 0x88 is `:status: 200` of the static table
TRAILERS = header(b"grpc-status", b"0")


def answer(message: bytes) -> bytes:
    """The frames of a unary answer on stream 0."""
    data = struct.pack(">BI", 0, len(message)) + message
    return b"".join(
        (
            frame(HEADERS, END_HEADERS, 0, RESPONSE_HEADERS),
            frame(DATA, 0, 0, data),
            frame(HEADERS, END_HEADERS | END_STREAM, 0, TRAILERS),
        )
    )


@dataclass
class Answer:
    """An answer that is the same but for its stream."""

    frames: bytes
    offsets: list[int] = field(init=False)
    """Where the stream's number stands."""

    def __post_init__(self) -> None:
        self.offsets, at = [], 0
        while at < len(self.frames):
            self.offsets.append(at + 5)
            at += HEADER_BYTES + int.from_bytes(self.frames[at : at + 3])

    def on(self, stream: bytes) -> bytes:
        """The frames on a stream, whose number is given as it stands in a frame."""
        frames = bytearray(self.frames)
        for offset in self.offsets:
            frames[offset : offset + 4] = stream
        return bytes(frames)


def generated() -> bytes:
    """The message that answers Generate."""
    response = pb.GenerateResponse()
    result = response.results.add(source_tokens=4)
    hypothesis = result.hypotheses.add(text="je suis étudiant", score=-0.5)
    hypothesis.token_ids.extend((5, 6, 7, 0))
    return response.SerializeToString()


def described() -> bytes:
    """The message that answers GetInfo."""
    info = pb.GetInfoResponse()
    info.model.name, info.model.architecture, info.model.device = "fixed", "none", "cpu"
    info.limits.max_beam_size, info.limits.max_text_bytes, info.limits.max_new_tokens = 16, 1_000_000, 1_000_000
    info.limits.max_duration.FromSeconds(3600)
    info.default_search.beam_size = 4
    return info.SerializeToString()


@dataclass
class Worker:
    """The one worker and its queue."""

    service_s: float
    stall_s: float
    stall_every_s: float
    free_at: float = 0.0
    next_stall: float | None = None

    def leaves_at(self, now: float) -> float:
        """When a request leaves that comes now. The first one after a stall is due waits for it as well."""
        if self.next_stall is None:
            self.next_stall = now + self.stall_every_s
        start = max(now, self.free_at)
        if self.stall_s and start >= self.next_stall:
            start += self.stall_s
            self.next_stall += self.stall_every_s
        self.free_at = start + self.service_s
        return self.free_at


class Connection(asyncio.Protocol):
    """One client."""

    generated, described = Answer(answer(generated())), Answer(answer(described()))

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        self._greeted = False
        self._lengths: dict[bytes, int] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greets: no limit on streams, and windows that are never used up in practice."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = struct.pack(">HIHI", MAX_CONCURRENT_STREAMS, LARGEST_WINDOW, INITIAL_WINDOW_SIZE, LARGEST_WINDOW)
        transport.write(frame(SETTINGS, 0, 0, settings))
        transport.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW)))

    def data_received(self, data: bytes) -> None:
        """Takes all frames that are complete."""
        data, at = self._rest + data, 0
        if not self._greeted:
            if len(data) < PREFACE_BYTES:
                self._rest = data
                return
            at, self._greeted = PREFACE_BYTES, True
        replies: list[bytes] = []
        while len(data) - at >= HEADER_BYTES:
            end = at + HEADER_BYTES + int.from_bytes(data[at : at + 3])
            if len(data) < end:
                break
            self._take(data[at + 3], data[at + 4], data[at + 5 : at + 9], data[at + HEADER_BYTES : end], replies)
            at = end
        self._rest = data[at:]
        if replies:
            self._transport.write(b"".join(replies))

    def _take(self, kind: int, flags: int, stream: bytes, payload: bytes, replies: list[bytes]) -> None:
        if kind == DATA:
            length = self._lengths.pop(stream, 0) + len(payload)
            if flags & END_STREAM:
                self._answer(stream, length, replies)
            else:
                self._lengths[stream] = length
        elif kind == SETTINGS and not flags & ACK:
            replies.append(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            replies.append(frame(PING, ACK, 0, payload))

    def _answer(self, stream: bytes, length: int, replies: list[bytes]) -> None:
        if length == MESSAGE_PREFIX_BYTES:
            replies.append(self.described.on(stream))
        elif not (self._worker.service_s or self._worker.stall_s):
            replies.append(self.generated.on(stream))
        else:
            self._loop.call_at(self._worker.leaves_at(self._loop.time()), self._send, self.generated.on(stream))

    def _send(self, frames: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(frames)


async def serve(port: int, worker: Worker) -> None:
    """Serves until it is killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(worker), "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 is any that is free")
    parser.add_argument("--service-ms", type=float, default=0.0)
    parser.add_argument("--stall-ms", type=float, default=0.0)
    parser.add_argument("--stall-every-s", type=float, default=30.0)
    arguments = parser.parse_args()
    worker = Worker(arguments.service_ms / 1000, arguments.stall_ms / 1000, arguments.stall_every_s)
    # `select` waits to the microsecond; asyncio rounds the time-outs of epoll up to milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve(arguments.port, worker))
    return 0


if __name__ == "__main__":
    sys.exit(main())
