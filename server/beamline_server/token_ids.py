"""Which ids a text becomes, and which leave no trace in one, whatever the tokenizer."""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from beamline_server.manifest import Manifest


def special_ids(manifest: Manifest) -> frozenset[int]:
    """Target ids that leave no trace in text."""
    languages = language_ids(manifest) if manifest.languages is not None and manifest.languages.begins_targets else ()
    if manifest.tokenizer.special is not None:
        return frozenset(manifest.tokenizer.special).union(languages)
    return default_special_ids(manifest.special_tokens.model_dump()).union(languages)


def language_ids(manifest: Manifest) -> frozenset[int]:
    """Ids of the languages that requests can name."""
    return frozenset() if manifest.languages is None else manifest.languages.ids


def default_special_ids(tokens: Mapping[str, Any]) -> frozenset[int]:
    """Target ids that leave no trace in text where a bundle names none; `tokens` are as in `SpecialTokens`."""
    optional = (tokens["pad"], tokens["forced_bos"], tokens["decoder_start"])
    return frozenset([*tokens["eos"], *(token for token in optional if token is not None)])


def check_size(ids: int, vocabulary: int) -> None:
    """That a tokenizer is no larger than its model.

    Raises:
        ValueError: it is.
    """
    if ids > vocabulary:
        raise ValueError(f"it has ids up to {ids - 1}, the model has {vocabulary}")


def plain_ids(ids: Iterable[int | None], control: Collection[int | None], unknown: int | None) -> list[int]:
    """The ids of a text, in which special tokens are unknown words; left out if the vocabulary has no such word."""
    plain = (unknown if i in control else i for i in ids)
    return [i for i in plain if i is not None]


def ids_beyond(ids: Iterable[int], manifest: Manifest) -> frozenset[int]:
    """Those of a target tokenizer's ids that the model does not have."""
    return frozenset(i for i in ids if i >= manifest.dimensions.target_vocabulary)


def known_unknown(unknown: int | None, beyond: Collection[int]) -> int | None:
    """The id of unknown words, if the model has it."""
    return None if unknown in beyond else unknown


def enclosed(ids: Iterable[int], bos: int | None, eos: int | None) -> list[int]:
    """The ids between begin- and end-of-sequence, unless they stand there already."""
    inner = list(ids)
    start = [bos] if bos is not None and inner[:1] != [bos] else []
    end = [eos] if eos is not None and [*start, *inner][-1:] != [eos] else []
    return [*start, *inner, *end]


def read_vocabulary(name: str, content: bytes) -> dict[str, int]:
    """A JSON object of pieces and their ids, of a file of this name.

    Raises:
        ValueError: it is none.
    """
    vocabulary = json.loads(content.decode())
    numbers = vocabulary.values() if isinstance(vocabulary, dict) else [None]
    if not vocabulary or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in numbers):
        raise ValueError(f"{name} is no object of pieces and their ids")
    if any("\ud800" <= character <= "\udfff" for piece in vocabulary for character in piece):
        raise ValueError(f"{name} has half of a surrogate pair, which is no character")
    return dict(vocabulary)
