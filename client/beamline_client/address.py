"""Addresses of servers, as gRPC names them: what they say, and what is wrong with one that a person has written."""

import ipaddress
import re
from typing import NamedTuple

_LISTS = ("ipv4", "ipv6")
_SCHEMES_OF_HOSTS = ("dns", *_LISTS)
_SCHEMES_OF_SOCKETS = ("unix", "unix-abstract", "vsock")
_SCHEMES = (*_SCHEMES_OF_HOSTS, *_SCHEMES_OF_SOCKETS, "xds", "google-c2p")
_BRACKETED = re.compile(r"\[([^\[\]]*)\](?::(.*))?", re.DOTALL)
_NOT_IN_HOSTS = re.compile(r"[\s/?#@\[\]]")
GRPC_PORT = 8001
"""The server's default."""
DEFAULT_SERVER = f"localhost:{GRPC_PORT}"
_HOW_TO_WRITE = f"write HOST:PORT, such as {DEFAULT_SERVER}"


class AddressUnusable(ValueError):
    """What was given is no address of a server; the text is one line that says why and what to write instead."""


class Endpoint(NamedTuple):
    """Where to connect: a host, without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """As in a URL: an IPv6 address in brackets."""
        return f"{_in_url(self.host)}:{self.port}"


def endpoints(target: str) -> list[Endpoint]:
    """The hosts and ports that a gRPC target names: HOST:PORT, or with the schemes dns, ipv4 or ipv6.

    Returns:
        Empty for the other schemes of gRPC, such as `unix:`.

    Raises:
        AddressUnusable: gRPC would take it for another address than the one that was meant, or could never reach it.
    """
    if not target.strip():
        raise AddressUnusable(f"the address of the server is empty: {_HOW_TO_WRITE}")
    scheme, rest = _split_scheme(target)
    if scheme is not None and scheme not in _SCHEMES:
        place = rest[2:].partition("/")[0]
        better = place if ":" in place else f"{place}:{GRPC_PORT}"
        raise AddressUnusable(f"{target} is a URL: write the host and the port of gRPC alone, such as {better}")
    if scheme is not None and scheme not in _SCHEMES_OF_HOSTS:
        return []
    if scheme is not None and rest.startswith("//"):  # then comes who is asked for the name
        rest = rest[2:].partition("/")[2]
    return [_endpoint(part) for part in (rest.split(",") if scheme in _LISTS else [rest])]


def split_target(target: str) -> Endpoint | None:
    """The host and port of a gRPC target; None if it does not name exactly one of each."""
    try:
        found = endpoints(target)
    except AddressUnusable:
        return None
    return found[0] if len(found) == 1 else None


def is_on_this_machine(target: str) -> bool:
    """Whether the way to a target stays on this machine: a loopback address, localhost, or a socket without a host."""
    try:
        found = endpoints(target)
    except AddressUnusable:
        return False
    return all(_is_local(host) for host, _ in found) if found else _split_scheme(target)[0] in _SCHEMES_OF_SOCKETS


def is_numeric(target: str) -> bool:
    """Whether a target is one address and port, so that no name has to be looked up."""
    endpoint = split_target(target)
    return endpoint is not None and _ip_address(endpoint.host) is not None


def _split_scheme(target: str) -> tuple[str | None, str]:
    scheme, colon, rest = target.partition(":")
    # A host can be called "dns", too.
    if colon and (rest.startswith("//") or (scheme in _SCHEMES and not rest.isdecimal())):
        return scheme, rest
    return None, target


def _endpoint(text: str) -> Endpoint:
    host, port = _host_and_port(text)
    if not host or _NOT_IN_HOSTS.search(host):
        raise AddressUnusable(f"{text} names no host: {_HOW_TO_WRITE}")
    if not port:
        raise AddressUnusable(f"{text} names no port: write {text.removesuffix(':')}:{GRPC_PORT}, or another port")
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65_536):
        raise AddressUnusable(f"{text} has no such port: ports are 1 to 65535")
    return Endpoint(host, int(port))


def _host_and_port(text: str) -> tuple[str, str]:
    bracketed = _BRACKETED.fullmatch(text)
    if bracketed is not None and _is_ipv6(bracketed[1]):
        return bracketed[1], bracketed[2] or ""
    host, _, port = text.rpartition(":")
    if _is_ipv6(text) or _is_ipv6(host):
        is_whole = not (_is_ipv6(host) and port.isdecimal())
        better = f"{_in_url(text)}:{GRPC_PORT}" if is_whole else f"{_in_url(host)}:{port}"
        raise AddressUnusable(f"{text} has an IPv6 address without brackets: write {better}")
    if ":" in host or bracketed is not None:
        raise AddressUnusable(f"{text} is no address: {_HOW_TO_WRITE}")
    return (host, port) if ":" in text else (text, "")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _is_ipv6(text: str) -> bool:
    return isinstance(_ip_address(text), ipaddress.IPv6Address)


def _is_local(host: str) -> bool:
    name = host.rstrip(".").lower()
    address = _ip_address(name)
    if address is None:
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    # Whoever connects to the unspecified address, which servers listen at, reaches the machine itself.
    return (mapped or address).is_loopback or address.is_unspecified
