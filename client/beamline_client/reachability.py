"""Why a server was not reached, and what most likely helps: what gRPC's own words do not say to a person."""

from beamline_client.proxies import proxy_for

_HINTS = (
    (
        "Expected SETTINGS frame",
        "what listens there does not speak gRPC: name the server's gRPC port, not another of it",
    ),
    ("Connection refused", "nothing listens there: is the server running, and is it the right port?"),
    ("Domain name not found", "no such host is known: check its spelling"),
    ("lookup error", "the host's address cannot be found: check its spelling"),
    ("Tls handshake failed", "no TLS with what listens there: check its port, and whether its certificate is trusted"),
    (
        "failed to connect to all addresses",
        "is a server running there? One with TLS needs Client(root_certificates=...)",
    ),
)
"""Pieces of gRPC's messages, and what they come from; the first that is found counts."""


def hint_for(message: str, target: str) -> str | None:
    """What most likely helps if a call to `target` failed with this message of gRPC; None if that is not known."""
    hint = next((hint for words, hint in _HINTS if words in message), None)
    proxy = proxy_for(target)
    # With a proxy between, all that is known is about the proxy.
    return hint if proxy is None else str(proxy)
