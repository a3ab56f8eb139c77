"""What a person sees while load runs: a display that moves on a terminal, a line every few seconds elsewhere."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from beamline_client.load.target import FAILURES
from beamline_client.load.wording import milliseconds, per_second, plain

LINE_EVERY_S = 5.0
"""How often a line is written where nothing can move."""
_FAILURE_LABELS = frozenset(outcome.label for outcome in FAILURES)
_WIDEST = 76
_REDRAW_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a run stands."""

    title: str
    """Such as "open loop, poisson 100/s, 30 s"."""
    elapsed_s: float
    duration_s: float
    sent: int
    planned: int | None
    """Requests of the schedule; None if there is none."""
    in_flight: int
    outcomes: Mapping[str, int]
    """Ended requests, by `Outcome.label`."""
    answered_per_s: float
    """Lately."""
    p50_ms: float | None
    """Of the answers so far; None without any."""
    p99_ms: float | None
    lag_p99_ms: float | None
    """How late the generator sent so far; None in a closed loop."""


class View(Protocol):
    """Shows snapshots. Not for use by several threads at a time."""

    def is_due(self) -> bool:
        """Whether it is time to show one; to make one costs time as well."""

    def update(self, snapshot: Snapshot) -> None:
        """Shows where the run stands, if it is time to."""

    def note(self, text: str) -> None:
        """Writes a line that stays."""

    def close(self) -> None:
        """Takes away what moved; may be called twice."""

    def __enter__(self) -> Self:
        """Itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""


def open_view(stream: TextIO, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> View:
    """The view that fits the stream.

    Args:
        stream: Where to write, usually stderr.
        quiet: Show nothing at all.
        clock: Monotonic seconds.
    """
    if quiet:
        return _Silence()
    moves = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return _Display(stream, clock) if moves else _Lines(stream, clock)


class _Closing:
    """Views are closed by `with`."""

    def close(self) -> None:
        """Nothing to take away."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Silence(_Closing):
    def is_due(self) -> bool:
        return False

    def update(self, snapshot: Snapshot) -> None:
        """Nothing is shown."""

    def note(self, text: str) -> None:
        """Nothing is written."""


class _Lines(_Closing):
    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._next_s = clock() + LINE_EVERY_S

    def is_due(self) -> bool:
        return self._clock() >= self._next_s

    def update(self, snapshot: Snapshot) -> None:
        if self.is_due():
            self._next_s = self._clock() + LINE_EVERY_S
            self.note(_line(snapshot))

    def note(self, text: str) -> None:
        self._stream.write(plain(text) + "\n")
        self._stream.flush()


class _Display(_Closing):
    """Drawn by update() only: a thread that redraws would take CPU time from the generator at any moment."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next_s = clock()
        self._live = Live(
            console=Console(file=stream, force_terminal=True, highlight=False),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def is_due(self) -> bool:
        return self._clock() >= self._next_s

    def update(self, snapshot: Snapshot) -> None:
        self._next_s = self._clock() + _REDRAW_EVERY_S
        self._live.update(_drawing(snapshot, min(self._live.console.width, _WIDEST)), refresh=True)

    def note(self, text: str) -> None:
        self._live.console.print(Text(plain(text)))

    def close(self) -> None:
        self._live.stop()


def _line(snapshot: Snapshot) -> str:
    failures = "".join(f", {count:,} {label}" for label, count in _failures(snapshot).items())
    return (
        f"{snapshot.elapsed_s:.0f} s of {snapshot.duration_s:.0f} s: {_sent(snapshot)}, "
        f"{per_second(snapshot.answered_per_s)} answered, p50 {milliseconds(snapshot.p50_ms)}, "
        f"p99 {milliseconds(snapshot.p99_ms)}, {snapshot.in_flight:,} in flight{failures}"
    )


def _drawing(snapshot: Snapshot, width: int) -> Group:
    bar = Table.grid(padding=(0, 1))
    bar.width = width
    bar.add_row(
        ProgressBar(total=max(snapshot.duration_s, 1e-9), completed=min(snapshot.elapsed_s, snapshot.duration_s)),
        Text(f"{snapshot.elapsed_s:.0f} s of {snapshot.duration_s:.0f} s", no_wrap=True),
    )
    figures = Text.assemble(
        (f"{per_second(snapshot.answered_per_s)}", "bold"),
        " answered   p50 ",
        (milliseconds(snapshot.p50_ms), "bold"),
        "   p99 ",
        (milliseconds(snapshot.p99_ms), "bold"),
    )
    if snapshot.lag_p99_ms is not None:
        figures.append(f"   lag p99 {milliseconds(snapshot.lag_p99_ms)}", "dim")
    failures = _failures(snapshot)
    ended = Text(f"{snapshot.outcomes.get('ok', 0):,} ok")
    for label, count in snapshot.outcomes.items():
        if label != "ok" and count:
            ended.append(f"   {count:,} {label.replace('_', ' ')}", "bold red" if label in failures else "")
    sent = Text(f"{_sent(snapshot)}   {snapshot.in_flight:,} in flight")
    lines = [Text(plain(snapshot.title), style="bold"), sent, figures, ended]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(lines[0], bar, *lines[1:])


def _sent(snapshot: Snapshot) -> str:
    return f"{snapshot.sent:,} sent" if snapshot.planned is None else f"{snapshot.sent:,} of {snapshot.planned:,} sent"


def _failures(snapshot: Snapshot) -> dict[str, int]:
    return {label: count for label, count in snapshot.outcomes.items() if count and label in _FAILURE_LABELS}
