"""Doubles for tests of the service and of programs around it: no model is needed, and nothing waits for the clock.

async with serving() as service:
    response = await service.stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text="hello")]))
    assert response.results[0].hypotheses[0].text == "HELLO"
"""

import asyncio
import hashlib
import json
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from prometheus_client import CollectorRegistry

from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_server.bundle import Bundle, checksum_line
from beamline_server.engine.errors import EngineError, EngineStopped, QueueFull, RequestCancelled, WouldBeLate
from beamline_server.engine.request import (
    Completed,
    Deliver,
    Event,
    Failed,
    Finish,
    GenerationRequest,
    Hypothesis,
    RequestId,
    Timing,
)
from beamline_server.engine.workers import EngineLoad, WorkerState
from beamline_server.graphs import ENCODER, GraphSizes, bundle_graphs, graph_files
from beamline_server.languages import NOTHING_AROUND, Around
from beamline_server.manifest import CHECKSUM, FORMAT_VERSION, MANIFEST, WEIGHTS, Dimensions, FileEntry, Manifest
from beamline_server.metrics import Metrics
from beamline_server.rpc.aio_server import AioServer
from beamline_server.rpc.desk import Desk
from beamline_server.rpc.health import Health
from beamline_server.rpc.info import ServedModel
from beamline_server.rpc.server import Service, bind, build_server
from beamline_server.rpc.text_work import TextWork
from beamline_server.settings import Settings
from beamline_server.tokenizer import Tokenizer, whole_characters

MessageT = TypeVar("MessageT", bound=Message)

EOS = 256
DECODER_START = 257
VOCABULARY = 258


class ManualClock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time in seconds."""
        return self.now


class ByteTokenizer:
    """A tokenizer whose tokens are the bytes of UTF-8, with end-of-sequence 256."""

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        """The bytes of a text, and end-of-sequence, with what stands around them."""
        return [*around.before, *text.encode(), EOS, *around.after]

    def encode_target(self, text: str) -> list[int]:
        """The bytes of a text."""
        return [*text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; incomplete characters become U+FFFD."""
        return bytes(token for token in ids if token < EOS).decode("utf-8", "replace")

    def settled(self, ids: Sequence[int]) -> str:
        """The text but for an incomplete character at its end."""
        return whole_characters(self.decode(ids))


def make_manifest(**changes: object) -> Manifest:
    """A manifest for the byte tokenizer, with these fields changed."""
    entry = {"sha256": "0" * 64, "bytes": 0}
    files = (*graph_files("fp32", GraphSizes(1, 8, VOCABULARY)), "weights.bin")
    fields: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "name": "test-model",
        "architecture": "marian",
        "precision": "fp32",
        "created": "2026-01-01T00:00:00Z",
        "dimensions": {
            "d_model": 8,
            "decoder_layers": 1,
            "decoder_heads": 2,
            "source_vocabulary": VOCABULARY,
            "target_vocabulary": VOCABULARY,
            "max_source_tokens": 512,
            "max_target_tokens": 256,
        },
        "special_tokens": {"decoder_start": DECODER_START, "eos": [EOS], "source_eos": EOS},
        "generation_defaults": {"beam_size": 4, "max_new_tokens": 128},
        "tokenizer": {"kind": "tokenizers", "files": []},
        "files": dict.fromkeys(files, entry),
        "golden": [{"source": [0], "forced": [0], "top_logprob": [-1.0]}],
        "golden_tolerance": 0.01,
        "spec": {},
        "parity": {},
        "producers": {},
    }
    return Manifest.model_validate({**fields, **changes})


def write_bundle(folder: Path, **changes: object) -> Manifest:
    """Write a bundle that passes verification; its graphs have no nodes, so it needs a `ScriptedEngine`."""
    manifest = make_manifest(tokenizer={"kind": "none", "files": []}, **changes)
    files = {}
    graphs = graph_files(manifest.precision, manifest.dimensions.graph_sizes)
    for name in manifest.files:
        content = empty_graph(name, manifest.precision, manifest.dimensions) if name in graphs else name.encode()
        (folder / name).write_bytes(content)
        files[name] = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    manifest = manifest.model_copy(update={"files": files})
    write_manifest(folder, manifest.model_dump(mode="json"))
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write a manifest with its checksum, as whoever edits one has to."""
    raw = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / CHECKSUM).write_text(checksum_line(raw))


@cache
def empty_graph(name: str, precision: str, sizes: Dimensions) -> bytes:
    """A graph with the inputs, outputs and tables of its contract, and one weight, all of `weights.bin`."""
    from onnx import TensorProto, helper

    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    types |= {"int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    spec = bundle_graphs(
        precision,
        "float16" if precision == "fp16" else "float32",
        sizes.graph_sizes,
    )[name]
    inputs, outputs = (
        [helper.make_tensor_value_info(key, types[value.element_type], value.axes) for key, value in side.items()]
        for side in (spec.inputs, spec.outputs)
    )
    source = {"x_embedding": sizes.source_vocabulary, "x_positions": sizes.max_source_tokens}
    target = {"x_embedding": sizes.target_vocabulary, "x_positions": sizes.max_target_tokens}
    tables = source if name == ENCODER else target
    weights = [TensorProto(name=key, data_type=1, dims=(rows, sizes.d_model)) for key, rows in tables.items()]
    stored = TensorProto(name="all", data_type=TensorProto.INT8, dims=(len(WEIGHTS),), data_location=1)
    for key, value in (("location", WEIGHTS), ("offset", "0"), ("length", str(len(WEIGHTS)))):
        stored.external_data.add(key=key, value=value)
    model = helper.make_model(helper.make_graph([], name, inputs, outputs, [*weights, stored]))
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def make_completed(number: RequestId, tokens: Iterable[int], *, n_best: int = 1) -> Completed:
    """An outcome whose hypotheses all have these tokens, with scores -0.5, -1.0 and so on."""
    ids = tuple(tokens)
    finish = Finish.END_OF_SEQUENCE if ids[-1:] == (EOS,) else Finish.LENGTH
    hypotheses = tuple(
        Hypothesis(ids, score=-0.5 * (rank + 1), token_logprobs=(-0.25,) * len(ids), finish=finish)
        for rank in range(n_best)
    )
    return Completed(number, hypotheses, Timing(queue_s=0.001, encode_s=0.002, decode_s=0.25, steps=len(ids)))


def shouted(request: GenerationRequest) -> Sequence[Event]:
    """A script: the source in upper case, at once; after a target prefix, what is left of it behind as many tokens."""
    upper = [token - 32 if ord("a") <= token <= ord("z") else token for token in request.source]
    left = upper[min(len(request.target_prefix), len(upper) - 1) :]
    return [make_completed(request.id, left, n_best=request.options.n_best)]


def silent(request: GenerationRequest) -> Sequence[Event]:
    """A script: nothing; the test delivers the events itself."""
    del request
    return []


@dataclass
class ScriptedEngine:
    """An engine that answers by a script, and lets a test see and do the rest.

    Attributes:
        deliver: Takes the events.
        script: The events of a request, delivered when it is submitted.
        refusal: What `submit` raises, if anything.
        foreseen: What `foreseen_refusal` returns.
        callers: For whom it was asked for.
        remaining_s: How much time they had.
        ahead: How many were ahead of them.
        workers: What `load` says.
        last_step_at: What `load` says.
        given_up: Numbers of the workers that were given up.
        stopped_with: The grace of each `stop`.
    """

    deliver: Deliver
    script: Callable[[GenerationRequest], Sequence[Event]] = shouted
    refusal: Exception | None = None
    foreseen: QueueFull | WouldBeLate | None = None
    callers: list[str] = field(default_factory=list)
    remaining_s: list[float] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    workers: tuple[WorkerState, ...] = (WorkerState(),)
    last_step_at: float | None = None
    given_up: list[int] = field(default_factory=list)
    stopped_with: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[RequestId, GenerationRequest] = {}
        self._submitted: asyncio.Queue[Sequence[GenerationRequest]] = asyncio.Queue()
        self._cancelled: asyncio.Queue[Sequence[RequestId]] = asyncio.Queue()

    async def submitted(self) -> Sequence[GenerationRequest]:
        """The next requests that were submitted together."""
        return await self._submitted.get()

    async def cancelled(self) -> Sequence[RequestId]:
        """The next ids that were cancelled together."""
        return await self._cancelled.get()

    def tell(self, *events: Event) -> None:
        """Deliver these events in one step."""
        with self._lock:
            for event in events:
                if isinstance(event, Completed | Failed):
                    self._open.pop(event.id, None)
        self.deliver(events)

    def fail_all(self, error: EngineError) -> None:
        """End all open requests with this error."""
        self.tell(*(Failed(number, error) for number in list(self._open)))

    def start(self) -> None:
        """See `EngineLike`."""

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """See `EngineLike`; call it on the event loop."""
        if self.refusal is not None:
            raise self.refusal
        if self.stopped_with:
            raise EngineStopped
        with self._lock:
            self._open.update((request.id, request) for request in requests)
        self._submitted.put_nowait(requests)
        if events := [event for request in requests for event in self.script(request)]:
            self.tell(*events)

    def foreseen_refusal(self, caller: str, remaining_s: float, ahead: int) -> QueueFull | WouldBeLate | None:
        """See `EngineLike`."""
        self.callers.append(caller)
        self.remaining_s.append(remaining_s)
        self.ahead.append(ahead)
        return self.foreseen

    def cancel(self, ids: Sequence[RequestId]) -> None:
        """See `EngineLike`; call it on the event loop."""
        self._cancelled.put_nowait(ids)
        self.tell(*(Failed(number, RequestCancelled()) for number in ids if number in self._open))

    def load(self) -> EngineLoad:
        """See `EngineLike`: all open requests are running."""
        with self._lock:
            running = list(self._open.values())
        return EngineLoad(
            queued_requests=0,
            queued_rows=0,
            running_requests=len(running),
            running_rows=sum(request.options.beam_size for request in running),
            row_capacity=128,
            queue_limit_rows=1024,
            last_step_at=self.last_step_at,
            workers=self.workers,
        )

    def give_up(self, number: int) -> None:
        """See `EngineLike`."""
        self.given_up.append(number)
        self.workers = tuple(
            replace(worker, alive=worker.alive and i != number) for i, worker in enumerate(self.workers)
        )

    def stop(self, grace_s: float) -> None:
        """See `EngineLike`."""
        self.stopped_with.append(grace_s)
        self.fail_all(EngineStopped())


@dataclass(frozen=True)
class Failure:
    """How a call has failed, as its caller sees it."""

    code: grpc.StatusCode
    text: str
    trailers: Mapping[str, Any]

    def detail(self, kind: type[MessageT]) -> MessageT:
        """The google.rpc detail of this kind; fails if there is none."""
        for packed in status_pb2.Status.FromString(self.trailers["grpc-status-details-bin"]).details:
            message = kind()
            if packed.Unpack(message):
                return message
        raise AssertionError(f"the status has no {kind.__name__}")


async def failure_of(call: Awaitable[object]) -> Failure:
    """How this call fails; fails if it does not."""
    try:
        await call
    except grpc.aio.AioRpcError as raised:
        error: Any = raised
        return Failure(error.code(), error.details() or "", dict(error.trailing_metadata() or ()))
    raise AssertionError("the call has not failed")


@dataclass(frozen=True)
class RunningService:
    """A service that listens on this machine, and its parts."""

    address: str
    channel: Any
    stub: Any
    engine: ScriptedEngine
    desk: Desk
    health: Health
    metrics: Metrics
    server: AioServer


@asynccontextmanager
async def serving(
    *,
    script: Callable[[GenerationRequest], Sequence[Event]] = shouted,
    settings: Settings | None = None,
    manifest: Manifest | None = None,
    tokenizer: Tokenizer | None = ByteTokenizer(),  # noqa: B008 - has no state
    ready: bool = True,
) -> AsyncIterator[RunningService]:
    """A real server with a scripted engine, and a client that is connected to it.

    Args:
        script: What the engine answers.
        settings: The server's settings, but for host and ports.
        manifest: The model's manifest.
        tokenizer: Its tokenizer.
        ready: Whether it accepts requests from the start.
    """
    settings, manifest = settings or Settings(), manifest or make_manifest()
    metrics = Metrics(CollectorRegistry())
    desk, health = Desk(asyncio.get_running_loop()), Health(metrics)
    engine = ScriptedEngine(desk.deliver, script)
    model = ServedModel(settings.model_name or manifest.name, Bundle(Path("bundle"), manifest, "f" * 64), "cpu")
    with TextWork() as text:
        service = Service(desk, health, metrics, text, jitter=random.Random(0))
        server = build_server(service, model, tokenizer, settings)
        address = f"127.0.0.1:{bind(server, '127.0.0.1', 0)}"
        await server.start()
        if ready:
            desk.open(engine)
            health.set_ready(True)
        try:
            # Retries are left to the tests: each call is one attempt.
            async with grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
                stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
                yield RunningService(address, channel, stub, engine, desk, health, metrics, server)
        finally:
            await server.stop(None)
