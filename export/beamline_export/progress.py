"""Shows what an export is doing: a line per step, a bar where a step counts."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

Advance = Callable[[int], object]
"""Is told how many more bytes are done."""

_MOST_SHOWN = 4000
"""Characters of one message."""


def one_line(text: str) -> str:
    """A text that holds what stands in somebody's files, for a terminal: one line, of bounded length, as it reads."""
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text[:_MOST_SHOWN].split()))
    return plain if len(text) <= _MOST_SHOWN else f"{plain} …"


class Progress:
    """Writes to a stream; bars only where somebody looks at it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step; when it is done, how long it took."""
        if self._live:
            print(f"  {name} …", end="", file=self._stream, flush=True)
        began = time.monotonic()
        try:
            yield
        except BaseException:
            if self._live:  # what is said about it gets a line of its own
                print(file=self._stream, flush=True)
            raise
        start = "\r" if self._live else ""
        print(f"{start}  {name}: {time.monotonic() - began:.1f} s", file=self._stream, flush=True)

    def iterate(self, name: str, count: int) -> Iterator[int]:
        """0 … count - 1, with a bar."""
        with self.step(name):
            yield from tqdm(range(count), desc=f"  {name}", file=self._stream, leave=False, disable=not self._live)

    @contextmanager
    def counting(self, name: str, total: int) -> Iterator[Advance]:
        """A step over so many bytes: is told of each part of them, and has a bar."""
        with self.step(name), self.bar(name, total) as advance:
            yield advance

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Advance]:
        """As `counting`, for a part of a step."""
        with tqdm(
            total=total,
            file=self._stream,
            desc=f"  {name}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not self._live,
        ) as bar:
            yield bar.update

    def warn(self, text: str) -> None:
        """Something that the user should know."""
        print(f"  warning: {one_line(text)}", file=self._stream, flush=True)
