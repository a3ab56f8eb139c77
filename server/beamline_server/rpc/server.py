"""Puts the gRPC server together: services, guard, transport options, port."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamline.v1 import generation_pb2
from beamline.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from beamline_server.listening import PortError, address_of, connections, listening_sockets
from beamline_server.metrics import Clock, MethodName, Metrics
from beamline_server.rpc.aio_server import MOST_UNDECIDED, OTHERS_AT_A_TIME, AioServer
from beamline_server.rpc.call import does_generate
from beamline_server.rpc.converters import RequestReader, default_search, limits_of
from beamline_server.rpc.desk import Desk
from beamline_server.rpc.gate import MOST_OPEN, OTHER_PLACES, PLACES, Gate
from beamline_server.rpc.health import Health
from beamline_server.rpc.info import ServedModel, info_message
from beamline_server.rpc.interceptors import Guard
from beamline_server.rpc.reflection import SERVICE_V1, SERVICE_V1ALPHA, add_reflection
from beamline_server.rpc.servicer import GenerationServicer
from beamline_server.rpc.text_work import THREADS, TextWork
from beamline_server.rpc.unread import MOST_METADATA_BYTES, RequestMemory
from beamline_server.settings import Settings, number_of
from beamline_server.tokenizer import Tokenizer

_UNLIMITED = -1
_STREAM_WINDOW = 16 * 1024
_MOST_PENDING = 4096
_MOST_GENERATING = 4096
"""Calls that may generate at a time, beside those that wait for the engine."""
_REFLECTING = {f"/{service}/ServerReflectionInfo".encode(): 4 for service in (SERVICE_V1, SERVICE_V1ALPHA)}
"""Calls for reflection that may be open at a time: their messages are read one by one, whatever comes."""
_LONGEST_PENDING_S = 3600
_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)
"""All that is served, but for reflection."""


_SENDING, _PARSED = 3, 16
"""Bytes that gRPC and Python hold for each of a message that is being sent; those that a parsed one may take."""
_CALL_BYTES, _PENDING_BYTES, _CONNECTION_BYTES = 24 * 1024, 12 * 1024 + MOST_METADATA_BYTES + _STREAM_WINDOW, 32 * 1024


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that the RPC layer is made of, each with a life of its own."""

    desk: Desk
    health: Health
    metrics: Metrics
    text: TextWork
    clock: Clock = time.monotonic
    jitter: random.Random | None = None


def build_server(service: Service, model: ServedModel, tokenizer: Tokenizer | None, settings: Settings) -> AioServer:
    """A server for a model: without a port, not started.

    Raises:
        SettingsError: the settings promise more than the model has.
    """
    manifest = model.bundle.manifest
    limits = limits_of(settings, manifest)
    defaults = default_search(manifest.generation_defaults, limits)
    reader = RequestReader(
        model_name=model.name,
        limits=limits,
        defaults=defaults,
        manifest=manifest,
        tokenizer=tokenizer,
    )
    servicer = GenerationServicer(
        desk=service.desk,
        reader=reader,
        tokenizer=tokenizer,
        info=info_message(model, settings, limits, defaults),
        text=service.text,
        memory=RequestMemory(PLACES * settings.max_message_bytes),
        metrics=service.metrics,
        clock=service.clock,
    )
    gate = Gate(
        service.desk,
        {_path(name): service.metrics.method(name) for name in _generating(servicer)},
        service.metrics,
        most_generating=_MOST_GENERATING + settings.max_queue_rows,
        most_open=_REFLECTING,
        max_duration_s=settings.max_duration_s,
        caller_key=settings.caller_metadata,
        jitter=service.jitter or random.Random(),
        clock=service.clock,
    )
    guard = Guard(
        service.metrics,
        max_duration_s=settings.max_duration_s,
        caller_key=settings.caller_metadata,
        doorway=gate,
        clock=service.clock,
        jitter=service.jitter,
    )
    server = AioServer([guard], server_options(settings), gate)
    add_GenerationServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]  # generated
    health_pb2_grpc.add_HealthServicer_to_server(service.health, server)
    if settings.reflection:
        add_reflection(server, [generation_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR])
    return server


def _generating(servicer: GenerationServicer) -> Iterator[MethodName]:
    """The methods that generate."""
    for method in _SERVICES[0].methods:
        if does_generate(getattr(servicer, method.name)):
            kind = "server_stream" if method.server_streaming else "unary"
            yield MethodName(method.containing_service.full_name, method.name, kind)


def _path(name: MethodName) -> bytes:
    return f"/{name.service}/{name.method}".encode()


def bind(server: Any, host: str, port: int) -> int:
    """Let a server listen, without encryption; returns the port, which is a free one for 0.

    Raises:
        PortError: there is nothing to listen on.
    """
    try:
        # gRPC would tell no reason, and write a line of its own into the log.
        for probe in listening_sockets(host, port):
            probe.close()
        bound: int = server.add_insecure_port(address_of(host, port))
    except (OSError, ValueError, RuntimeError) as error:
        raise PortError(host, port, error) from error
    return bound


def server_options(settings: Settings) -> list[tuple[str, int]]:
    """The transport's options, as grpc/impl/channel_arg_names.h has them."""
    longest_ms = int(settings.max_duration_s * 1000)
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # The limits on requests bound responses too; a refusal here would come after all the work.
        ("grpc.max_send_message_length", _UNLIMITED),
        # Further calls of a connection wait in their client. gRPC must count those that the client knows to be open,
        # not those whose memory is in use: with "overload protection" it refuses calls that a client may make.
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.http.overload_protection", 0),
        # Calls that have arrived and not been looked at: above the first limit (1000 by default) gRPC cancels some,
        # above the second all, without a word that tells callers to come back. What a server is full with, it must say
        # itself, so only the memory that they take limits them: some 11 KB each, and what they send unasked.
        ("grpc.server.max_pending_requests", _MOST_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING),
        ("grpc.server_max_unrequested_time_in_server", _LONGEST_PENDING_S),
        # Of a call that nobody reads yet, so much may be sent, however fast the connection seems to be.
        ("grpc.http2.lookahead_bytes", _STREAM_WINDOW),
        ("grpc.http2.bdp_probe", 0),
        # A second process on the same port must fail instead of taking every other connection.
        ("grpc.so_reuseport", 0),
        # Callers that live long connect again now and then, and so find new replicas (gRFC A9).
        ("grpc.max_connection_age_ms", 180_000),
        ("grpc.max_connection_age_grace_ms", longest_ms + 10_000),
        # A peer that is gone would otherwise hold its connection for two hours. gRPC gives up by its timeout for pings,
        # and takes the one for keepalive as TCP_USER_TIMEOUT.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
        # Who connects and says nothing, not even that it speaks HTTP/2, would hold a descriptor for two minutes.
        ("grpc.server_handshake_timeout_ms", 10_000),
        # Without a descriptor, neither metrics nor anything else could be read.
        ("grpc.max_allowed_incoming_connections", connections(number_of(settings.max_connections))),
        # Callers may ping every second, also while they wait; by default that would cost them the connection (gRFC A8).
        # Half of it is borne, since pings that the network holds up arrive close together.
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def most_bytes_of_callers(settings: Settings) -> dict[str, int]:
    """The most memory that callers make a server hold, by what it is for (docs/deploy.md tells how it adds up)."""
    message, reflecting = settings.max_message_bytes, settings.reflection * len(_REFLECTING)
    methods = [method.name for service in _SERVICES for method in service.methods]
    others = sum(not does_generate(getattr(GenerationServicer, name, None)) for name in methods)
    sending = PLACES + OTHER_PLACES + reflecting * (max(_REFLECTING.values()) + OTHERS_AT_A_TIME)
    calls = _MOST_GENERATING + settings.max_queue_rows + MOST_OPEN * others
    # gRPC counts calls that nobody has looked at by method; those of methods that there are not are of one more.
    undecided = MOST_UNDECIDED + _MOST_PENDING * (len(methods) + reflecting + 1)
    return {
        "requests that come": sending * _SENDING * message,
        "requests that are handled": (PLACES + THREADS * _PARSED) * message,
        "calls": calls * _CALL_BYTES + undecided * _PENDING_BYTES,
        "connections": connections(number_of(settings.max_connections)) * _CONNECTION_BYTES,
    }
