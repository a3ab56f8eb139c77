"""What the C library's allocator keeps for later, given back to the system."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

_GROWN = 1.25
_GROWN_BYTES = 64 << 20
"""Memory has grown when it is by so much more than it was: a part, and bytes."""


def give_back_freed() -> None:
    """Return freed memory to the system; does nothing where the C library is not glibc.

    Of what many threads have freed, glibc keeps most for itself (malloc_trim(3)).
    """
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
    """Gives back what was freed whenever memory has grown.

    Args:
        resident: Tells how much there is.
        give_back: Gives back what is free.
    """

    def __init__(
        self, resident: Callable[[], int] = resident_bytes, give_back: Callable[[], object] = give_back_freed
    ) -> None:
        self._resident = resident
        self._give_back = give_back
        self._usual = resident()

    def look(self) -> None:
        """Give back what is free if there is more than was left the last time. Blocks while it does."""
        now = self._resident()
        if now > _GROWN * self._usual + _GROWN_BYTES:
            self._give_back()
            now = self._resident()
            self._usual = now
        self._usual = min(self._usual, now)
