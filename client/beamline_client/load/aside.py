"""The coordinator lets the generator go first on the cores that they share."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress


def stand_aside() -> None:
    """Lets the calling thread run only while nobody else wants its core, where the system has that.

    What it starts runs as usual.
    """
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE | os.SCHED_RESET_ON_FORK, os.sched_param(0))


@contextmanager
def aside(cores: Collection[int]) -> Iterator[None]:
    """Keeps the calling thread on the generator's cores, and lets the generator go first, while the context lasts.

    On a core that both share, a request that is due would otherwise wait for the coordinator's turn to end, which takes
    milliseconds.
    Where the system does not let an ordinary user go back, the thread stays as it is.

    Args:
        cores: The generator's; none changes nothing.
    """
    if not cores:
        yield
        return
    earlier = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    stand_aside()
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, earlier)
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
