"""What the C library's allocator keeps for later, given back to the system."""

import ctypes
import sys


def give_back_freed() -> None:
    """Return freed memory to the system; does nothing where the C library is not glibc.

    Of what many threads have freed, glibc keeps most for itself (malloc_trim(3)).
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
