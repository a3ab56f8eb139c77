"""The view of a run in progress, on a clock that the test holds."""

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.live import LINE_EVERY_S, Snapshot, open_view

SNAPSHOT = Snapshot(
    title="open loop, poisson 100/s, 30 s",
    elapsed_s=12.3,
    duration_s=30.0,
    sent=1234,
    planned=3000,
    in_flight=12,
    outcomes={"ok": 1200, "rejected": 7, "cancelled": 15},
    answered_per_s=97.6,
    p50_ms=49.1,
    p99_ms=221.4,
    lag_p99_ms=0.31,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.lists(st.floats(0.01, 4.0), max_size=200))
def test_without_a_terminal_lines_are_five_seconds_apart(pauses_s: list[float]) -> None:
    clock, stream = Clock(), io.StringIO()
    view = open_view(stream, clock=clock)
    written_s = []
    for pause_s in pauses_s:
        clock.now_s += pause_s
        before = stream.tell()
        view.update(SNAPSHOT)
        written_s += [clock.now_s] if stream.tell() > before else []

    assert all(b - a >= LINE_EVERY_S for a, b in zip([0.0, *written_s], written_s, strict=False))
    assert len(written_s) >= clock.now_s // (LINE_EVERY_S + 4.0)


def test_a_line_says_where_the_run_stands() -> None:
    clock, stream = Clock(), io.StringIO()
    with open_view(stream, clock=clock) as view:
        clock.now_s = LINE_EVERY_S
        view.update(SNAPSHOT)

    assert stream.getvalue() == (
        "12 s of 30 s: 1,234 of 3,000 sent, 97.6/s answered, p50 49.1 ms, p99 221 ms, 12 in flight, 7 rejected\n"
    )


def test_a_line_says_nothing_of_what_is_not_known() -> None:
    clock, stream = Clock(), io.StringIO()
    view = open_view(stream, clock=clock)
    clock.now_s = LINE_EVERY_S
    view.update(replace(SNAPSHOT, planned=None, outcomes={}, p50_ms=None, p99_ms=None, lag_p99_ms=None))

    assert "None" not in stream.getvalue()
    assert "1,234 sent" in stream.getvalue()


def test_notes_are_lines_at_once() -> None:
    stream = io.StringIO()
    open_view(stream, clock=Clock()).note("warming up\n\x1b[31mred")

    assert stream.getvalue() == "warming up �[31mred\n"


def test_quiet_is_silent() -> None:
    stream = Terminal()
    with open_view(stream, quiet=True) as view:
        view.update(SNAPSHOT)
        view.note("warming up")
        view.close()

    assert stream.getvalue() == ""


def test_a_terminal_shows_every_update_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with open_view(stream) as view:
        view.update(SNAPSHOT)
        view.note("warming up")
        view.update(replace(SNAPSHOT, sent=1300, outcomes={"ok": 1, "transport": 2}))
    drawn = stream.getvalue()
    view.close()

    for told in ("open loop, poisson 100/s", "1,234 of 3,000 sent", "49.1 ms", "221 ms", "7 rejected", "12 s of 30 s"):
        assert told in drawn
    assert drawn.index("warming up\n") < drawn.index("1,300 of 3,000 sent") < drawn.index("2 transport")
    assert drawn.index("\x1b[?25l") < drawn.rindex("\x1b[?25h")  # the cursor is hidden, and shown again
    assert drawn.rstrip().endswith("\x1b[2K")  # the last thing is to take the display away


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_a_display_fits_its_terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with open_view(stream) as view:
        view.update(SNAPSHOT)
        shown = stream.getvalue().replace("\x1b[?25l", "").replace("\x1b[1m", "").replace("\x1b[0m", "")

    lines = shown.replace("\x1b[2m", "").splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= int(columns)


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with open_view(stream, clock=Clock()) as view:
        view.update(SNAPSHOT)

    assert stream.getvalue() == ""
