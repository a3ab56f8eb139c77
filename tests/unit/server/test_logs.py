"""One event, one line of JSON, whatever is in it."""

import contextvars
import json
import logging
import sys
from collections.abc import Iterator
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
