"""Who gets which cores, and who is the server: tables as the kernel writes them, and one socket of our own."""

import os
import socket
from collections.abc import Collection
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.pinning import (
    Affinity,
    Cores,
    Listener,
    Pinned,
    PinningUnusable,
    generator_cores,
    listeners,
    listens_at,
    move,
    pin_this_process,
    plan_pinning,
    server_pids,
    socket_inodes,
)
from beamline_client.load.report import Pinning

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")

TARGET = "localhost:8001"
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1111 1 000000003a5b 100 0
   1: 00000000:1F42 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 2222 1 000000003a5b 100 0
   2: 0100007F:1F41 0100007F:C001 01 00000000:00000000 00:00000000 00000000  1000        0 3333 1 000000003a5b 20 4
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx rx tr tm retr uid timeout inode
   0: 00000000000000000000000001000000:1F41 00000000000000000000000000000000:0000 0A 0:0 00:0 0 1000 0 4444 1
   1: 0000000000000000FFFF00000100007F:1F43 00000000000000000000000000000000:0000 0A 0:0 00:0 0 1000 0 5555 1
"""


def cores(*numbers: int) -> Cores:
    return frozenset(numbers)


def first_cores(count: int) -> Cores:
    return frozenset(range(count))


@given(st.frozensets(st.integers(0, 300), min_size=2))
def test_both_sides_get_cores_and_share_none(available: Cores) -> None:
    plan = plan_pinning(TARGET, None, available, find=lambda target: [7, 3])

    generator, server = set(plan.generator_cores), set(plan.server_cores)
    assert generator
    assert server
    assert not generator & server
    assert generator | server == available
    assert len(server) >= len(generator)
    assert min(generator) > max(server)
    assert plan.server_pids == [3, 7]


@pytest.mark.parametrize(("available", "expected"), [(2, [1]), (3, [2]), (4, [3]), (8, [6, 7]), (9, [7, 8])])
def test_the_generator_gets_the_last_quarter_or_a_core(available: int, expected: list[int]) -> None:
    assert sorted(generator_cores(None, first_cores(available))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", {3}), ("1,3", {1, 3}), ("2-3", {2, 3}), ("0, 2-3", {0, 2, 3}), ("1-1", {1}), ("2,2", {2})],
)
def test_cores_can_be_named(text: str, expected: set[int]) -> None:
    assert generator_cores(text, first_cores(8)) == expected


@pytest.mark.parametrize(
    ("text", "available", "words"),
    [
        (None, cores(0), "needs two cores"),
        (None, cores(), "needs two cores"),
        ("0", cores(4), "needs two cores"),
        ("0-1", cores(0, 1), "leaves no core to the server"),
        ("2", cores(0, 1), "there is no core 2 here, only 0, 1"),
        ("1-3", cores(0, 1, 2), "there is no core 3 here"),
        ("", cores(0, 1), "names no cores"),
        ("one", cores(0, 1), "names no cores"),
        ("3-2", cores(0, 1, 2, 3), "names no cores"),
        ("-1", cores(0, 1), "names no cores"),
        ("1,,2", cores(0, 1, 2), "names no cores"),
        ("0x1", cores(0, 1), "names no cores"),
    ],
)
def test_unusable_cores_are_one_clear_line(text: str | None, available: Cores, words: str) -> None:
    with pytest.raises(PinningUnusable, match=words):
        generator_cores(text, available)


@given(st.text(), st.frozensets(st.integers(0, 20), min_size=2))
def test_any_text_names_cores_or_is_refused(text: str, available: Cores) -> None:
    with suppress(PinningUnusable):
        assert cores() < generator_cores(text, available) < available


def test_listening_sockets_are_read_from_the_kernels_tables() -> None:
    assert list(listeners(TCP)) == [
        Listener(ip_address("127.0.0.1"), 8001, 1111),
        Listener(ip_address("0.0.0.0"), 8002, 2222),
    ]
    assert list(listeners(TCP6)) == [
        Listener(ip_address("::1"), 8001, 4444),
        Listener(ip_address("::ffff:127.0.0.1"), 8003, 5555),
    ]
    assert list(listeners("")) == []


@pytest.mark.parametrize(
    ("listener", "address", "meant"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "10.0.0.1", False),
        ("0.0.0.0", "10.0.0.1", True),
        ("::", "10.0.0.1", True),
        ("::", "::1", True),
        ("::1", "127.0.0.1", False),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
    ],
)
def test_a_socket_is_meant_by_its_own_address_or_by_any(listener: str, address: str, meant: bool) -> None:
    assert listens_at(ip_address(listener), [ip_address(address)]) == meant


def test_inodes_are_those_of_sockets() -> None:
    links = ["socket:[17]", "pipe:[18]", "/dev/null", "anon_inode:[eventpoll]", "socket:[19]"]

    assert socket_inodes(links) == {17, 19}


def made_up_proc(folder: Path, owners: dict[int, list[str]], tcp: str = TCP) -> Path:
    (folder / "net").mkdir()
    (folder / "net" / "tcp").write_text(tcp)
    (folder / "meminfo").write_text("")
    for pid, links in owners.items():
        (folder / str(pid) / "fd").mkdir(parents=True)
        for number, link in enumerate(links):
            (folder / str(pid) / "fd" / str(number)).symlink_to(link)
    return folder


def test_all_processes_that_hold_the_socket_are_the_server(tmp_path: Path) -> None:
    owners = {
        10: ["/dev/null", "socket:[1111]"],
        11: ["socket:[1111]"],
        12: ["socket:[3333]"],
        13: ["socket:[2222]"],
    }
    proc = made_up_proc(tmp_path, owners)

    assert server_pids("127.0.0.1:8001", proc) == {10, 11}
    assert server_pids("ipv4:127.0.0.1:8002", proc) == {13}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("127.0.0.1:8009", "nothing on this machine listens at 127.0.0.1:8009: is the server running"),
        ("127.0.0.2:8001", "nothing on this machine listens"),
        ("127.0.0.1:8001", "another user's or in another container"),
        ("192.0.2.1:8001", "192.0.2.1 is not this machine"),  # an address for documentation: nobody has it
        ("unix:/run/server.sock", "name the server as HOST:PORT"),
        ("127.0.0.1", "name the server as HOST:PORT"),
    ],
)
def test_a_server_that_is_not_found_is_one_clear_line(target: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PinningUnusable, match=words):
        server_pids(target, made_up_proc(tmp_path, {10: ["/dev/null"]}))


def test_the_process_behind_a_real_socket_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"

        assert os.getpid() in server_pids(target)


def test_the_cores_of_a_real_process_can_be_set() -> None:
    own = os.sched_getaffinity(0)
    plan = Pinning(generator_cores=[], server_cores=sorted(own), server_pids=[os.getpid()])

    with Pinned(plan):
        pin_this_process(own)  # any other set could be one that this machine does not have

    assert os.sched_getaffinity(0) == own
    assert os.getpid() in Affinity().threads(os.getpid())


class Threads(Affinity):
    """A made-up kernel: processes, their threads and their cores."""

    def __init__(self, processes: dict[int, dict[int, Cores]]) -> None:
        self.processes = processes
        self.born: list[tuple[int, int]] = []
        """Threads that appear in a process one by one, each when its threads are listed."""
        self.immovable: set[int] = set()

    def threads(self, pid: int) -> frozenset[int]:
        listed = frozenset(self.processes.get(pid, {}))
        if listed and self.born and self.born[0][0] == pid:
            self.processes[pid][self.born.pop(0)[1]] = self.processes[pid][pid]
        return listed

    def get(self, thread: int) -> Cores:
        return self._process_of(thread)[thread]

    def set(self, thread: int, cores: Collection[int]) -> None:
        if thread in self.immovable:
            raise PermissionError(1, "Operation not permitted")
        self._process_of(thread)[thread] = frozenset(cores)

    def _process_of(self, thread: int) -> dict[int, Cores]:
        for threads in self.processes.values():
            if thread in threads:
                return threads
        raise ProcessLookupError(3, "No such process")


PLAN = Pinning(generator_cores=[3], server_cores=[0, 1, 2], server_pids=[10, 20])
SERVER = cores(0, 1, 2)


def two_processes() -> dict[int, dict[int, Cores]]:
    return {10: {10: first_cores(4), 11: cores(1, 3)}, 20: {20: cores(2, 3)}}


def test_all_threads_are_moved_and_get_back_what_they_had() -> None:
    kernel = Threads(two_processes())

    with Pinned(PLAN, kernel):
        assert {each for threads in kernel.processes.values() for each in threads.values()} == {SERVER}

    assert kernel.processes == two_processes()


def test_they_get_it_back_after_an_error_too() -> None:
    kernel = Threads(two_processes())

    with pytest.raises(RuntimeError), Pinned(PLAN, kernel):
        raise RuntimeError
    assert kernel.processes == two_processes()


def test_threads_that_appear_while_others_are_moved_are_moved_as_well() -> None:
    kernel = Threads(two_processes())
    kernel.born = [(10, 12), (10, 13), (10, 14)]

    with Pinned(PLAN, kernel):
        assert kernel.processes[10] == dict.fromkeys([10, 11, 12, 13, 14], SERVER)


def test_later_threads_get_what_their_process_had() -> None:
    kernel = Threads(two_processes())

    with Pinned(PLAN, kernel):
        kernel.processes[10][15] = SERVER

    assert kernel.processes[10][15] == first_cores(4)


def test_what_is_gone_is_not_missed() -> None:
    kernel = Threads(two_processes())

    with Pinned(PLAN, kernel):
        del kernel.processes[10][11]
        del kernel.processes[20]

    assert kernel.processes == {10: {10: first_cores(4)}}


def test_a_process_that_ends_before_is_not_missed() -> None:
    kernel = Threads({20: {20: cores(2, 3)}})

    with Pinned(PLAN, kernel):
        assert kernel.processes == {20: {20: SERVER}}


def test_threads_that_may_not_be_moved_leave_everything_as_it_was() -> None:
    kernel = Threads(two_processes())
    kernel.immovable = {11}

    with pytest.raises(PinningUnusable, match=r"cannot move the server, process 10 \(Operation not permitted\)"):
        Pinned(PLAN, kernel).__enter__()
    assert kernel.processes == two_processes()


def test_a_thread_that_ends_while_it_is_moved_is_not_noted() -> None:
    class Ending(Threads):
        def get(self, thread: int) -> Cores:
            before = super().get(thread)
            if thread == 11:
                del self.processes[10][11]
            return before

    earlier: dict[int, Cores] = {}
    move(Ending(two_processes()), 10, SERVER, earlier)

    assert earlier == {10: first_cores(4)}
