"""One event, one line of JSON, whatever is in it."""

import contextvars
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from beamline_server import logs


def formatted(**attributes: Any) -> str:
    record = logging.makeLogRecord({"name": "beamline_server.x", "levelno": 20, "levelname": "INFO", **attributes})
    return logs.JsonFormatter().format(record)


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root, ours = logging.getLogger(), logging.getLogger("beamline_server")
    before = (root.handlers[:], root.level, ours.level)
    yield root
    root.handlers[:], _, _ = before
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_extra_fields_become_fields_of_the_event() -> None:
    fields = json.loads(formatted(msg="listening", event="listening", grpc_port=8001, created=0.0))
    assert fields == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "info",
        "logger": "beamline_server.x",
        "event": "listening",
        "grpc_port": 8001,
    }


def test_plain_messages_are_events_too() -> None:
    fields = json.loads(formatted(msg="from %s", args=("a library",)))
    assert (fields["event"], fields["message"]) == ("message", "from a library")


@pytest.mark.parametrize("text", ["a\r\nb", 'x"}\n{"event": "forged"', "\u2028\u0085\x1b[31m", "\udcff", "%s"])
def test_no_character_ends_the_line(text: str) -> None:
    line = formatted(msg=text, detail=text)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["detail"] == text


def test_events_carry_the_request_id_of_the_current_call() -> None:
    def call() -> str:
        logs.request_id.set("abc")
        return formatted(msg="x")

    assert json.loads(contextvars.copy_context().run(call))["request_id"] == "abc"
    assert "request_id" not in json.loads(formatted(msg="x"))


def test_events_carry_who_calls() -> None:
    def call() -> str:
        logs.peer.set("ipv4:10.0.0.1:1234")
        return formatted(msg="x")

    assert json.loads(contextvars.copy_context().run(call))["peer"] == "ipv4:10.0.0.1:1234"


def test_tracebacks_stay_in_the_line() -> None:
    try:
        raise ValueError("of\nours")
    except ValueError:
        line = formatted(msg="x", exc_info=sys.exc_info())
    assert "\n" not in line
    assert "ValueError: of\nours" in json.loads(line)["traceback"]


def test_debug_is_for_this_package_alone(root: logging.Logger) -> None:
    logs.configure("debug")
    assert logging.getLogger("beamline_server.rpc").isEnabledFor(logging.DEBUG)
    assert not logging.getLogger("grpc").isEnabledFor(logging.DEBUG)
    assert len(root.handlers) == 1


def test_a_higher_level_is_for_all(root: logging.Logger) -> None:
    logs.configure("error")
    assert not logging.getLogger("grpc").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("beamline_server.rpc").isEnabledFor(logging.WARNING)


class Reader:
    """Takes lines when a test wants it to."""

    def __init__(self) -> None:
        self.reads = threading.Event()
        self.lines: list[dict[str, Any]] = []

    def __call__(self, written: bytes) -> int:
        self.reads.wait()
        self.lines += map(json.loads, written.splitlines())
        return len(written)


def logger_to(reader: Callable[[bytes], int]) -> logging.Logger:
    logger = logging.getLogger("beamline_test")
    logger.handlers[:], logger.propagate = [logs.Lines(reader)], False
    logger.setLevel(logging.INFO)
    return logger


def test_nobody_waits_for_who_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_WAITING", 10)
    before, reader = logs.dropped["unread"], Reader()
    logger = logger_to(reader)
    for number in range(50):
        logger.info("x", extra={"event": "many", "number": number})
    dropped = logs.dropped["unread"] - before
    assert 39 <= dropped <= 40
    reader.reads.set()
    logger.handlers[0].flush()
    numbers = [line["number"] for line in reader.lines]
    assert len(numbers) == 50 - dropped
    assert numbers == sorted(numbers)
    assert numbers[:10] == list(range(10))
    logger.info("x", extra={"event": "many", "number": 50})
    logger.handlers[0].flush()
    assert reader.lines[-1]["number"] == 50
    assert sum(line.get("dropped_before", 0) for line in reader.lines) == dropped


def test_an_event_takes_so_many_lines_a_second_and_leaves_the_others_theirs() -> None:
    before, reader = logs.dropped["rate"], Reader()
    reader.reads.set()
    logger = logger_to(reader)
    handler = logger.handlers[0]

    def tell(event: str, second: int) -> None:
        handler.handle(logging.makeLogRecord({"event": event, "created": float(second), "levelno": logging.INFO}))

    for _ in range(logs.MOST_PER_SECOND + 7):
        tell("often", 1)
    tell("once", 1)
    tell("often", 2)
    tell("often", 2)
    handler.flush()
    told = [line.get("dropped_before") for line in reader.lines if line["event"] == "often"]
    assert told == [None] * logs.MOST_PER_SECOND + [7, None]
    assert [line["event"] for line in reader.lines].count("once") == 1
    assert logs.dropped["rate"] - before == 7


def test_a_line_that_is_taken_in_parts_is_whole_and_one_that_fails_harms_no_other() -> None:
    taken = bytearray()

    def write(line: bytes) -> int:
        if b"broken" in line:
            raise BrokenPipeError
        taken.extend(line[:5])
        return len(line[:5])

    logger = logger_to(write)
    for text in ("first", "broken", "last"):
        logger.info(text)
    logger.handlers[0].flush()
    assert [json.loads(line)["message"] for line in taken.splitlines()] == ["first", "last"]
