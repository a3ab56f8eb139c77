"""Pieces of words as subword-nmt makes them."""

import random
from itertools import pairwise

import pytest

from beamline_server.subwords import Merges
from beamline_server.word_pieces import ContinuedPieces, EndMarkedPieces, read_codes
from doubles.byte_pairs import merged


def pieces(codes: str, separator: str = "@@") -> ContinuedPieces:
    return ContinuedPieces(read_codes(codes.encode()), separator)


@pytest.mark.parametrize(
    ("codes", "word", "expected"),
    [
        ("#version: 0.2\nl o\nlo w\ne r</w>\n", "lower", ["low@@", "er"]),
        ("#version: 0.2\nl o\nlo w\nlow e\n", "low", ["lo@@", "w"]),
        ("#version: 0.2\nl o\nlo w</w>\n", "low", ["low"]),
        ("#version: 0.2\r\nl o\r\nlo w</w>\r\n\n\n", "low", ["low"]),
        # Without a version, or with the first, the end of a word is a symbol of its own.
        ("l o\nlo w\nlow </w>\n", "low", ["low"]),
        ("l o\nw </w>\n", "low", ["lo@@", "w"]),
        ("#version: 0.1\nl o\nlo w\n", "low", ["low"]),
        ("l o\nlo w</w>\n", "low", ["lo@@", "w"]),
        # The first place of a pair counts.
        ("#version: 0.2\na b\nb c</w>\na b\n", "abc", ["ab@@", "c"]),
        ("#version: 0.2\nb c</w>\na b\nb c</w>\n", "abc", ["a@@", "bc"]),
        ("#version: 0.2\na </w>\n", "a", ["a"]),
        ("#version: 0.2\n", "ab", ["a@@", "b"]),
    ],
)
def test_a_word_is_split_by_the_codes(codes: str, word: str, expected: list[str]) -> None:
    assert pieces(codes).split(word) == expected
    assert pieces(codes).join(expected) == f"{word} "


@pytest.mark.parametrize("version", ["0.1", "0.2"])
def test_pieces_are_those_of_the_algorithm(version: str) -> None:
    """As subword-nmt's documentation tells it: the first pair of the list that is there, everywhere, and again."""
    rng = random.Random(3)
    for _ in range(400):
        symbols = [letter + end for letter in "abc" for end in ("", "</w>")] + ["</w>"]
        codes: list[tuple[str, str]] = []
        for _ in range(rng.randint(0, 12)):
            codes.append((rng.choice([s for s in symbols if not s.endswith("</w>")]), rng.choice(symbols)))
            symbols.append("".join(codes[-1]))
        codes += rng.choices(codes, k=3) if codes else []
        rng.shuffle(codes)
        word = "".join(rng.choice("abc") for _ in range(rng.randint(2, 12)))
        told = f"#version: {version}\n" + "".join(f"{a} {b}\n" for a, b in codes)
        assert pieces(told, "~").split(word) == slowly(word, codes, version), (word, codes)


def slowly(word: str, codes: list[tuple[str, str]], version: str) -> list[str]:
    symbols = (*word, "</w>") if version == "0.1" else (*word[:-1], f"{word[-1]}</w>")
    while found := [pair for pair in pairwise(symbols) if pair in codes]:
        symbols = merged(symbols, min(found, key=codes.index))
    whole = [symbol.removesuffix("</w>") for symbol in symbols if symbol != "</w>"]
    return [*(f"{symbol}~" for symbol in whole[:-1]), whole[-1]]


@pytest.mark.parametrize(
    ("codes", "problem"),
    [
        ("#version: 0.3\n", "its version is 0.3; expected 0.1 or 0.2"),
        ("#version: 0.2\na b\nc\n", "merge 2 is no pair of symbols: 'c'"),
        ("a b 17\n", "merge 1 is no pair of symbols: 'a b 17'"),
    ],
)
def test_a_file_that_holds_no_codes(codes: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_codes(codes.encode())


def test_a_space_at_the_end_tells_a_whole_word() -> None:
    continued, marked = pieces("#version: 0.2\n"), EndMarkedPieces(Merges([]))
    assert continued.join(["a@@", "b", "c@@"]) == "ab c"
    assert continued.join(["a@@", "@@", "c"]) == "ac "
    assert marked.join(["a", "b</w>", "c"]) == "ab c"
    assert marked.join(["a", "b</w>"]) == "ab "
    assert (continued.join([]), marked.join([])) == ("", "")
