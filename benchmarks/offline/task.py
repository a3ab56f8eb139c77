"""What a contender is asked to compute. The standard library alone: peers live in environments of their own."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

Setting = Mapping[str, Any]
"""How a contender runs: threads, batch sizes, …; which fields there are is the contender's business."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Search:
    """A beam search that ends when as many hypotheses are finished as there are beams."""

    beam: int = 4
    min_new_tokens: int = 0
    max_new_tokens: int = 128

    @classmethod
    def forced(cls, tokens: int, *, beam: int = 4) -> Self:
        """A search that generates exactly so many tokens."""
        return cls(beam, tokens, tokens)


@dataclass(frozen=True, slots=True)
class Task:
    """Sentences to translate.

    Attributes:
        sentences: File that `write_sentences` has written.
        count: How many of it, from the first on.
        batch: Sentences to hand over at a time, the next ones when these are done; None hands over all at once.
        search: How to search.
    """

    sentences: str
    count: int
    batch: int | None
    search: Search

    def as_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` has written."""
        return cls(data["sentences"], data["count"], data["batch"], Search(**data["search"]))


@dataclass(frozen=True, slots=True)
class Sentence:
    """A source in each of the forms that contenders take; ids and pieces end with end of sequence.

    Attributes:
        ids: Token ids.
        pieces: The same tokens by name.
        text: What they were made of; None for random tokens.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    text: str | None


def write_sentences(path: Path, sentences: Sequence[Sentence]) -> None:
    """Write them for `read_sentences`."""
    path.write_text(json.dumps([asdict(sentence) for sentence in sentences], ensure_ascii=False), "utf-8")


def read_sentences(path: Path) -> list[Sentence]:
    """What `write_sentences` has written."""
    rows = json.loads(path.read_text("utf-8"))
    return [Sentence(tuple(row["ids"]), tuple(row["pieces"]), row["text"]) for row in rows]


def batches(items: Sequence[T], size: int | None) -> Iterator[Sequence[T]]:
    """Slices of so many items, the last one perhaps shorter; None: one slice."""
    size = size or max(1, len(items))
    for first in range(0, len(items), size):
        yield items[first : first + size]


def longest_first(sentences: Sequence[Sentence]) -> list[int]:
    """Their numbers in descending order of length; equally long ones stay in order."""
    return sorted(range(len(sentences)), key=lambda i: -len(sentences[i].ids))
