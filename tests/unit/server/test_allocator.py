"""Freed memory goes back to the system."""

import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from beamline_server.allocator import give_back_freed

MIB = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
