"""Which proxy gRPC goes through on its way to a server, by the variables of the environment that it obeys."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from beamline_client.address import is_on_this_machine, split_target

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""What gRPC looks at, the first that is set; capitals are other variables, which it does not know."""
NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")
"""The same, for the hosts that are reached directly."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy between this program and a server.

    Attributes:
        variable: What names it.
        address: Its host and port, without the name and password that its URL may have.
        detour: What to do so that the server is reached without it.
    """

    variable: str
    address: str
    detour: str

    def __str__(self) -> str:
        return f"the way there is through the proxy {self.address} of {self.variable}; to go without it, {self.detour}"


def proxy_for(target: str, environment: Mapping[str, str] | None = None) -> Proxy | None:
    """The proxy on the way to a target; None if there is none, as always for one on this machine.

    Args:
        target: As gRPC names it.
        environment: The process's own unless told.
    """
    variables = os.environ if environment is None else environment
    variable = next((name for name in PROXY_VARIABLES if name in variables), None)
    address = None if variable is None else _address(variables[variable])
    if variable is None or address is None or is_on_this_machine(target):
        return None
    endpoint = split_target(target)
    host = target if endpoint is None else endpoint.host
    exempting = next((name for name in NO_PROXY_VARIABLES if name in variables), None)
    if exempting is None:
        return Proxy(variable, address, f"set {NO_PROXY_VARIABLES[-1]}={host}")
    if any(_covers(entry.strip(), host) for entry in variables[exempting].split(",") if entry):
        return None
    return Proxy(variable, address, f"add {host} to {exempting}")


def _address(url: str) -> str | None:
    """Host and port of a proxy's URL; None if gRPC does not use it, which understands `http://` alone."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return parts.netloc.rpartition("@")[2] or None if parts.scheme == "http" else None


def _covers(entry: str, host: str) -> bool:
    if host.lower().endswith(entry.lower()):
        return True
    try:
        return "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:  # a name has no network
        return False
