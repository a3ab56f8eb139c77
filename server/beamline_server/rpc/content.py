"""What inputs and target prefixes hold, text or token ids, as ids of their side of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from beamline.v1 import generation_pb2 as pb
from beamline_server.languages import NOTHING_AROUND, Around
from beamline_server.word_tokenizer import UnreadableText


@dataclass(frozen=True, slots=True)
class Content:
    """The ids of one content.

    Attributes:
        field: Its path in the request.
        tokens: The ids, as far as they could be read.
        problem: Why it is not valid, in words; None if it is.
    """

    field: str
    tokens: tuple[int, ...]
    problem: str | None = None


class ContentReader:
    """Reads what messages hold for one side of the model, source or target.

    Args:
        vocabulary: Number of ids of that side.
        max_text_bytes: Most bytes of UTF-8 in one text.
        encode: Gives the ids of a text, with those around it; None for a model that takes token ids alone.
        when_empty: What is read instead of nothing at all; None refuses that.
    """

    def __init__(
        self,
        vocabulary: int,
        max_text_bytes: int,
        encode: Callable[[str, Around], list[int]] | None,
        when_empty: int | None = None,
    ) -> None:
        self._when_empty = () if when_empty is None else (when_empty,)
        self._vocabulary = vocabulary
        self._max_text_bytes = max_text_bytes
        self._encode = encode

    def read(self, path: str, message: pb.Input | pb.TargetPrefix, around: Around = NOTHING_AROUND) -> Content:
        """The content of a message that has this path; `around` stands around a text."""
        content = message.WhichOneof("content")
        if content == "text":
            return self._text(f"{path}.text", message.text, around)
        if content == "token_ids":
            return self._ids(f"{path}.token_ids", message.token_ids.ids)
        return Content(path, (), "is missing; expected text or token_ids")

    def _text(self, field: str, text: str, around: Around) -> Content:
        limit = self._max_text_bytes
        if self._encode is None:
            return Content(field, (), "cannot be read: this model has no tokenizer; expected token_ids")
        if not text and not self._when_empty:
            return Content(field, (), "is empty")
        # No character has more than four bytes: most texts need no encoding to be measured.
        if 4 * len(text) > limit and (size := len(text.encode())) > limit:
            return Content(field, (), f"has {size} bytes; expected at most {limit}")
        try:
            tokens = tuple(self._encode(text, around)) or self._when_empty
        except UnreadableText as error:
            return Content(field, (), str(error))
        return Content(field, tokens, None if tokens else "has no tokens")

    def _ids(self, field: str, ids: Sequence[int]) -> Content:
        tokens, vocabulary = tuple(ids) or self._when_empty, self._vocabulary
        if not tokens:
            return Content(field, (), "is empty")
        if min(tokens) >= 0 and max(tokens) < vocabulary:
            return Content(field, tokens)
        index = next(index for index, token in enumerate(tokens) if not 0 <= token < vocabulary)
        return Content(field, (), f"has the id {tokens[index]} at index {index}; expected 0 to {vocabulary - 1}")
