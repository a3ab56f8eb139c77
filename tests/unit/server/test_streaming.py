"""Streamed text: only ever grows, and ends as the whole."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beamline_server.engine.request import Finish, Hypothesis
from beamline_server.languages import NOTHING_AROUND, Around
from beamline_server.rpc.streaming import GrowingText, PieceWriter
from beamline_server.tokenizer import CleanedUp
from doubles.service import EOS, ByteTokenizer

BYTES = st.lists(st.integers(0, 255), max_size=30)
TEXTS = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé€😀\N{REPLACEMENT CHARACTER} ")))


class SpaceEater:
    """Decodes words as SentencePiece does: each token brings the space before it, and the first one loses it."""

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        return [len(word) for word in text.split()]

    def encode_target(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(" " + "x" * token for token in ids).lstrip()

    def settled(self, ids: Sequence[int]) -> str:
        return self.decode(ids)


class Fickle(ByteTokenizer):
    """Rewrites what it has said once the text ends with an exclamation mark."""

    def decode(self, ids: Sequence[int]) -> str:
        text = super().decode(ids)
        return text.upper() if text.endswith("!") else text


def pieces_of(tokens: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    return [list(tokens[start:end]) for start, end in pairwise(bounds)]


@given(tokens=BYTES, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_any_bytes_in_any_pieces_add_up_to_the_whole(tokens: list[int], cuts: list[int]) -> None:
    tokenizer = ByteTokenizer()
    prefix, told = GrowingText(tokenizer), ""
    for piece in pieces_of(tokens, cuts):
        told += prefix.extend(piece)
        assert tokenizer.decode(tokens).startswith(told)
    assert told + prefix.finish(tokens) == tokenizer.decode(tokens)


@given(text=st.text(alphabet=" .,'ntvresma", max_size=30))
@example(text="a  ' ve a a")  # clean, it has another one to replace
def test_text_that_is_cleaned_up_is_told_once_it_is_settled(text: str) -> None:
    """Spaces that punctuation takes away are not told before it is known what follows."""
    tokenizer = CleanedUp(ByteTokenizer())
    prefix, told = GrowingText(tokenizer), ""
    for token in text.encode():
        told += prefix.extend([token])
    assert told + prefix.finish(list(text.encode())) == tokenizer.decode(list(text.encode()))


@given(text=TEXTS)
def test_byte_by_byte_nothing_but_whole_characters_is_told(text: str) -> None:
    prefix, told = GrowingText(ByteTokenizer()), []
    for token in text.encode():
        told.append(prefix.extend([token]))
    assert "".join(told) == text.rstrip("\N{REPLACEMENT CHARACTER}")
    assert "".join(told) + prefix.finish(list(text.encode())) == text


def test_a_character_of_several_tokens_waits_until_it_is_complete() -> None:
    prefix = GrowingText(ByteTokenizer())
    assert [prefix.extend([token]) for token in "a€b".encode()] == ["a", "", "", "€", "b"]


def test_pieces_keep_the_spaces_between_them() -> None:
    prefix = GrowingText(SpaceEater())
    assert [prefix.extend([1]), prefix.extend([2, 3])] == ["x", " xx xxx"]


def test_text_that_does_not_continue_what_was_told_is_held_back() -> None:
    prefix = GrowingText(Fickle())
    assert prefix.extend(b"hey") == "hey"
    assert prefix.extend(b"!") == ""
    assert prefix.extend(b"?") == "!?"


def hypothesis_of(text: str) -> Hypothesis:
    return hypothesis_of_bytes(text.encode())


def hypothesis_of_bytes(content: bytes) -> Hypothesis:
    tokens = (*content, EOS)
    return Hypothesis(tokens, -1.0, (-0.1,) * len(tokens), Finish.END_OF_SEQUENCE)


@pytest.mark.parametrize("token_ids", [True, False])
def test_pieces_together_are_the_best_hypothesis(token_ids: bool) -> None:
    best = hypothesis_of("né en été")
    writer = PieceWriter(ByteTokenizer(), token_ids=token_ids)
    cuts = pieces_of(best.tokens[:7], [2, 5])
    messages = [*(writer.piece(piece) for piece in cuts), writer.rest(best)]
    told = [message.piece for message in messages if message is not None]
    assert "".join(piece.text for piece in told) == "né en été"
    assert [token for piece in told for token in piece.token_ids] == (list(best.tokens) if token_ids else [])


def test_there_are_no_empty_pieces() -> None:
    writer = PieceWriter(ByteTokenizer(), token_ids=False)
    assert writer.piece("é".encode()[:1]) is None
    assert writer.piece("é".encode()[1:]) is not None
    assert writer.rest(hypothesis_of("é")) is None


def test_without_a_tokenizer_pieces_are_token_ids() -> None:
    writer = PieceWriter(None, token_ids=True)
    message = writer.piece([5, 6])
    assert message is not None
    assert (message.piece.text, list(message.piece.token_ids)) == ("", [5, 6])


class TestTargetPrefix:
    """The given beginning of a target: its text is told with that of the first pieces, its ids are not."""

    def test_its_text_comes_with_the_first_piece(self) -> None:
        writer = PieceWriter(ByteTokenizer(), b"n\xc3", token_ids=True)
        first, second, rest = writer.piece(b"\xa9"), writer.piece(b" i"), writer.rest(hypothesis_of_bytes(b"\xa9 ici"))
        assert first is not None
        assert second is not None
        assert rest is not None
        assert [first.piece.text, second.piece.text, rest.piece.text] == ["né", " i", "ci"]
        assert [*first.piece.token_ids, *second.piece.token_ids, *rest.piece.token_ids] == [*b"\xa9 ici", EOS]

    def test_a_result_at_once_is_one_piece_with_it(self) -> None:
        rest = PieceWriter(ByteTokenizer(), b"Hel", token_ids=False).rest(hypothesis_of_bytes(b"lo"))
        assert rest is not None
        assert rest.piece.text == "Hello"

    def test_the_space_at_its_border_is_told_once(self) -> None:
        writer = PieceWriter(SpaceEater(), [2], token_ids=False)
        pieces = [writer.piece([1]), writer.piece([3])]
        assert [piece.piece.text for piece in pieces if piece is not None] == ["xx x", " xxx"]

    @given(prefix=BYTES, tokens=BYTES, cuts=st.lists(st.integers(0, 30), max_size=8))
    def test_any_bytes_in_any_pieces_add_up_to_the_whole(
        self, prefix: list[int], tokens: list[int], cuts: list[int]
    ) -> None:
        tokenizer = CleanedUp(ByteTokenizer())
        text, told = GrowingText(tokenizer, prefix), ""
        for piece in pieces_of(tokens, cuts):
            told += text.extend(piece)
        assert told + text.finish(tokens) == tokenizer.decode([*prefix, *tokens])

    def test_without_a_tokenizer_nothing_is_told_of_it(self) -> None:
        message = PieceWriter(None, [1, 2], token_ids=True).piece([5])
        assert message is not None
        assert (message.piece.text, list(message.piece.token_ids)) == ("", [5])
