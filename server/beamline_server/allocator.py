"""What the C library's allocator keeps for later, given back to the system."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

_GROWN = 1.25
_GROWN_BYTES = 64 << 20
"""Memory has grown when it is by so much more than it was at least: a part, and bytes."""
_MOST_LOOKS = 32
"""Looks between two tries at most, while memory is in use."""


def give_back_freed() -> None:
    """Return freed memory to the system, as far as the C library is glibc.

    Of what many threads have freed, glibc keeps most for itself (malloc_trim(3)). Before that, Python frees what only
    refers to itself, such as a large request and the error that refused it: few objects, for which it takes its time.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Memory that this process has of the system's; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Trimmer:
    """Gives back what was freed when memory has grown; if little was free, it tries again ever later.

    Args:
        resident: Tells how much there is.
        give_back: Gives back what is free.
    """

    def __init__(
        self, resident: Callable[[], int] = resident_bytes, give_back: Callable[[], object] = give_back_freed
    ) -> None:
        self._resident = resident
        self._give_back = give_back
        self._least = resident()
        self._looks_left, self._looks_between = 0, 1

    def look(self) -> None:
        """Give back what is free if memory has grown. Blocks while it does."""
        if not self._has_grown():
            self._looks_left, self._looks_between = 0, 1
        elif self._looks_left:
            self._looks_left -= 1
        else:
            self._give_back()
            if self._has_grown():
                self._looks_left, self._looks_between = self._looks_between, min(2 * self._looks_between, _MOST_LOOKS)

    def _has_grown(self) -> bool:
        now = self._resident()
        self._least = min(self._least, now)
        return now > _GROWN * self._least + _GROWN_BYTES
