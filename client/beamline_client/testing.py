"""Doubles for tests of programs that call Beamline: a real gRPC server that does not need a model, and a proxy.

    with FakeServer() as server, Client(server.target) as client:
        assert client.generate_one("hello").text == "HELLO"

It "translates" to upper case, word by word, behind the target prefix if there is one, and scores hypothesis k
(0, 1, …) with -0.5·(k + 1).

    with RecordingProxy() as proxy:  # and the variables of `proxy.environment` set
        ...
    assert proxy.requests == []

    with FakeServer() as server, RecordingProxy(leads_to=server.target) as proxy:  # a call to anywhere is answered
        ...
"""

import socket
import socketserver
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.any_pb2 import Any as PackedMessage
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server

_THREADS = 16
_LONGEST_HANG_S = 60.0  # so that a test that forgets to stop the server ends
_OPTIONS = [
    # The client's pings are borne, as by a real server.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
]
_STOP_GRACE_S = 5.0  # for calls to end once `stopping` is set; with none left the server stops at once

Generate = Callable[[pb.GenerateRequest, grpc.ServicerContext], pb.GenerateResponse]
Stream = Callable[[pb.GenerateStreamRequest, grpc.ServicerContext], Iterator[pb.GenerateStreamResponse]]


@dataclass(frozen=True)
class Failure:
    """A status with which to end a call."""

    code: grpc.StatusCode
    message: str
    details: Sequence[Message] = ()
    """google.rpc messages to send along, such as BadRequest."""
    trailers: Sequence[tuple[str, str]] = ()
    """Trailing metadata."""

    def end(self, context: grpc.ServicerContext) -> None:
        """Ends the call with this status; does not return."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = PackedMessage()
            packed.Pack(detail)
            status.details.append(packed)
        rich = rpc_status.to_status(status).trailing_metadata if self.details else ()
        context.set_trailing_metadata((*self.trailers, *rich))
        context.abort(self.code, self.message)


@dataclass(frozen=True)
class ReceivedCall:
    """What the server has seen of one attempt of a call."""

    method: str
    request: Any
    """The protobuf message."""
    metadata: dict[str, str | bytes]
    time_remaining_s: float | None
    """Time to the deadline; None when the caller set none."""


def shouted(source: pb.Input, search: pb.SearchOptions, output: pb.OutputOptions) -> pb.Result:
    """The result that the fake server gives for this input."""
    generated = _in_words(source).upper()
    ids = range(len(generated.split()))
    text = f"{_in_words(source.target_prefix)} {generated}" if source.HasField("target_prefix") else generated
    result = pb.Result(source_tokens=len(ids))
    for rank in range(search.n_best or 1):
        result.hypotheses.add(
            text=text if rank == 0 else f"{text} #{rank + 1}",
            score=-0.5 * (rank + 1),
            finish_reason=pb.FINISH_REASON_END_OF_SEQUENCE,
            token_ids=ids if output.token_ids else (),
            token_logprobs=[-0.25 for _ in ids] if output.token_logprobs else (),
        )
    timing = result.timing
    timing.queue.FromMilliseconds(1)
    timing.encode.FromMilliseconds(2)
    timing.decode.FromMilliseconds(30)
    timing.steps = len(ids)
    return result


def _in_words(content: pb.Input | pb.TargetPrefix) -> str:
    return content.text if content.HasField("text") else " ".join(str(i) for i in content.token_ids.ids)


def described() -> pb.GetInfoResponse:
    """What the fake server tells about itself.

    The limits that no model decides are a server's defaults; of tokens there are 512, as many models have.
    """
    info = pb.GetInfoResponse(
        model=pb.ModelInfo(name="shouting", has_tokenizer=True),
        limits=pb.Limits(
            max_inputs=64,
            max_text_bytes=65_536,
            max_source_tokens=512,
            max_new_tokens=512,
            max_beam_size=16,
            max_message_bytes=1024 * 1024,
            max_target_tokens=512,
        ),
        default_search=pb.SearchOptions(beam_size=4, n_best=1),
    )
    info.limits.max_duration.FromSeconds(30)
    return info


def _generate(request: pb.GenerateRequest, _context: grpc.ServicerContext) -> pb.GenerateResponse:
    return pb.GenerateResponse(results=[shouted(source, request.search, request.output) for source in request.inputs])


def _stream(request: pb.GenerateStreamRequest, _context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
    result = shouted(request.input, request.search, request.output)
    count = len(_in_words(request.input).split())
    # What a target begins with comes with the first word.
    for index, word in enumerate(result.hypotheses[0].text.rsplit(maxsplit=count - 1) if count else []):
        text = word if index == 0 else f" {word}"
        yield pb.GenerateStreamResponse(
            piece=pb.Piece(text=text, token_ids=[index] if request.output.token_ids else ())
        )
    yield pb.GenerateStreamResponse(result=result)


@dataclass
class FakeServer:
    """A Beamline server on a free port of 127.0.0.1, for use in a `with` statement."""

    generate: Generate = _generate
    """Answers Generate."""
    stream: Stream = _stream
    """Answers GenerateStream."""
    info: pb.GetInfoResponse = field(default_factory=described)
    """The answer of GetInfo."""
    credentials: grpc.ServerCredentials | None = None
    """TLS; None is plain text."""
    calls: list[ReceivedCall] = field(default_factory=list, init=False)
    """Every attempt, in the order of arrival."""
    target: str = field(default="", init=False)
    """The address to connect to."""

    def __post_init__(self) -> None:
        self._failures: deque[Failure] = deque()
        self._server = grpc.server(ThreadPoolExecutor(_THREADS), options=_OPTIONS)
        self.stopping = threading.Event()
        """Set when the server stops, for handlers that are to hang until then."""

    def __enter__(self) -> Self:
        add_GenerationServiceServicer_to_server(_Servicer(self), self._server)  # type: ignore[no-untyped-call]  # generated
        self.target = f"127.0.0.1:{self._listen('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stopping.set()
        # With a grace, for a server that cancels makes the clients' gRPC write about it on standard error.
        self._server.stop(_STOP_GRACE_S).wait()

    def _listen(self, address: str) -> int:
        port: int
        if self.credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, self.credentials)
        return port

    def requests(self) -> list[Any]:
        """The messages that asked for generation, in the order of arrival."""
        return [call.request for call in self.calls if call.method != "GetInfo"]

    def fail(self, *failures: Failure) -> None:
        """Ends the next attempts with these failures, one each, whichever method they call."""
        self._failures.extend(failures)

    def hang(self, _request: Message, context: grpc.ServicerContext) -> Any:
        """Answers nothing before the server stops: assign it to `generate` or `stream`."""
        self.stopping.wait(_LONGEST_HANG_S)
        context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")

    def receive(self, method: str, request: Message, context: grpc.ServicerContext) -> None:
        """Notes an attempt, and ends it if a failure is due."""
        remaining_s = context.time_remaining()
        metadata = dict(context.invocation_metadata())
        self.calls.append(ReceivedCall(method, request, metadata, remaining_s))
        if self._failures:
            self._failures.popleft().end(context)


class _ProxyServer(socketserver.ThreadingTCPServer):
    def __init__(self, requests: list[str], leads_to: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _NoteAndLead)
        self.requests = requests
        self.leads_to = leads_to
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        for each in self._connections:  # gRPC keeps one for a while after its channel is closed
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        super().server_close()


class _NoteAndLead(socketserver.StreamRequestHandler):
    server: _ProxyServer

    def handle(self) -> None:
        self.server.requests.append(self.rfile.readline().decode("latin-1").strip())
        if self.server.leads_to is None:
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        while self.rfile.readline().strip():
            pass
        host, _, port = self.server.leads_to.rpartition(":")
        with socket.create_connection((host, int(port))) as server:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_pass_on, args=(server, self.connection))
            back.start()
            _pass_on(self.connection, server)
            back.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Until the source ends or the target has gone; then ends both."""
    with suppress(OSError):
        while received := source.recv(65_536):
            target.sendall(received)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


class RecordingProxy:
    """An HTTP proxy on a free port of 127.0.0.1 that notes who comes; for a `with` statement.

    It sends everybody away, or leads everybody to one server.

    Attributes:
        requests: The first line of each connection, such as `CONNECT host:8001 HTTP/1.1`.
        address: Its host and port.
    """

    def __init__(self, leads_to: str | None = None) -> None:
        """Prepares a proxy.

        Args:
            leads_to: Host and port of the server that answers whatever address is asked for; None is nobody.
        """
        self.requests: list[str] = []
        self._server = _ProxyServer(self.requests, leads_to)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that name it, with a name and a password, to everything that knows any of them."""
        names = ("grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
        none = dict.fromkeys(("no_proxy", "NO_PROXY", "no_grpc_proxy"), "")
        return dict.fromkeys(names, f"http://somebody:secret@{self.address}") | none

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Servicer(GenerationServiceServicer):
    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:  # noqa: N802
        self._server.receive("Generate", request, context)
        return self._server.generate(request, context)

    def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        self._server.receive("GenerateStream", request, context)
        yield from self._server.stream(request, context)

    def GetInfo(self, request: pb.GetInfoRequest, context: grpc.ServicerContext) -> pb.GetInfoResponse:  # noqa: N802
        self._server.receive("GetInfo", request, context)
        return self._server.info
