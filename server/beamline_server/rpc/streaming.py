"""Output that grows and never changes: which part of it is certain, and the messages that tell it."""

import itertools
from collections.abc import Sequence

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.request import Hypothesis
from beamline_server.tokenizer import Tokenizer, whole_characters


class GrowingText:
    """Turns tokens that come bit by bit into text that comes bit by bit.

    The tokens are decoded from the first one each time, because pieces of a text do not decode to pieces of its text:
    leading spaces vanish, and a character may be spread over several tokens. What the tokenizer does not call settled
    is held back; so is text that does not continue what was told before.

    Args:
        tokenizer: Decodes the tokens.
        begun: The tokens that it begins with, whose text comes with that of the first further ones.
        context: Tokens that stand before them, whose text is not told.
    """

    def __init__(self, tokenizer: Tokenizer, begun: Sequence[int] = (), context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._begun = (*context, *begun)
        self._tokens = [*self._begun]
        self._context = tokenizer.decode(context) if context else ""
        # A character that it ends within comes with what follows.
        self._behind = self._told = whole_characters(self._context)

    def extend(self, tokens: Sequence[int]) -> str:
        """Take further tokens; returns the further text that is certain, which can be empty."""
        self._tokens.extend(tokens)
        return self._further(self._tokenizer.settled(self._tokens))

    def finish(self, tokens: Sequence[int]) -> str:
        """Take all further tokens there are; returns what has not been told of the text, whatever it ends with."""
        text = self._tokenizer.decode((*self._begun, *tokens))
        if self._told == self._behind and not text.startswith(self._told):
            self._told = _common(self._told, text)  # bytes have made something else of the context
        return self._further(text)

    def _further(self, text: str) -> str:
        if self._told == self._behind and text.startswith(self._context):
            self._told = self._context
        if not text.startswith(self._told):
            return ""
        further = text[len(self._told) :]
        self._told = text
        return further


def _common(one: str, other: str) -> str:
    """What both texts begin with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


class PieceWriter:
    """Writes the pieces of one stream.

    Together the pieces are the best hypothesis: its text, and its token ids if they are asked for.

    Args:
        tokenizer: None for a model whose results are token ids alone.
        target_prefix: The ids that the text begins with before any are generated.
        context: Those that stand before the text.
        token_ids: Whether the generated token ids are asked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        target_prefix: Sequence[int] = (),
        context: Sequence[int] = (),
        *,
        token_ids: bool,
    ) -> None:
        self._text = None if tokenizer is None else GrowingText(tokenizer, target_prefix, context)
        self._token_ids = token_ids
        self._tokens = 0

    def piece(self, tokens: Sequence[int]) -> pb.GenerateStreamResponse | None:
        """The message that tells further tokens; None if it would be empty."""
        self._tokens += len(tokens)
        return self._message("" if self._text is None else self._text.extend(tokens), tokens)

    def rest(self, best: Hypothesis) -> pb.GenerateStreamResponse | None:
        """The message that tells what pieces have not told of the best hypothesis; None if they have told it all."""
        text = "" if self._text is None else self._text.finish(best.tokens)
        return self._message(text, best.tokens[self._tokens :])

    def _message(self, text: str, tokens: Sequence[int]) -> pb.GenerateStreamResponse | None:
        told = tokens if self._token_ids else ()
        return pb.GenerateStreamResponse(piece=pb.Piece(text=text, token_ids=told)) if text or told else None
