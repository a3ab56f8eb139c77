"""Which sentences are sent: read whole, by length, and put together where a file has none as long."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.notation import NotationUnusable
from beamline_client.load.sentences import (
    Bucket,
    Sentence,
    SentencesUnusable,
    default_sentences,
    parse_lengths,
    pool,
    read_sentences,
)

fields = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\ufeff"), max_size=20).map(str.strip)
lines = st.builds(Sentence, fields.filter(bool), st.lists(fields.filter(bool), max_size=3).map(tuple))
a_few_words = st.integers(1, 12).map(lambda count: Sentence("x " * (count - 1) + "y", ("z",)))


def words(sentence: Sentence) -> int:
    return len(sentence.source.split())


@given(written=st.lists(lines, min_size=1, max_size=20), packed=st.booleans(), mark=st.booleans())
def test_sentences_are_read_as_they_were_written(
    written: list[Sentence], packed: bool, mark: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("sentences") / ("some.tsv.gz" if packed else "some.tsv")
    text = "\n\n".join("\t".join((sentence.source, *sentence.references)) for sentence in written)
    content = text.encode("utf-8-sig" if mark else "utf-8")
    path.write_bytes(gzip.compress(content) if packed else content)

    assert read_sentences(path) == written


def test_the_default_is_the_test_file_of_the_embedded_model() -> None:
    found = read_sentences(default_sentences())

    assert len(found) == 2037
    assert all(sentence.references for sentence in found)
    assert max(map(words, found)) < 30


def test_an_installation_without_sentences_asks_for_some(tmp_path: Path) -> None:
    wheel, tree = tmp_path / "wheel", tmp_path / "tree"

    with pytest.raises(SentencesUnusable, match="--sentences"):
        default_sentences((wheel, tree))
    tree.touch()
    assert default_sentences((wheel, tree)) == tree
    wheel.touch()
    assert default_sentences((wheel, tree)) == wheel


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty", b"", "no sentences"),
        ("blank", b"\n \n\t\n", "no sentences"),
        ("latin", b"caf\xe9\n", "not UTF-8"),
        ("first.tsv", b"one\teins\n\tzwei\n", "line 2 has no source"),
        ("text.gz", b"one\n", "no whole gzip file"),
        ("cut.gz", gzip.compress(b"one\n" * 1000, mtime=0)[:-9], "no whole gzip file"),
        ("garbled.gz", gzip.compress(bytes(range(32, 127)) * 99, mtime=0)[:20] + b"\xff" * 50, "no whole gzip file"),
    ],
)
def test_files_without_sentences_are_refused_in_one_line(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(SentencesUnusable, match=reason) as refused:
        read_sentences(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SentencesUnusable, match="No such file"):
        read_sentences(tmp_path / "missing")
    with pytest.raises(SentencesUnusable, match="Is a directory"):
        read_sentences(tmp_path)


def test_lengths_are_buckets_with_shares() -> None:
    mixed = parse_lengths("any:80%, 060-120:20%")

    assert mixed.values == (Bucket("any"), Bucket("60-120", 60, 120))
    assert mixed.shares == pytest.approx((0.8, 0.2))
    assert parse_lengths("5-5").values == (Bucket("5-5", 5, 5),)


@pytest.mark.parametrize(
    "text", ["", "long", "5", "5-", "-5", "0-5", "6-5", "1-1000000", "1-2,1-2", "any:1,5-6", "1-2:x"]
)
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(NotationUnusable) as refused:
        parse_lengths(text)
    assert "\n" not in str(refused.value)


@given(given_=st.lists(a_few_words, min_size=1, max_size=30), shortest=st.integers(1, 12), more=st.integers(0, 12))
def test_a_bucket_has_all_sentences_of_its_lengths(given_: list[Sentence], shortest: int, more: int) -> None:
    within = [sentence for sentence in given_ if shortest <= words(sentence) <= shortest + more]

    if within:
        assert pool(given_, Bucket("some", shortest, shortest + more)) == tuple(within)
    assert pool(given_, Bucket("any")) == tuple(given_)


@given(given_=st.lists(a_few_words, min_size=1, max_size=30), shortest=st.integers(13, 40), more=st.integers(0, 20))
def test_longer_ones_are_runs_of_neighbours_that_do_not_overlap(
    given_: list[Sentence], shortest: int, more: int
) -> None:
    bucket = Bucket("some", shortest, shortest + more)
    counts = [words(sentence) for sentence in given_]
    if not any_run_fits(counts, shortest, shortest + more):
        with pytest.raises(SentencesUnusable, match=f"of {min(counts)} to {max(counts)} words"):
            pool(given_, bucket)
        return
    found = pool(given_, bucket)
    assert found
    assert all(shortest <= words(sentence) <= shortest + more for sentence in found)
    everything = " ".join(sentence.source for sentence in given_)
    place = 0
    for sentence in found:
        place = everything.index(sentence.source, place) + len(sentence.source)
        assert len(sentence.references[0].split()) == sentence.source.count("y")  # one for each joined


def any_run_fits(counts: list[int], shortest: int, longest: int) -> bool:
    return any(
        shortest <= sum(counts[first:end]) <= longest
        for first in range(len(counts))
        for end in range(first + 1, len(counts) + 1)
    )


def test_a_run_has_a_reference_if_all_its_sentences_have_one() -> None:
    given_ = [Sentence("a b", ("A", "AA")), Sentence("c d", ("C",)), Sentence("e f"), Sentence("g h", ("G",))]

    assert pool(given_, Bucket("4-4", 4, 4)) == (Sentence("a b c d", ("A C",)), Sentence("e f g h"))


def test_sentences_that_are_too_long_are_no_help() -> None:
    with pytest.raises(SentencesUnusable, match=r"no sentences of 1-1 words.*there are 1, of 2 to 2 words"):
        pool([Sentence("a b")], Bucket("1-1", 1, 1))
