"""Logs as JSON: one event per line on stderr, with the request's id where there is one and never its text.

    _log.info("serving", extra={"event": "serving", "model": name})

What is passed as `extra` becomes fields of the event.
"""

import json
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any

MOST_PER_SECOND = 100
"""Lines of an event."""
MOST_WAITING = 10_000
"""Lines that wait to be written."""
_LAST_LINES_S = 1.0
_STDERR = 2

dropped: Counter[str] = Counter(rate=0, unread=0)
"""Lines that were not written: an event came too often, or nobody read them."""

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The `x-request-id` of the call that the current task handles; every event logged meanwhile carries it."""
peer: ContextVar[str | None] = ContextVar("peer", default=None)
"""Who makes this call, as gRPC has it."""

_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "event", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of ASCII JSON: no character of a field can end the line or forge another event."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON, without a line end."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", "message"),
        }
        if (message := record.getMessage()) != fields["event"]:
            fields["message"] = message
        for name, variable in (("request_id", request_id), ("peer", peer)):
            if (current := variable.get()) is not None:
                fields[name] = current
        fields |= {name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True, default=str)


class Lines(logging.Handler):
    """Formats on the caller's thread and writes on another one: who does not read what is written holds up nobody.

    An event above debug takes so many lines a second, and so many lines wait to be written; what is beyond that is
    dropped, counted in `dropped`, and told in the event's next line.

    Args:
        write: Writes some bytes, and returns how many it has; may take forever.
    """

    def __init__(self, write: Callable[[bytes], int]) -> None:
        super().__init__()
        self._write = write
        self._lines: queue.Queue[bytes] = queue.Queue(MOST_WAITING)
        self._second = 0
        self._taken: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()
        self.setFormatter(JsonFormatter())
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """As logging has it; never waits."""
        event = str(getattr(record, "event", record.name))
        if (second := int(record.created)) != self._second:
            self._second = second
            self._taken.clear()
        self._taken[event] += 1
        if self._taken[event] > MOST_PER_SECOND and record.levelno > logging.DEBUG:
            self._drop(event, "rate")
            return
        if untold := self._untold.pop(event, 0):
            record.dropped_before = untold
        try:
            self._lines.put_nowait(f"{self.format(record)}\n".encode("ascii"))
        except queue.Full:
            self._untold[event] += untold
            self._drop(event, "unread")

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, _LAST_LINES_S)

    def _drop(self, event: str, reason: str) -> None:
        self._untold[event] += 1
        dropped[reason] += 1

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            with suppress(OSError):  # nobody will ever read it
                while line:
                    line = line[self._write(line) :]
            self._lines.task_done()


def configure(level: str) -> None:
    """Send what is logged from this level on to stderr as JSON; replaces what was configured before.

    The level is this package's. Libraries log from info on at the least: grpc's debug messages are many per call.
    """
    root = logging.getLogger()
    root.handlers[:] = [Lines(partial(os.write, _STDERR))]
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]))
    logging.getLogger("beamline_server").setLevel(level.upper())
