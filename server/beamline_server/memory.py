"""The most memory that a server comes to, part by part, and whether there is as much."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from beamline_server.settings import SettingsError

_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells how much memory a container may take: version 2, version 1."""
_NO_LIMIT = 1 << 60
_MB = 1_000_000
_log = logging.getLogger(__name__)


def require_memory(parts: Mapping[str, int], limit: int | None) -> int:
    """The bytes of all parts together, which are logged.

    Args:
        parts: The most bytes of each part, by its name.
        limit: Bytes that the operator grants; None takes a container's limit, and only warns.

    Raises:
        SettingsError: they are more than the operator grants.
    """
    total = sum(parts.values())
    told = {"event": "memory_bound", "bytes": total, "parts": dict(parts)}
    granted = container_limit() if limit is None else limit
    if granted is None or total <= granted:
        _log.info("memory_bound", extra=told)
        return total
    problem = f"at its most the server takes {total // _MB} MB, of which there are {granted // _MB}: {_in_words(parts)}"
    advice = "grant more, or lower max_rows, kv_slots, max_message_bytes, max_queue_rows or max_connections"
    if limit is not None:
        raise SettingsError([f"memory_limit: {problem}; {advice}"])
    _log.warning("%s; %s", problem, advice, extra=told | {"limit": granted})
    return total


def container_limit(files: Iterable[Path] = _CGROUPS) -> int | None:
    """Bytes that the container of this process may take; None if it has no limit."""
    for file in files:
        try:
            text = file.read_text("ascii").strip()
        except OSError:
            continue
        limit = int(text) if text.isdecimal() else _NO_LIMIT
        return limit if limit < _NO_LIMIT else None
    return None


def _in_words(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size // _MB} MB" for name, size in parts.items())
