"""What an export shows: a line per step for a file, live for a terminal."""

import io
import time

import pytest

from beamline_export.progress import Progress


class Terminal(io.StringIO):
    """A stream that somebody looks at."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_a_file_gets_one_line_per_step() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    with progress.step("read"):
        pass
    assert list(progress.iterate("compare", 3)) == [0, 1, 2]
    progress.warn("careful")
    assert stream.getvalue() == "  read: 0.0 s\n  compare: 0.0 s\n  warning: careful\n"


def test_a_terminal_sees_the_step_before_it_is_done() -> None:
    stream = Terminal()
    with Progress(stream).step("read"):
        assert stream.getvalue() == "  read …"
    assert stream.getvalue().endswith("\r  read: 0.0 s\n")


def test_a_terminal_sees_how_far_a_long_step_is() -> None:
    stream = Terminal()
    with Progress(stream).counting("write", 4_000_000) as advance:
        began = stream.getvalue()
        for _ in range(3):
            time.sleep(0.15)
            advance(1_000_000)
        assert "75%" in stream.getvalue().removeprefix(began)
        assert "3.00M/4.00M" in stream.getvalue()
    assert stream.getvalue().endswith("s\n")


def test_a_file_gets_one_line_of_a_long_step() -> None:
    stream = io.StringIO()
    with Progress(stream).counting("write", 10) as advance:
        advance(10)
    assert stream.getvalue() == "  write: 0.0 s\n"


@pytest.mark.parametrize(("stream", "shown"), [(io.StringIO(), ""), (Terminal(), "  read …\n")])
def test_a_failed_step_leaves_the_line_to_the_error(stream: io.StringIO, shown: str) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(stream).step("read"):
        raise KeyboardInterrupt
    assert stream.getvalue() == shown
