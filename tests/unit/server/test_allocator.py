"""Freed memory goes back to the system."""

import platform
import sys

import numpy as np
import pytest

from beamline_server.allocator import Trimmer, give_back_freed, resident_bytes

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_goes_back_though_something_behind_it_is_in_use() -> None:
    block = 64 * 1024  # below what glibc maps by itself and so gives back at once
    blocks = [np.ones(block, np.uint8) for _ in range(200 * MIB // block)]
    last = blocks[-1]
    blocks.clear()
    before = resident_bytes()
    give_back_freed()
    assert before - resident_bytes() > 100 * MIB
    assert last.all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_in_use_is_resident() -> None:
    before = resident_bytes()
    held = np.ones(100 * MIB, np.uint8)
    assert 90 * MIB < resident_bytes() - before < 200 * MIB
    assert held.all()


class Memory:
    """How much a process has, and what of it is free."""

    def __init__(self) -> None:
        self.resident, self.free, self.trims = 200 * MIB, 0, 0

    def give_back(self) -> None:
        self.resident, self.free, self.trims = self.resident - self.free, 0, self.trims + 1


def test_what_a_burst_has_left_is_given_back_once() -> None:
    memory = Memory()
    trimmer = Trimmer(lambda: memory.resident, memory.give_back)
    trimmer.look()
    assert memory.trims == 0
    memory.resident, memory.free = 900 * MIB, 650 * MIB
    for _ in range(3):
        trimmer.look()
    assert (memory.trims, memory.resident) == (1, 250 * MIB)


def test_what_is_in_use_is_looked_for_ever_more_seldom_until_it_is_free() -> None:
    memory = Memory()
    trimmer = Trimmer(lambda: memory.resident, memory.give_back)
    memory.resident = 900 * MIB
    tried = []
    for look in range(100):
        before = memory.trims
        trimmer.look()
        if memory.trims > before:
            tried.append(look)
    assert tried == [0, 2, 5, 10, 19, 36, 69]
    memory.free = 600 * MIB
    for _ in range(40):
        trimmer.look()
    assert memory.resident == 300 * MIB
    trims = memory.trims
    trimmer.look()
    memory.resident = 900 * MIB
    trimmer.look()
    assert memory.trims == trims + 1
