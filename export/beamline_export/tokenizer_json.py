"""Loads a tokenizer.json, whatever is in it, and finds what it puts around a text."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beamline_export.spec import ExportError
from beamline_server.tokenizer import read_json_tokenizer, unreadable

_PROBE = "a"
_MOST_OF_A_LETTER = 1000
_STDERR = 2
_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """A tokenizer.json, read, and where it is from.

    Attributes:
        tokenizer: What the library made of it.
        files: Name in the bundle -> name in the checkpoint folder; empty for one that was made.
        contents: Name in the bundle -> content of one that was made.
        notices: What the user should know of how it was made.
    """

    tokenizer: Any
    files: Mapping[str, str] = field(default_factory=lambda: {_FILE: _FILE})
    contents: Mapping[str, bytes] = field(default_factory=dict)
    notices: Sequence[str] = ()


def find_tokenizer_json(folder: Path) -> TokenizerJson | None:
    """The tokenizer.json of a folder, if it has one.

    Raises:
        ExportError: it cannot be read.
    """
    file = folder / _FILE
    return TokenizerJson(load_json_tokenizer(file)) if file.exists() else None


def made_tokenizer_json(source: Path, content: bytes, notices: Sequence[str]) -> TokenizerJson:
    """A tokenizer.json of this content, which was made of the file `source`.

    Raises:
        ExportError: it cannot be read.
    """
    return TokenizerJson(load_json_tokenizer(source, content), {}, {_FILE: content}, notices)


def load_json_tokenizer(file: Path, content: bytes | None = None) -> Any:
    """A tokenizer.json that can read a letter; `content`, if given, stands for the file's.

    Raises:
        ExportError: it is missing, or none.
    """
    try:
        with _panics_as_errors():
            tokenizer = read_json_tokenizer(file.read_bytes() if content is None else content)
            _read_a_letter(tokenizer)
            return tokenizer
    except Exception as error:  # the library raises its own kinds; all mean the same to the user
        raise unreadable_tokenizer(file, error) from error


def _read_a_letter(tokenizer: Any) -> None:
    """Raise some error where it cannot, or where the letter becomes a book."""
    made = 0 if tokenizer.normalizer is None else len(tokenizer.normalizer.normalize_str(_PROBE))
    if made <= _MOST_OF_A_LETTER:
        made = len(tokenizer.encode(_PROBE).ids)
    if made > _MOST_OF_A_LETTER:
        raise ValueError(f"it makes {made:,} characters or tokens of one letter")


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """The library panics at some files: that is no `Exception`, and it writes to the process's own stderr."""
    with _silent_stderr():
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(str(error)) from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    with open(os.devnull, "wb") as nowhere:
        stderr = os.dup(_STDERR)
        os.dup2(nowhere.fileno(), _STDERR)
    try:
        yield
    finally:
        os.dup2(stderr, _STDERR)
        os.close(stderr)


def unreadable_tokenizer(file: Path, error: Exception) -> ExportError:
    """That a file is no tokenizer's, and why."""
    return ExportError(f"{file} cannot be read as a tokenizer ({unreadable(error)}); download it again")


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the post-processor of a tokenizer.json puts before and after a text."""
    encoding = tokenizer.encode(_PROBE)
    added = [bool(mask) for mask in encoding.special_tokens_mask]
    first = added.index(False) if False in added else 1
    last = len(added) - added[::-1].index(False) if False in added else 1
    return encoding.ids[:first], encoding.ids[last:]
