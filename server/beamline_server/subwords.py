"""Words to subwords by merges of symbols, and the ways of toolkits from a text to words and back."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from typing import Protocol

END_OF_WORD = "</w>"
_CONTINUED = "@@"
_MOST_CACHED = 10_000
"""Words whose subwords are remembered; in text, few words are most of the words."""
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space as Unicode has it; what Python calls so has some control characters, too."""
_CHUNK, _SPACES = re.compile(f"[^{_SPACE}]+\n?"), re.compile(f"[{_SPACE}]{{2,}}")


class Subwords(Protocol):
    """Text to the tokens of a vocabulary and back. Thread-safe."""

    unknown: str
    """The token of what is not in the vocabulary."""

    def split(self, text: str) -> list[str]:
        """The tokens of a text, in the vocabulary or not."""
        ...

    def join(self, tokens: Sequence[str]) -> str:
        """The text of tokens."""
        ...

    def settled(self, tokens: Sequence[str]) -> str:
        """As much of the text of tokens as stays what it is, whatever tokens follow."""
        ...


class Merges:
    """Byte-pair encoding of characters: of neighbouring symbols, those that come first in a list are joined first.

    The last symbol of a word ends with `</w>`; `own_end` tells that this is a symbol of its own at first. A pair that
    comes twice has its last place in the list.
    """

    def __init__(self, pairs: Sequence[Sequence[str]], *, own_end: bool = False) -> None:
        self._own_end = own_end
        self._ranks: Mapping[tuple[str, ...], int] = {tuple(pair): i for i, pair in enumerate(pairs)}
        self.symbols: Callable[[str], tuple[str, ...]] = lru_cache(_MOST_CACHED)(self._symbols)

    def _symbols(self, word: str) -> tuple[str, ...]:
        """The symbols of a word of at least one character."""
        symbols = [*word, END_OF_WORD] if self._own_end else [*word[:-1], word[-1] + END_OF_WORD]
        # Where the neighbours of each symbol stand; one that was joined to its neighbour on the left is empty.
        left, right = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))
        waiting: list[tuple[int, int]] = []
        for i in range(len(symbols) - 1):
            self._wait(waiting, symbols, i, i + 1)
        while waiting:
            # All pairs of one rank, from left to right, before any that come to be by it.
            rank = waiting[0][0]
            joined = []
            while waiting and waiting[0][0] == rank:
                i = heappop(waiting)[1]
                after = right[i]
                if after < len(symbols) and self._ranks.get((symbols[i], symbols[after])) == rank:
                    symbols[i] += symbols[after]
                    symbols[after] = ""
                    right[i] = right[after]
                    if right[i] < len(symbols):
                        left[right[i]] = i
                    joined.append(i)
            for i in joined:
                self._wait(waiting, symbols, left[i], i)
                self._wait(waiting, symbols, i, right[i])
        return tuple(symbol for symbol in symbols if symbol)

    def _wait(self, waiting: list[tuple[int, int]], symbols: Sequence[str], i: int, after: int) -> None:
        """Put the pair of these neighbours among the waiting ones, if there is one that can be joined."""
        if i >= 0 and after < len(symbols) and (rank := self._ranks.get((symbols[i], symbols[after]))) is not None:
            heappush(waiting, (rank, i))


def read_merges(content: bytes, *, header: bool) -> list[list[str]]:
    """The lines of a merges.txt, each a pair of symbols; the first one is none where there is a header.

    What stands behind the last end of a line is no merge.
    """
    lines = content.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.split()[:2] if not header else line.split() for line in lines[int(header) : -1]]


class BlenderbotSmallSubwords:
    """BlenderbotSmall's: lower case, space before punctuation, and `@@` behind what a word goes on after."""

    unknown = "__unk__"

    def __init__(self, merges: Merges) -> None:
        self._merges = merges

    def split(self, text: str) -> list[str]:
        """As `Subwords.split`."""
        return [token for chunk in _CHUNK.findall(text) for word in _words(chunk) for token in self._marked(word)]

    def _marked(self, word: str) -> list[str]:
        if len(word) == 1:
            return [word]
        *begun, last = self._merges.symbols(word)
        # Lower case of a part may differ from that of the whole.
        return [token.lower() for token in (*(symbol + _CONTINUED for symbol in begun), last[: -len(END_OF_WORD)])]

    def join(self, tokens: Sequence[str]) -> str:
        """As `Subwords.join`."""
        return " ".join(tokens).replace(f"{_CONTINUED} ", "").strip()

    def settled(self, tokens: Sequence[str]) -> str:
        """As `Subwords.settled`: without the sign that a word goes on."""
        return self.join(tokens).removesuffix(_CONTINUED)


def _words(chunk: str) -> list[str]:
    """Of characters without a space between them, but for the end of a line behind them."""
    chunk = re.sub("([.,!?()])", r" \1", chunk)
    chunk = re.sub("(')", r" \1 ", chunk)
    chunk = _SPACES.sub(" ", chunk).replace("\n", " __newln__")
    return [word.lower() for word in chunk.split(" ") if word]
