"""Words to pieces by byte-pair encoding and back, in the two ways that toolkits mark where a word ends."""

import re
from collections.abc import Sequence
from typing import Protocol

from beamline_server.subwords import END_OF_WORD, Merges

_VERSION = "#version:"


class WordPieces(Protocol):
    """Words to the tokens of a vocabulary and back. Thread-safe."""

    def split(self, word: str) -> Sequence[str]:
        """The tokens of a word of at least one character."""
        ...

    def join(self, tokens: Sequence[str]) -> str:
        """The words of tokens with spaces between them; a space at the end tells that the last one is whole."""
        ...


class EndMarkedPieces:
    """`</w>` ends the last token of a word (FSMT)."""

    def __init__(self, merges: Merges) -> None:
        self._merges = merges

    def split(self, word: str) -> Sequence[str]:
        """As `WordPieces.split`."""
        return self._merges.symbols(word)

    def join(self, tokens: Sequence[str]) -> str:
        """As `WordPieces.join`."""
        return "".join(token.replace(" ", "").replace(END_OF_WORD, " ") for token in tokens)


class ContinuedPieces:
    """A separator, `@@` for one, ends every token of a word but the last (subword-nmt)."""

    def __init__(self, merges: Merges, separator: str) -> None:
        self._merges = merges
        self._separator = separator

    def split(self, word: str) -> Sequence[str]:
        """As `WordPieces.split`."""
        if len(word) == 1:
            return [word]
        symbols = self._merges.symbols(word)
        # An end of a word that nothing was joined to is no token.
        *begun, last = symbols[:-1] if symbols[-1] == END_OF_WORD else symbols
        return [*(symbol + self._separator for symbol in begun), last.removesuffix(END_OF_WORD)]

    def join(self, tokens: Sequence[str]) -> str:
        """As `WordPieces.join`."""
        return "".join(f"{token} " for token in tokens).replace(f"{self._separator} ", "")


def read_codes(content: bytes) -> Merges:
    """The merges in a file that subword-nmt has written; of a pair that comes twice, the first place counts.

    Raises:
        ValueError: it is none.
    """
    lines = content.decode().split("\n")
    version = "0.1"
    if lines[0].startswith(_VERSION):
        version = re.sub(r"(\.0+)*$", "", lines.pop(0)[len(_VERSION) :].strip())
    if version not in ("0.1", "0.2"):
        raise ValueError(f"its version is {version[:20]}; expected 0.1 or 0.2")
    while lines and not lines[-1]:
        lines.pop()
    pairs = [tuple(line.strip("\r\n ").split(" ")) for line in lines]
    for i, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"merge {i + 1} is no pair of symbols: {' '.join(pair)[:60]!a}")
    return Merges(list(dict.fromkeys(pairs)), own_end=version == "0.1")
