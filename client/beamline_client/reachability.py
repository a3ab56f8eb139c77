"""Why a server was not reached: what gRPC's own words do not say to a person."""

from beamline_client.address import is_numeric
from beamline_client.proxies import proxy_for

_HINTS = (
    ("Expected SETTINGS frame", "what listens there does not speak gRPC; a server's metrics have another port"),
    ("Connection refused", "nothing listens there"),
    ("Domain name not found", "no host of that name is known"),
    ("lookup error", "the address of the host cannot be found"),
    ("Tls handshake failed", "what listens there does not speak TLS, or its certificate is not trusted"),
    ("Socket closed", "what listens there closes the connection; it may want TLS, Client(root_certificates=...)"),
)
"""Pieces of gRPC's messages, and what they mean; the first that is found counts."""


_OF_CONNECTING = ("failed to connect", "connections to all backends failing", "errors resolving")
"""Pieces of the messages of calls that have never left: a connection that breaks later was the right one."""
_OUT_OF_TIME = "Deadline Exceeded"
"""gRPC's own message when a call's time is up, before it has a connection or an answer; a server says more."""
_NO_GRPC = "nothing listens there that speaks gRPC without TLS; a server's metrics have another port"
_OF_ONE_ADDRESS = ("Expected SETTINGS frame", "Connection refused", "Socket closed")
"""A name such as localhost can have several addresses, and gRPC tells what it met at the last: not the one that is."""


def hint_for(message: str, target: str, *, answered: bool = False) -> str | None:
    """What is most likely wrong if a call failed before it reached a server; None if that is not known.

    Args:
        message: What gRPC says.
        target: Where the call was sent.
        answered: Whether anything has come from there before, so that a proxy on the way lets calls through.
    """
    proxy = proxy_for(target)
    if proxy is not None and not answered and message.startswith(_OUT_OF_TIME):
        return f"nothing has come from there yet, and {proxy}"
    if not any(words in message for words in _OF_CONNECTING):
        return None
    if proxy is not None:  # then all that is known is about the proxy
        return str(proxy)
    if not is_numeric(target) and any(words in message for words in _OF_ONE_ADDRESS):
        return _NO_GRPC
    return next((hint for words, hint in _HINTS if words in message), None)
