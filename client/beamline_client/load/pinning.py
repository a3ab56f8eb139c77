"""Generator and server on cores of their own, when both are on one machine. Linux only.

Without it the two take turns on the cores, and each delays the other in a way that no figure shows.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from beamline_client.address import split_target
from beamline_client.load.report import Pinning

PROC = Path("/proc")
_LISTENING = "0A"
_FEW_CORES = 3
_SHARE = 4  # of more cores than a few, every fourth is the generator's
_CORES = re.compile(r"(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?")
_SOCKET = re.compile(r"socket:\[(\d+)\]")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Cores = frozenset[int]


class PinningUnusable(Exception):
    """Generator and server cannot be kept apart; the text is one line that says why and what to do."""


class Listener(NamedTuple):
    """A socket that waits for connections."""

    address: Address
    port: int
    inode: int


def plan_pinning(
    target: str,
    cores_text: str | None,
    available: Cores,
    *,
    find: Callable[[str], Collection[int]] | None = None,
) -> Pinning:
    """Who gets which cores.

    Args:
        target: Where the server listens, as gRPC writes it.
        cores_text: The generator's cores, such as "1,3" or "2-3"; None takes the last of two or three, or the last
            quarter of more.
        available: The cores that this process may use.
        find: Finds the ids of the server's processes; `server_pids` unless told.

    Raises:
        PinningUnusable: They cannot be kept apart.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise PinningUnusable("--pin works on Linux only: leave it out, and let the generator run on another machine")
    generator = generator_cores(cores_text, available)
    return Pinning(
        generator_cores=sorted(generator),
        server_cores=sorted(available - generator),
        server_pids=sorted((find or server_pids)(target)),
    )


def generator_cores(text: str | None, available: Cores) -> Cores:
    """The generator's share of the available cores, which leaves some to the server; see `plan_pinning`.

    Raises:
        PinningUnusable: There is no such share.
    """
    if len(available) < 2:
        raise PinningUnusable("--pin needs two cores or more: leave it out, and run the generator on another machine")
    if text is None:
        count = 1 if len(available) <= _FEW_CORES else len(available) // _SHARE
        return frozenset(sorted(available)[-count:])
    cores = _parse_cores(text)
    if missing := cores - available:
        raise PinningUnusable(f"--pin {text}: there is no core {_words(missing)} here, only {_words(available)}")
    if cores == available:
        raise PinningUnusable(f"--pin {text} leaves no core to the server: name fewer")
    return cores


def _parse_cores(text: str) -> Cores:
    cores: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = _CORES.fullmatch(part)
        span = range(0) if match is None else range(int(match["first"]), int(match["last"] or match["first"]) + 1)
        if not span:
            raise PinningUnusable(f"--pin {text!r} names no cores: write numbers such as 1,3 or 2-3")
        cores.update(span)
    return frozenset(cores)


def _words(cores: Collection[int]) -> str:
    return ", ".join(map(str, sorted(cores)))


def server_pids(target: str, proc: Path = PROC) -> frozenset[int]:
    """The processes on this machine that listen at a target, those that we may move.

    Raises:
        PinningUnusable: There are none.
    """
    split = split_target(target)
    if split is None:
        raise PinningUnusable(f"--pin cannot tell who listens at {target}: name the server as HOST:PORT")
    addresses, port = _local_addresses(split[0]), split[1]
    if not addresses:
        raise PinningUnusable(f"--pin: {split[0]} is not this machine, so there is nothing to keep apart: leave it out")
    inodes = {
        listener.inode
        for table in ("tcp", "tcp6")
        for listener in listeners(_read(proc / "net" / table))
        if listener.port == port and listens_at(listener.address, addresses)
    }
    if not inodes:
        raise PinningUnusable(f"--pin: nothing on this machine listens at {target}: is the server running?")
    pids = {pid for pid in _pids(proc) if not inodes.isdisjoint(socket_inodes(_links(proc / str(pid) / "fd")))}
    if not pids:
        raise PinningUnusable(
            f"--pin: the server at {target} is another user's or in another container: run this command as it runs"
        )
    return frozenset(pids)


def listeners(table: str) -> Iterator[Listener]:
    """The listening sockets of a table such as /proc/net/tcp or tcp6, as proc(5) describes it."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTENING:
            address, _, port = fields[1].partition(":")
            yield Listener(_address(address), int(port, 16), int(fields[9]))


def _address(text: str) -> Address:
    """Hexadecimal words of four bytes, each in the byte order of x86 and ARM."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    return ipaddress.ip_address(b"".join(words))


def listens_at(listener: Address, addresses: Collection[Address]) -> bool:
    """Whether a socket that listens at this address is meant by any of these."""
    return listener.is_unspecified or _plain(listener) in {_plain(address) for address in addresses}


def _plain(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def socket_inodes(links: Collection[str]) -> frozenset[int]:
    """The inodes of the sockets among what a process's file descriptors link to."""
    return frozenset(int(match[1]) for link in links if (match := _SOCKET.fullmatch(link)))


def _local_addresses(host: str) -> frozenset[Address]:
    """Those addresses of a host that are this machine's: others cannot be bound."""
    try:
        resolved = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return frozenset()
    local: set[Address] = set()
    for family, kind, protocol, _, address in resolved:
        try:
            with socket.socket(family, kind, protocol) as attempt:
                attempt.bind(address)
        except OSError:
            continue
        local.add(ipaddress.ip_address(str(address[0]).partition("%")[0]))
    return frozenset(local)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such table: a machine without IPv6
        return ""


def _pids(folder: Path) -> Iterator[int]:
    for entry in folder.iterdir():
        if entry.name.isdecimal():
            yield int(entry.name)


def _links(folder: Path) -> list[str]:
    links: list[str] = []
    with suppress(OSError):  # somebody else's process, or gone meanwhile
        for name in os.listdir(folder):
            with suppress(OSError):
                links.append(os.readlink(folder / name))
    return links


class Affinity:
    """Which cores the threads of processes may use, as the kernel keeps it."""

    def threads(self, pid: int) -> frozenset[int]:
        """The ids of the threads of a process; empty if it is gone."""
        try:
            return frozenset(_pids(PROC / str(pid) / "task"))
        except OSError:
            return frozenset()

    def get(self, thread: int) -> Cores:
        """The cores of a thread, or of a process's first one.

        Raises:
            ProcessLookupError: It is gone.
        """
        return frozenset(os.sched_getaffinity(thread))

    def set(self, thread: int, cores: Collection[int]) -> None:
        """Gives a thread its cores.

        Raises:
            ProcessLookupError: It is gone.
            OSError: It may not be moved, or not there.
        """
        os.sched_setaffinity(thread, cores)


def move(affinity: Affinity, pid: int, cores: Collection[int], earlier: MutableMapping[int, Cores]) -> None:
    """Gives all threads of a process their cores, those too that appear meanwhile, and notes what they had before.

    Raises:
        OSError: A thread may not be moved.
    """
    done: set[int] = set()
    # Until none is new: a thread that appears has the cores of the one that made it, which may not be moved yet.
    while new := affinity.threads(pid) - done:
        for thread in new:
            with suppress(ProcessLookupError):
                before = affinity.get(thread)
                affinity.set(thread, cores)
                earlier[thread] = before
        done |= new


def pin_this_process(cores: Collection[int]) -> None:
    """Gives all threads of this process their cores; later ones get the same.

    Raises:
        OSError: There are no such cores.
    """
    os.sched_setaffinity(0, cores)
    move(Affinity(), os.getpid(), cores, {})


class Pinned:
    """Keeps the server on its cores while the context lasts, and gives it back what it had.

    Raises:
        PinningUnusable: On entering, if a thread may not be moved; those that were have their cores again.
    """

    def __init__(self, plan: Pinning, affinity: Affinity | None = None) -> None:
        self._plan = plan
        self._affinity = affinity or Affinity()
        self._earlier: dict[int, dict[int, Cores]] = {}

    def __enter__(self) -> Self:
        for pid in self._plan.server_pids:
            try:
                earlier = self._earlier[pid] = {pid: self._affinity.get(pid)}
                move(self._affinity, pid, self._plan.server_cores, earlier)
            except ProcessLookupError:
                continue
            except OSError as error:
                self._restore()
                raise PinningUnusable(
                    f"--pin cannot move the server, process {pid} ({error.strerror}): run this command as its user"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for pid, earlier in self._earlier.items():
            for thread in self._affinity.threads(pid):
                cores = earlier.get(thread, earlier[pid])
                # A thread or core that is gone meanwhile needs nothing back.
                with suppress(OSError):
                    self._affinity.set(thread, cores)
        self._earlier.clear()
