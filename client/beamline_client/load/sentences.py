"""Which sentences to send: from a file, by their length."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beamline_client.load.notation import Mix, NotationUnusable, parse_mix
from beamline_client.load.textfiles import TextUnreadable, open_text

_IN_WHEEL = Path(__file__).with_name("sentences.tsv.gz")
_IN_SOURCE_TREE = Path(__file__).parents[3] / "models" / "fr-en" / "test.tsv.gz"
_LONGEST = 100_000  # words


class SentencesUnusable(ValueError):
    """There are no sentences to send; the text is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """What can be sent, and the right answers to it."""

    source: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bucket:
    """A range of lengths, in words between white space, ends included."""

    name: str
    """As the user wrote it."""
    shortest: int = 1
    longest: int | None = None
    """None is not limited."""


def default_sentences(places: Sequence[Path] = (_IN_WHEEL, _IN_SOURCE_TREE)) -> Path:
    """The embedded model's test file: the first of the places where there is one.

    Raises:
        SentencesUnusable: This installation comes without it.
    """
    for path in places:
        if path.is_file():
            return path
    raise SentencesUnusable("this installation comes without sentences: name a file of your own with --sentences")


def read_sentences(path: Path) -> list[Sentence]:
    """Reads a file with a source per line, and its references, if any, after tabs; see `open_text`. Skips empty lines.

    Raises:
        SentencesUnusable: The file cannot be read, has no sentences, or a line begins with a tab.
    """
    sentences = []
    try:
        with open_text(path) as lines:
            for line, text in enumerate(lines, start=1):
                source, *references = (field.strip() for field in text.split("\t"))
                if source:
                    sentences.append(Sentence(source, tuple(filter(None, references))))
                elif any(references):
                    raise SentencesUnusable(f"{path}, line {line} has no source: write it before the first tab")
    except TextUnreadable as error:
        raise SentencesUnusable(f"no sentences: {error}") from error
    if not sentences:
        raise SentencesUnusable(f"{path} has no sentences: write one per line")
    return sentences


def parse_lengths(text: str) -> Mix[Bucket]:
    """Reads length buckets with their weights: "any", "5-20", "any:80%,60-120:20%".

    Raises:
        NotationUnusable: It is none.
    """
    return parse_mix(text, _bucket)


def pool(sentences: Sequence[Sentence], bucket: Bucket) -> tuple[Sentence, ...]:
    """The sentences of a bucket, in their order; if there are none, runs of consecutive sentences that add up to it.

    A run takes as many sentences as it needs to be long enough, and runs do not overlap. It has a reference, the first
    ones joined, if all of its sentences have one.

    Raises:
        SentencesUnusable: There are none, and none can be put together.
    """
    longest = _LONGEST if bucket.longest is None else bucket.longest
    words = np.array([len(sentence.source.split()) for sentence in sentences])
    within = tuple(
        sentence
        for sentence, count in zip(sentences, words.tolist(), strict=True)
        if bucket.shortest <= count and (bucket.longest is None or count <= bucket.longest)
    )
    if within:
        return within
    before = np.append(0, np.cumsum(words))  # words before each sentence, and in all
    ends = np.searchsorted(before, before[:-1] + bucket.shortest)
    found, start = [], 0
    for first, end in enumerate(ends.tolist()):
        if first >= start and end < len(before) and before[end] - before[first] <= longest:
            found.append(_joined(sentences[first:end]))
            start = end
    if not found:
        raise SentencesUnusable(
            f"no sentences of {bucket.name} words, and none to put together: there are {len(sentences):,}, "
            f"of {words.min()} to {words.max()} words; choose other lengths or another file"
        )
    return tuple(found)


def _joined(run: Sequence[Sentence]) -> Sentence:
    complete = all(sentence.references for sentence in run)
    references = (" ".join(sentence.references[0] for sentence in run),) if complete else ()
    return Sentence(" ".join(sentence.source for sentence in run), references)


def _bucket(text: str) -> Bucket:
    name = text.strip()
    if name == "any":
        return Bucket(name)
    match = re.fullmatch(r"(\d{1,6})-(\d{1,6})", name)
    if match is None:
        raise NotationUnusable(f"{name!r} is no range of lengths: write any, or one in words such as 5-20")
    shortest, longest = int(match[1]), int(match[2])
    if not 1 <= shortest <= longest <= _LONGEST:
        raise NotationUnusable(f"{name!r} is no range of lengths: from 1 to {_LONGEST:,} words, the shorter first")
    return Bucket(f"{shortest}-{longest}", shortest, longest)
