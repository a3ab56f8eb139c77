"""Logs as JSON: one event per line on stderr, with the request's id where there is one and never its text.

    _log.info("serving", extra={"event": "serving", "model": name})

What is passed as `extra` becomes fields of the event.
"""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The `x-request-id` of the call that the current task handles; every event logged meanwhile carries it."""

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
        if (current := request_id.get()) is not None:
            fields["request_id"] = current
        fields |= {name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True, default=str)


def configure(level: str) -> None:
    """Send what is logged from this level on to stderr as JSON; replaces what was configured before.

    The level is this package's. Libraries log from info on at the least: grpc's debug messages are many per call.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]))
    logging.getLogger("beamline_server").setLevel(level.upper())
