"""How a signal ends an export: by an exception, so that what was begun is cleaned up, and not while that is done."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal has asked to stop.

    Attributes:
        signal: Which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


class Signals:
    """Signals that end a process, as exceptions.

    Attributes:
        held: While above 0, a signal waits for `release`. Counted up by an assignment, not by a call: on the way into
            a function, Python looks for signals.
    """

    def __init__(self) -> None:
        self.held = 0
        self._waiting: int | None = None

    @contextmanager
    def as_exceptions(self) -> Iterator[None]:
        """Raise `Stopped` when a signal comes; those that whoever started the process has ignored stay so."""
        self.held, self._waiting = 0, None
        heeded = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._came) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def release(self) -> None:
        """End what `held` began; raises `Stopped` if a signal has come meanwhile."""
        self.held -= 1
        if not self.held and self._waiting is not None:
            number, self._waiting = self._waiting, None
            raise Stopped(number)

    def _came(self, number: int, _: FrameType | None) -> None:
        if not self.held:
            raise Stopped(number)
        self._waiting = number


SIGNALS = Signals()
"""Those of this process."""
