"""Whether a tokenizer of a bundle reads and writes texts as one of transformers does."""

import random
from typing import Any

from beamline_server.languages import NOTHING_AROUND, Around
from beamline_server.tokenizer import Tokenizer
from doubles.many_scripts import lines

TEXTS = list(lines(2000))
_RANDOM_LISTS, _LONGEST = 300, 30
_STREAMED_STEP = 40


def assert_alike(ours: Tokenizer, theirs: Any, size: int, around: Around = NOTHING_AROUND, target: Any = None) -> None:
    """Ids of 2,000 lines, their text, that of random ids below `size`, and what of it is settled on the way.

    `target` reads targets where `theirs` does not.
    """
    assert len(set(TEXTS)) > 1990
    read = theirs(TEXTS, split_special_tokens=True).input_ids
    for text, expected in zip(TEXTS, read, strict=True):
        assert ours.encode(text, around) == expected, text
    bare = (target or theirs)(TEXTS, split_special_tokens=True, add_special_tokens=False).input_ids
    for text, expected in zip(TEXTS, bare, strict=True):
        assert ours.encode_target(text) == expected, text
    assert_written_alike(ours, theirs, size, read if target is None else bare)


def assert_written_alike(ours: Tokenizer, theirs: Any, size: int, read: list[list[int]]) -> None:
    """The text of these ids, that of random ids below `size`, and what of it is settled on the way."""
    rng = random.Random(size)
    chosen = [[rng.randrange(size) for _ in range(rng.randint(1, _LONGEST))] for _ in range(_RANDOM_LISTS)]
    for ids in (*read, *chosen):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
    for ids in (*read[::_STREAMED_STEP], *chosen[::_STREAMED_STEP]):
        shown = ""
        for end in range(1, len(ids) + 1):
            settled = ours.settled(ids[:end])
            assert settled.startswith(shown), (ids, end)
            shown = settled
        assert ours.decode(ids).startswith(shown), ids
