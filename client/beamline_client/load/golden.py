"""Recorded answers: a file of JSON lines that says what a server must answer, and what to compare with it."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from beamline_client.load.target import Question
from beamline_client.load.textfiles import TextUnreadable, open_text

Texts: TypeAlias = tuple[str, ...]
"""The hypotheses of an answer, best first."""

_OPTIONS = ("beam_size", "n_best", "max_new_tokens")
_FIELDS = frozenset({"source", "texts", *_OPTIONS})


class GoldenUnusable(ValueError):
    """Recorded answers cannot be read or written; the text is one line that says why."""


@dataclass(frozen=True, slots=True)
class GoldenKey:
    """What decides the right answer. Whether it is streamed does not: the end of a stream is the same answer."""

    source: str
    beam_size: int | None = None
    """None, here and below, is the server's default."""
    n_best: int | None = None
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, question: Question) -> "GoldenKey":
        """The key of a question."""
        search = question.search
        return cls(question.source, search.beam_size, search.n_best, search.max_new_tokens)


@dataclass(frozen=True, slots=True)
class GoldenFile:
    """Recorded answers."""

    path: Path
    answers: Mapping[GoldenKey, Texts]


def read_golden(path: Path) -> GoldenFile:
    """Reads recorded answers, one JSON object per line: source, beam_size, n_best, max_new_tokens, texts.

    The numbers may be null or left out: the server's defaults. For the encoding, see `open_text`.

    Raises:
        GoldenUnusable: The file cannot be read, has no answers, or a line is none or contradicts another.
    """
    answers: dict[GoldenKey, Texts] = {}
    try:
        with open_text(path) as lines:
            for line, text in enumerate(lines, start=1):
                if not text.strip():
                    continue
                key, texts = _entry(text, f"{path}, line {line}")
                if answers.setdefault(key, texts) != texts:
                    raise GoldenUnusable(f"{path}, line {line} contradicts a line before: the same question twice")
    except TextUnreadable as error:
        raise GoldenUnusable(f"no recorded answers: {error}") from error
    if not answers:
        raise GoldenUnusable(f"{path} has no recorded answers: record some in a run against a server that is right")
    return GoldenFile(path, answers)


def write_golden(path: Path, answers: Mapping[GoldenKey, Texts]) -> None:
    """Writes answers in an order of their own, so that equal answers make equal files; .gz packs them.

    Raises:
        GoldenUnusable: There are none, or the file cannot be written.
    """
    if not answers:
        raise GoldenUnusable(f"nothing was answered, so {path} was not written")
    lines = sorted(
        json.dumps({**_fields(key), "texts": texts}, ensure_ascii=False) + "\n" for key, texts in answers.items()
    )
    content = "".join(lines).encode()
    try:
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    except OSError as error:
        raise GoldenUnusable(f"cannot write {path}: {error.strerror or error}") from error


def _fields(key: GoldenKey) -> dict[str, Any]:
    return dict(zip(("source", *_OPTIONS), astuple(key), strict=True))


def _entry(text: str, where: str) -> tuple[GoldenKey, Texts]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GoldenUnusable(f"{where} is no JSON object") from error
    if not isinstance(entry, dict) or not entry.keys() <= _FIELDS:
        raise GoldenUnusable(f"{where} is no object with the fields source, {', '.join(_OPTIONS)} and texts alone")
    source, texts = entry.get("source"), entry.get("texts")
    if not isinstance(source, str) or not source:
        raise GoldenUnusable(f"{where} has no source: a text that is not empty")
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        raise GoldenUnusable(f"{where} has no texts: a list of one or more")
    numbers = [entry.get(name) for name in _OPTIONS]
    for name, value in zip(_OPTIONS, numbers, strict=True):
        if value is not None and (type(value) is not int or value < 1):
            raise GoldenUnusable(f"{where} has a {name} that is neither null nor a whole number above 0")
    return GoldenKey(source, *numbers), tuple(texts)
