"""Reads text files line by line, compressed or not, and says in one line why one cannot be read."""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class TextUnreadable(Exception):
    """A file cannot be read as text; the text is one line that says why."""


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a UTF-8 file for reading, with or without a byte order mark; one whose name ends in .gz is unpacked.

    Line ends are as in Python's text files: those characters of Unicode that only look like line ends are text.

    Raises:
        TextUnreadable: The file, or what is left of it, cannot be read; also raised within the context.
    """
    try:
        with _opened(path) as file:
            yield file
    except UnicodeDecodeError as error:
        raise TextUnreadable(f"{path} is not UTF-8 text") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextUnreadable(f"{path} is no whole gzip file") from error
    except OSError as error:
        raise TextUnreadable(f"cannot read {path}: {error.strerror or error}") from error


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=None)
    return path.open(encoding="utf-8-sig", newline=None)
