r"""What a line of a text file is, the same for everything that reads one.

A line ends with `\n` or `\r\n` and with nothing else: a lone `\r`, and the other characters at which `str.splitlines`
would split, are text. A byte order mark at the start of the file is dropped. Text is UTF-8.
"""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


class NotText(ValueError):
    """A line is not UTF-8; the text says which, why, and what to do.

    Attributes:
        problem: The same without the line's number.
    """

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"line {number} {problem}")
        self.problem = problem


@dataclass(frozen=True, slots=True)
class TextLine:
    """One line as it stands in its file.

    Attributes:
        number: From 1.
        content: Its bytes, without its end.
    """

    number: int
    content: bytes

    def text(self) -> str:
        """Its characters.

        Raises:
            NotText: It is not UTF-8.
        """
        try:
            return self.content.decode()
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 text (byte {error.start + 1} of it: {error.reason}): convert it to UTF-8"
            raise NotText(self.number, problem) from error


def read_lines(file: Iterable[bytes]) -> Iterator[TextLine]:
    """The lines of a file that is open in binary mode, each as soon as it is there."""
    for number, raw in enumerate(file, start=1):
        content = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if content:  # a file with nothing but the mark has no lines
            end = b"\r\n" if content.endswith(b"\r\n") else b"\n"
            yield TextLine(number, content.removesuffix(end))
