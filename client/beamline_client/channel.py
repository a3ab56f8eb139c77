"""How the client connects: load balancing, retries and transport security, the same for both faces."""

import json
from collections.abc import Mapping
from typing import Any

import grpc

from beamline_client.address import is_on_this_machine

SERVICE_CONFIG: Mapping[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            # All methods of the service are pure. gRPC itself retries a stream only before its first message.
            "name": [{"service": "beamline.v1.GenerationService"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # CANCELLED from the server is what gRPC makes of a call that comes in the moment in which it closes.
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
            },
        }
    ],
    # No retries while failures outweigh successes: they would keep an overloaded server overloaded (gRFC A6). Half of
    # the tokens are free, since a replica that is lost takes all calls on its connection with it at once. With many
    # more, callers would learn of an overload at their deadlines.
    "retryThrottling": {"maxTokens": 200, "tokenRatio": 0.1},
}
"""The gRPC service config, as documented in grpc/service_config.proto."""

_MAX_RECONNECT_BACKOFF_MS = 5_000  # gRPC's own 120 s would notice a restarted server late
_LONGEST_SILENCE_MS = 1_000
"""When a connection without a word from the server is pinged: as often as gRPC can, and Beamline's server bears it."""
_LONGEST_ANSWER_MS = 2_000
"""How long the answer to a ping may take; that of an overloaded server takes some 30 ms."""
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", _LONGEST_SILENCE_MS),
    # Also while no call is open, and without a limit: who calls seldom should not find out by a call.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's core gives up by its timeout for pings, a minute by default. The one for keepalive, which should be it,
    # becomes the connection's TCP_USER_TIMEOUT and no more.
    ("grpc.http2.ping_timeout_ms", _LONGEST_ANSWER_MS),
    ("grpc.keepalive_timeout_ms", _LONGEST_ANSWER_MS),
)
"""A replica that says nothing and keeps its connections, frozen or cut off, is left, and its calls are UNAVAILABLE."""


def channel_options(target: str, *, retries: bool = True) -> list[tuple[str, str | int]]:
    """The channel arguments of a client.

    Args:
        target: Where it will connect. What is on this machine is reached directly, whatever proxies the environment
            names: they would look for it on theirs.
        retries: Whether gRPC sends refused calls again, as `SERVICE_CONFIG` says, and leaves servers that are silent.
    """
    # An answer is as large as what was asked for; gRPC's own limit of 4 MiB would lose it once it is there.
    options: list[tuple[str, str | int]] = [("grpc.max_receive_message_length", -1)]
    if is_on_this_machine(target):
        options.append(("grpc.enable_http_proxy", 0))
    if not retries:
        return [*options, ("grpc.enable_retries", 0)]
    return [
        *options,
        *_KEEPALIVE,
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_BACKOFF_MS),
    ]


def channel_credentials(root_certificates: bytes | None) -> grpc.ChannelCredentials | None:
    """TLS credentials that trust these PEM certificates; None stays None and means plain text."""
    return None if root_certificates is None else grpc.ssl_channel_credentials(root_certificates)
