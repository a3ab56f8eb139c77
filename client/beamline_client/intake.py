"""What a server takes of a text, by the limits that it tells: what is cut, what is refused, how much goes at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from beamline_client.bulk import Line, batched
from beamline_client.results import Limits, Result, SearchOptions

_REQUEST_BYTES = 512
"""Room in a message for everything but the texts."""
_TEXT_BYTES = 16
"""Room in a message around each text."""


def search_cost(search: SearchOptions | None, default: SearchOptions) -> int:
    """What a text counts for `Limits.max_request_cost` with these options; 0 if the server tells no defaults."""
    wanted = search or default
    beams, tokens = wanted.beam_size or default.beam_size, wanted.max_new_tokens or default.max_new_tokens
    return (beams or 0) * (tokens or 0)


@dataclass(frozen=True, slots=True)
class Intake:
    """The limits of one server, applied to texts.

    Attributes:
        limits: As the server tells them.
        truncate: Whether a text that is too long is cut; otherwise it has a problem.
        beside_bytes: Room in a message for what is sent with each text.
        text_cost: What each text counts for `Limits.max_request_cost`.
    """

    limits: Limits
    truncate: bool
    beside_bytes: int = 0
    text_cost: int = 0

    @property
    def longest_text(self) -> int:
        """Most bytes of UTF-8 in one text; none where what is sent with it fills a message."""
        return max(0, min(self.limits.max_text_bytes, self._room - self._around))

    @property
    def _room(self) -> int:
        """Most bytes of texts, and of what is around them, in one message."""
        return self.limits.max_message_bytes - _REQUEST_BYTES

    @property
    def _around(self) -> int:
        return _TEXT_BYTES + self.beside_bytes

    def checked(self, lines: Iterable[Line]) -> Iterator[Line]:
        """The lines, those with a problem that would not fit into a message."""
        return (line if line.problem is not None else replace(line, problem=self._problem(line.text)) for line in lines)

    def batches(self, lines: Iterable[Line], most: int) -> Iterator[list[Line]]:
        """The lines in requests of `most` lines, or fewer where the server takes fewer lines, bytes or work at once."""
        at_once = min(most, self.limits.max_inputs)
        if self.limits.max_request_cost and self.text_cost:
            at_once = max(1, min(at_once, self.limits.max_request_cost // self.text_cost))
        checked = self.checked(lines)
        return batched(checked, lines_at_once=at_once, bytes_at_once=self._room, bytes_around=self._around)

    def cut(self, text: str) -> str:
        """The text, or of a longer one as many whole characters as fit."""
        if 4 * len(text) <= self.longest_text:  # no character has more than four bytes
            return text
        return text.encode()[: self.longest_text].decode(errors="ignore")

    def marked(self, text: str, result: Result) -> Result:
        """The result for a text, marked as one of a truncated source also if it was cut before it was sent."""
        return replace(result, source_truncated=result.source_truncated or self.cut(text) != text)

    def _problem(self, text: str) -> str | None:
        size = len(text.encode())
        if size <= self.longest_text or self.truncate:
            return None
        return f"has {size} bytes; expected at most {self.longest_text}, or truncate_source"
