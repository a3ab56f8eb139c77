"""What the online comparison asks: the test sentences, and a mix of them with long texts made of several.

A text is counted in the model's tokens, without end-of-sequence.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from beamline_client.load.sentences import Sentence, default_sentences, read_sentences
from beamline_server.bundle import load_bundle
from beamline_server.tokenizer import load_tokenizer

Count = Callable[[str], int]
"""Tokens of a text."""

SEED = 20
SINGLES_PER_LONG = 4  # 80 % to 20 %
LONG_TOKENS = (60, 120)


@dataclass(frozen=True, slots=True)
class Workload:
    """Sentences, and how `beamline load` is to draw from them.

    Attributes:
        name: For people.
        sentences: One is a line of its file.
        lengths: `--lengths`: in words, with shares.
        about: What it is, in words.
    """

    name: str
    sentences: Sequence[Sentence]
    lengths: str
    about: str

    def write(self, folder: Path) -> Path:
        """Write its file into a folder; returns it."""
        path = folder / f"{self.name}.tsv"
        path.write_text("".join("\t".join([s.source, *s.references]) + "\n" for s in self.sentences), "utf-8")
        return path


def workloads_for(bundle: Path) -> list[Workload]:
    """Both workloads, of the test sentences, counted in the tokens of a bundle's tokenizer."""
    tokenizer = load_tokenizer(load_bundle(bundle))
    assert tokenizer is not None
    encode = tokenizer.encode
    sentences = read_sentences(default_sentences())

    def count(text: str) -> int:
        return len(encode(text)) - 1  # end-of-sequence

    return [single_sentences(sentences, count), mixed(sentences, count)]


def single_sentences(sentences: Sequence[Sentence], count: Count) -> Workload:
    """The sentences as they are, each as likely."""
    tokens = [count(sentence.source) for sentence in sentences]
    about = f"{len(tokens):,} sentences of {mean(tokens):.1f} tokens on average, at most {max(tokens)}"
    return Workload("test", sentences, "any", about)


def mixed(sentences: Sequence[Sentence], count: Count, seed: int = SEED) -> Workload:
    """80 % the sentences as they are, 20 % several of them joined to 60-120 tokens.

    Raises:
        ValueError: single ones are as long as joined ones, so that they cannot be told apart by their words.
    """
    wanted = len(sentences) // SINGLES_PER_LONG
    stream = joined(sentences, count, random.Random(seed))
    long = [next(stream) for _ in range(wanted)]
    short_words, long_words = [_words(sentence) for sentence in sentences], [_words(sentence) for sentence in long]
    if max(short_words) >= min(long_words):
        raise ValueError(f"a sentence has {max(short_words)} words, a joined one only {min(long_words)}")
    tokens = [count(sentence.source) for sentence in long]
    return Workload(
        "mixed",
        [*sentences, *long],
        f"1-{max(short_words)}:80%,{min(long_words)}-{max(long_words)}:20%",
        f"80 % of them, 20 % joined to {min(tokens)}-{max(tokens)} tokens, {mean(tokens):.0f} on average",
    )


def joined(sentences: Sequence[Sentence], count: Count, rng: random.Random) -> Iterator[Sentence]:
    """Texts of several sentences each, without end; every length within `LONG_TOKENS` is aimed at as often.

    Each takes the next of the sentences in random order until it is as long as it is to be; if the last one makes it
    longer than any may be, it is given up.
    """
    least, most = LONG_TOKENS
    order: list[Sentence] = []
    while True:
        aim, run = rng.randint(least, most), list[Sentence]()
        while not run or count(_text(run)) < aim:
            if not order:
                order = rng.sample(sentences, len(sentences))
            run.append(order.pop())
        if len(run) > 1 and count(_text(run)) <= most:
            yield Sentence(_text(run), _references(run))


def _text(run: Sequence[Sentence]) -> str:
    return " ".join(sentence.source for sentence in run)


def _references(run: Sequence[Sentence]) -> tuple[str, ...]:
    complete = all(sentence.references for sentence in run)
    return (" ".join(sentence.references[0] for sentence in run),) if complete else ()


def _words(sentence: Sentence) -> int:
    return len(sentence.source.split())
