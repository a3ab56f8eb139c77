"""Byte-pair encoding that is learnt from a few lines, as subword-nmt does: symbols of words that end with `</w>`."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

Pair = tuple[str, str]


def learn(lines: Iterable[str], count: int) -> tuple[list[Pair], list[tuple[str, ...]]]:
    """The `count` most frequent pairs, one after the other, and the symbols of every word with them."""
    words = Counter(word for line in lines for word in re.findall(r"\w+|\S", line))
    symbols = {word: (*word[:-1], f"{word[-1]}</w>") for word in words}
    merges: list[Pair] = []
    for _ in range(count):
        pairs: Counter[Pair] = Counter()
        for word, number in words.items():
            for pair in pairwise(symbols[word]):
                pairs[pair] += number
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        symbols = {word: merged(parts, merges[-1]) for word, parts in symbols.items()}
    return merges, list(symbols.values())


def merged(symbols: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    """With this pair as one symbol, from left to right."""
    found: list[str] = []
    i = 0
    while i < len(symbols):
        both = symbols[i : i + 2] == pair
        found.append("".join(symbols[i : i + 1 + both]))
        i += 1 + both
    return tuple(found)
