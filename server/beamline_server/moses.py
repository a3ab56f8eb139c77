"""Words as Moses splits and joins them, by the library sacremoses, which only a bundle that asks for it needs."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from beamline_server.bounds import Text
from beamline_server.manifest import Manifest
from beamline_server.subwords import Merges, read_merges
from beamline_server.token_ids import read_vocabulary
from beamline_server.word_pieces import ContinuedPieces, EndMarkedPieces, WordPieces, read_codes
from beamline_server.word_tokenizer import UnreadableText, WordTokenizer

SETTINGS = "moses.json"
MERGES, CODES = "merges.txt", "bpe.codes"
MOST_CHARACTERS = 20_000
"""Of one text: while it is split, hardly another call is served. The worst of them took 0.11 s."""
_HYPHEN = "@-@"
"""What a hyphen within a word is split into, with a word on both sides."""
_NUMBER = re.compile("[0-9]+")
_NEVER = re.compile("(?!)")


class MosesSettings(BaseModel):
    """How texts become words.

    Attributes:
        source_language: Of sources; which rules hold.
        target_language: Of targets.
        normalize: Whether punctuation is normalized, and what cannot be printed left out.
        lower_case: Whether texts are made lower case.
        dash_splits: Whether hyphens within words are split off.
        escape: Whether characters that mean something to Moses are escaped.
        separator: What ends every token of a word but the last; None where `</w>` ends the last.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    source_language: Text
    target_language: Text
    normalize: bool = False
    lower_case: bool = False
    dash_splits: bool = True
    escape: bool = True
    separator: Text | None = Field(default=None, min_length=1)


class MosesSubwords:
    """Words of one language, and their pieces.

    Args:
        language: By its code of two letters; Moses has rules of its own for some.
        settings: How texts become words.
        pieces: What becomes of words.

    Raises:
        ModuleNotFoundError: sacremoses is not installed.
    """

    unknown = "<unk>"

    def __init__(self, language: str, settings: MosesSettings, pieces: WordPieces) -> None:
        import sacremoses

        self._language, self._settings, self._pieces = language, settings, pieces
        normalizer = sacremoses.MosesPunctNormalizer(lang=language, pre_replace_unicode_punct=True)
        normalizer.substitutions = [
            _DOTS_BEFORE_QUOTE if pattern == _SLOW else (pattern, by) for pattern, by in normalizer.substitutions
        ]
        self._normalize: Callable[[str], str] = normalizer.normalize
        tokenizer = sacremoses.MosesTokenizer(lang=language)
        # As the library has them, but for classes of a hundred thousand characters, through which `re` goes one by one,
        # and for the sets of all letters that are made anew for each word with a full stop.
        letters, ranges = tokenizer.IsAlnum, _as_ranges(tokenizer.IsAlnum)
        for rule in ("PAD_NOT_ISALNUM", "AGGRESSIVE_HYPHEN_SPLIT"):
            pattern, by = getattr(tokenizer, rule)
            setattr(tokenizer, rule, (re.compile(pattern.pattern.replace(letters, ranges)), by))
        tokenizer.isanyalpha = partial(_has_any, frozenset(tokenizer.IsAlpha))
        tokenizer.islower = frozenset(tokenizer.IsLower).issuperset
        self._tokenizer: Any = tokenizer
        self._detokenizer: Any = sacremoses.MosesDetokenizer(lang=language)
        if language == "cs":  # whose rule for `-li` behind an apostrophe, the only one that looks at it, fails
            self._detokenizer.IS_FRENCH_CONRTACTION = _NEVER

    def split(self, text: str) -> list[str]:
        """As `Subwords.split`.

        Raises:
            UnreadableText: it is longer than Moses' rules are applied to.
        """
        if len(text) > MOST_CHARACTERS:
            raise UnreadableText(
                f"has {len(text)} characters; expected at most {MOST_CHARACTERS}, as this model's words are split by "
                "Moses' rules; send it sentence by sentence"
            )
        return [piece for word in self._words(text) for piece in self._pieces.split(word)]

    def _words(self, text: str) -> list[str]:
        settings = self._settings
        if settings.lower_case:
            text = text.lower()
        if settings.normalize:
            text = "".join(c for c in self._normalize(text) if not unicodedata.category(c).startswith("C"))
        words: list[str] = self._tokenizer.tokenize(
            text, aggressive_dash_splits=settings.dash_splits, return_str=False, escape=settings.escape
        )
        return words

    def join(self, tokens: Sequence[str]) -> str:
        """As `Subwords.join`."""
        return str(self._detokenizer.detokenize(self._pieces.join(tokens).split()))

    def settled(self, tokens: Sequence[str]) -> str:
        """As `Subwords.settled`.

        The detokenizer makes parts of words: it joins those that have a split hyphen between them, and unescapes them.
        Then it puts parts together from left to right; where one stands depends on those before it. So a part is
        settled as soon as no hyphen can follow it.
        """
        text = self._pieces.join(tokens)
        words = text.split()
        begun = words.pop() if words and not text[-1].isspace() else ""
        pattern, hyphen = self._detokenizer.AGGRESSIVE_HYPHEN_SPLIT
        joined = pattern.sub(hyphen, f" {' '.join(words)} ")
        parts: list[str] = self._detokenizer.unescape_xml(joined).split()
        # The next word, of which something may be there, can be a hyphen, or stand behind one.
        if _HYPHEN.startswith(begun) or not joined.endswith(" "):
            parts = parts[:-1]
        if self._language == "cs":  # a number from the third part on, whose rule looks at the end of the whole text
            number = next((i for i, part in enumerate(parts) if i > 1 and _NUMBER.fullmatch(part)), len(parts))
            parts = parts[:number]
        return str(self._detokenizer.detokenize(parts, unescape=False))


def _quote_before_dots(match: re.Match[str]) -> str:
    return match[0] if match[2] is None else f'"{match[1]}{match[2]}'


_SLOW = r'(\.+)"(\s*[^<])'
_DOTS_BEFORE_QUOTE = (re.compile(r'(\.+)(?:"(\s*[^<]))?'), _quote_before_dots)
"""The same as a rule of the library for German, Spanish and French, which looks at every dot of a row for all that come
after it."""


def _as_ranges(characters: str) -> str:
    """The same class of characters for `re`; none of them means anything there."""
    ranges: list[list[int]] = []
    for code in sorted(set(map(ord, characters))):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def _has_any(letters: frozenset[str], text: str) -> bool:
    return not letters.isdisjoint(text)


def moses(read: Callable[[str], bytes], manifest: Manifest) -> WordTokenizer:
    """A tokenizer of Moses' words (FSMT, subword-nmt), whose target has a vocabulary of its own if there is a file.

    Raises:
        ModuleNotFoundError: sacremoses is not installed.
        ValueError: a file is not what its name says.
    """
    settings = MosesSettings.model_validate_json(read(SETTINGS))
    vocabulary = read_vocabulary("vocab.json", read("vocab.json"))
    own = "target_vocab.json" in manifest.tokenizer.files
    target = read_vocabulary("target_vocab.json", read("target_vocab.json")) if own else vocabulary
    pieces: WordPieces
    if settings.separator is None:
        pieces = EndMarkedPieces(Merges(read_merges(read(MERGES), header=False)))
    else:
        pieces = ContinuedPieces(read_codes(read(CODES)), settings.separator)
    source, written = (
        MosesSubwords(language, settings, pieces) for language in (settings.source_language, settings.target_language)
    )
    return WordTokenizer((source, written), (vocabulary, target), manifest)
