"""Tokenizers of words and subwords, whose tokens are looked up in vocabularies."""

from collections.abc import Callable, Collection, Mapping, Sequence

from beamline_server.languages import NOTHING_AROUND, Around
from beamline_server.manifest import Manifest
from beamline_server.subwords import BlenderbotSmallSubwords, Merges, Subwords, read_merges
from beamline_server.token_ids import (
    check_size,
    enclosed,
    ids_beyond,
    known_unknown,
    language_ids,
    plain_ids,
    read_vocabulary,
    special_ids,
)


class WordTokenizer:
    """Subwords and the ids of their tokens, in a vocabulary of each side.

    Args:
        subwords: Of source and target.
        vocabularies: Token -> id, of source and target.
        manifest: The bundle's.

    Raises:
        KeyError: the source's vocabulary has no token for what it does not know.
        ValueError: a vocabulary is larger than the model's.
    """

    def __init__(
        self,
        subwords: tuple[Subwords, Subwords],
        vocabularies: tuple[Mapping[str, int], Mapping[str, int]],
        manifest: Manifest,
    ) -> None:
        source, target = vocabularies
        check_size(max(source.values()) + 1, manifest.dimensions.source_vocabulary)
        self._source_subwords, self._target_subwords = subwords
        self._bos, self._eos = manifest.special_tokens.source_bos, manifest.special_tokens.source_eos
        special, unknown = special_ids(manifest), self._target_subwords.unknown
        self._source, self._source_unknown = source, source[self._source_subwords.unknown]
        self._source_control = {self._bos, self._eos, *language_ids(manifest)}
        beyond = ids_beyond(target.values(), manifest)
        self._target, self._target_unknown = target, known_unknown(target.get(unknown), beyond)
        self._target_control = special | beyond
        silent = special | {target.get(unknown)}
        self._tokens = {number: token for token, number in target.items() if number not in silent}

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        """As `Tokenizer.encode`."""
        tokens = self._source_subwords.split(text)
        ids = _plain(tokens, self._source, self._source_control, self._source_unknown)
        return [*around.before, *enclosed(ids, self._bos, self._eos), *around.after]

    def encode_target(self, text: str) -> list[int]:
        """As `Tokenizer.encode_target`."""
        tokens = self._target_subwords.split(text)
        return _plain(tokens, self._target, self._target_control, self._target_unknown)

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        return self._target_subwords.join(self._written(ids))

    def settled(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.settled`."""
        return self._target_subwords.settled(self._written(ids))

    def _written(self, ids: Sequence[int]) -> list[str]:
        """The tokens of those ids that leave a trace in text."""
        return [self._tokens[i] for i in ids if i in self._tokens]


def _plain(
    tokens: Sequence[str], vocabulary: Mapping[str, int], control: Collection[int | None], unknown: int | None
) -> list[int]:
    return plain_ids((vocabulary.get(token, unknown) for token in tokens), control, unknown)


class UnreadableText(ValueError):
    """A text has something that the model has no token for; says what, in words."""


class CharacterTokenizer:
    """Characters, each of which is a token (makemore); one that is not known is refused, for nothing stands for it.

    Raises:
        ValueError: the vocabulary is none, or larger than the model's.
    """

    def __init__(self, read: Callable[[str], bytes], manifest: Manifest) -> None:
        self._ids = read_vocabulary("characters.json", read("characters.json"))
        check_size(max(self._ids.values()) + 1, manifest.dimensions.target_vocabulary)
        self._bos, self._eos = manifest.special_tokens.source_bos, manifest.special_tokens.source_eos
        special = special_ids(manifest)
        self._characters = {number: text for text, number in self._ids.items() if number not in special}

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        """As `Tokenizer.encode`.

        Raises:
            UnreadableText: a character is not known.
        """
        ids = self.encode_target(text)
        return [*around.before, *enclosed(ids, self._bos, self._eos), *around.after]

    def encode_target(self, text: str) -> list[int]:
        """As `Tokenizer.encode_target`; raises as `encode`."""
        if unknown := next((character for character in text if character not in self._ids), None):
            raise UnreadableText(f"has the character {unknown!r}, which the model has no token for")
        return [self._ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        return "".join(self._characters[i] for i in ids if i in self._characters)

    def settled(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.settled`."""
        return self.decode(ids)


def blenderbot_small(read: Callable[[str], bytes], manifest: Manifest) -> WordTokenizer:
    """BlenderbotSmall's, with one vocabulary for both sides."""
    vocabulary = read_vocabulary("vocab.json", read("vocab.json"))
    subwords = BlenderbotSmallSubwords(Merges(read_merges(read("merges.txt"), header=True)))
    return WordTokenizer((subwords, subwords), (vocabulary, vocabulary), manifest)
