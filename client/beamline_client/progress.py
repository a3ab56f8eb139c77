"""A progress bar for a terminal, and one closing line for everything else."""

import time
from collections.abc import Callable, Generator, Iterable
from typing import TextIO, TypeVar

_BAR_WIDTH = 30
_REDRAW_EVERY_S = 0.1
CLEAR_LINE = "\r\x1b[K"
"""What takes a bar away that is drawn on a terminal."""

ItemT = TypeVar("ItemT")


class Progress:
    """Counts lines against their total.

    Args:
        total: How many lines there will be.
        stream: Where to write, usually stderr.
        live: Whether to draw a bar that moves; otherwise only the summary is written, at the end.
        clock: Monotonic seconds.
    """

    def __init__(self, total: int, stream: TextIO, *, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._stream = stream
        self._live = live
        self._clock = clock
        self._started_s = clock()
        self._drawn_s = self._started_s
        self._done = 0

    def watch(self, items: Iterable[ItemT]) -> Generator[ItemT, None, None]:
        """Yields the items and counts each as done; leaves a summary when the iteration ends, also by an error."""
        try:
            for item in items:
                yield item
                self._done += 1
                self._redraw()
        finally:
            self._summarize()

    def _redraw(self) -> None:
        now_s = self._clock()
        if not self._live or now_s - self._drawn_s < _REDRAW_EVERY_S:
            return
        self._drawn_s = now_s
        filled = _BAR_WIDTH * self._done // max(self._total, 1)
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        self._stream.write(f"{CLEAR_LINE}[{bar}] {self._done}/{self._total}  {self._rate(now_s):.1f} lines/s")
        self._stream.flush()

    def _summarize(self) -> None:
        now_s = self._clock()
        start = CLEAR_LINE if self._live else ""
        elapsed_s = now_s - self._started_s
        self._stream.write(
            f"{start}{self._done} of {self._total} lines in {elapsed_s:.1f} s ({self._rate(now_s):.1f} lines/s)\n"
        )
        self._stream.flush()

    def _rate(self, now_s: float) -> float:
        return self._done / max(now_s - self._started_s, 1e-9)
