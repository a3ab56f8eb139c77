"""The progress bar, on a clock that the test holds."""

import io
from collections.abc import Iterator

import pytest

from beamline_client.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def seconds_apart(clock: Clock, count: int) -> Iterator[int]:
    for number in range(count):
        clock.now_s += 1.0
        yield number


def test_a_live_bar_moves_and_ends_with_a_summary() -> None:
    clock, stream = Clock(), io.StringIO()

    done = list(Progress(4, stream, live=True, clock=clock).watch(seconds_apart(clock, 4)))

    frames = stream.getvalue().split("\r\x1b[K")
    assert done == [0, 1, 2, 3]
    assert frames[2] == "[" + "#" * 15 + "." * 15 + "] 2/4  1.0 lines/s"
    assert frames[-1] == "4 of 4 lines in 4.0 s (1.0 lines/s)\n"


def test_a_bar_is_not_redrawn_faster_than_the_eye() -> None:
    clock, stream = Clock(), io.StringIO()

    list(Progress(1000, stream, live=True, clock=clock).watch(range(1000)))

    assert stream.getvalue().count("\r") == 1


def test_without_a_terminal_only_the_summary_is_written() -> None:
    clock, stream = Clock(), io.StringIO()

    list(Progress(2, stream, live=False, clock=clock).watch(seconds_apart(clock, 2)))

    assert stream.getvalue() == "2 of 2 lines in 2.0 s (1.0 lines/s)\n"


def test_an_error_still_leaves_a_summary() -> None:
    stream = io.StringIO()

    def failing() -> Iterator[int]:
        yield 0
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        list(Progress(3, stream, live=False, clock=Clock()).watch(failing()))
    assert stream.getvalue().startswith("1 of 3 lines")
