"""Reads text files line by line, compressed or not, and says in one line why one cannot be read."""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from beamline.text_lines import NotText, read_lines


class TextUnreadable(Exception):
    """A file cannot be read as text; the text is one line that says why."""


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[Iterator[str]]:
    """Opens a file to read its lines, without their ends; see `text_lines`. One whose name ends in .gz is unpacked.

    Raises:
        TextUnreadable: The file, or what is left of it, cannot be read; also raised within the context.
    """
    try:
        with _opened(path) as file:
            yield (line.text() for line in read_lines(file))
    except NotText as error:
        raise TextUnreadable(f"{path}, {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextUnreadable(f"{path} is no whole gzip file") from error
    except OSError as error:
        raise TextUnreadable(f"cannot read {path}: {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
