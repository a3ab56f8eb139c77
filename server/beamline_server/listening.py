"""Addresses to listen on, for gRPC and for metrics alike; what to tell where one cannot; how many may connect."""

import errno
import resource
import socket
from collections.abc import Sequence
from contextlib import suppress

from beamline_server.settings import SettingsError

_OWN_DESCRIPTORS = 128
"""For the server's own files, and for the connections of those who read the metrics."""
_UNLIMITED = 2**31 - 1
_USUAL_CONNECTIONS = 4096
_ADVICE = {
    errno.EADDRINUSE: "is another server running? Stop it, or choose another port",
    errno.EADDRNOTAVAIL: "it is no address of this machine; 0.0.0.0 and :: stand for all that it has",
    errno.EACCES: "choose a port from 1024 on, or let the server use lower ones",
}
_ADVICE_ON_NAMES = (
    "expected an address of this machine, such as 127.0.0.1 or ::1, or a name that can be looked up (those of network "
    "interfaces cannot); 0.0.0.0 and :: stand for all addresses"
)


class PortError(Exception):
    """An address cannot be listened on; the text says why and what to do."""

    def __init__(self, host: str, port: int, error: Exception, *, use: str = "") -> None:
        reason = getattr(error, "strerror", None) or "the system does not say why"
        if isinstance(error, socket.gaierror | ValueError):
            advice = _ADVICE_ON_NAMES
        else:
            advice = _ADVICE.get(getattr(error, "errno", None) or 0, "choose another host or port")
        super().__init__(f"{address_of(host, port)} cannot be listened on{use} ({reason}); {advice}")


def address_of(host: str, port: int) -> str:
    """Host and port in one, as URLs and gRPC have them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listening_sockets(host: str, port: int) -> Sequence[socket.socket]:
    """Sockets on every address of a host, all listening on the same port, which is a free one for 0.

    Of a name's addresses, those of a family that this machine lacks are left out.

    Raises:
        OSError | ValueError: the host has no address here, or a port is taken.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    refused: list[OSError] = []
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        free = (address[0], sockets[0].getsockname()[1], *address[2:]) if sockets else address
        try:
            sockets.append(_listening_socket(socket.AddressFamily(family), free))
        except OSError as error:
            refused.append(error)
    if not sockets or errno.EADDRINUSE in [error.errno for error in refused]:
        for each in sockets:
            each.close()
        raise refused[0]
    return sockets


def _listening_socket(family: socket.AddressFamily, address: tuple[object, ...]) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # "::" stands for IPv4, too, as in gRPC
        opened.bind(address)
        opened.listen()
    except OSError:
        opened.close()
        raise
    return opened


def allow_most_descriptors() -> None:
    """Let this process open as many files and connections as the system permits; shells often set a lower limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems permit "unlimited", but not to ask for it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def connections(wanted: int | None) -> int:
    """How many connections there may be at a time: as many as are wanted, or else a usual number, as far as it goes.

    Raises:
        SettingsError: there are no descriptors for those that are wanted.
    """
    most = _most_connections()
    if wanted is None:
        return min(_USUAL_CONNECTIONS, most)
    if wanted > most:
        problem = f"{wanted} connections need {wanted + _OWN_DESCRIPTORS} descriptors (ulimit -n)"
        raise SettingsError([f"max_connections: {problem}; expected at most {most}"])
    return wanted


def _most_connections() -> int:
    """Connections for which this process has descriptors, besides its own."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = allowed == resource.RLIM_INFINITY
    return _UNLIMITED if unlimited else min(max(allowed - _OWN_DESCRIPTORS, 1), _UNLIMITED)
