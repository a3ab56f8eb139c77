"""Text to token ids and back, with the tokenizer files of a bundle.

Text is text: special tokens that are written in it are read as the characters they are made of, or as unknown where a
vocabulary has them as words. Marian's language code at the beginning of a text is the one exception, unless a request
names its language. That holds for sources and for the beginnings of targets.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from beamline_server.bundle import EXPORT_AGAIN, Bundle, BundleError, in_short
from beamline_server.languages import NOTHING_AROUND, Around
from beamline_server.manifest import Manifest
from beamline_server.moses import moses
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
from beamline_server.word_tokenizer import CharacterTokenizer, blenderbot_small

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_FIRST_BYTE = 3
"""The id of byte 0 where bytes are tokens: three special tokens come first."""
BYTES_END = _FIRST_BYTE + 256
"""The first id behind those of bytes."""
_INSTALL = "install the extra that brings it: pip install 'beamline-serving[moses]'"
_CLEAN_UP = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}
"""What transformers' `clean_up_tokenization` replaces, in its order."""


Read = Callable[[str], bytes]
"""Gives the content of a file of the bundle, by its name."""


class Tokenizer(Protocol):
    """Text to ids and back. Thread-safe."""

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        """Source ids of a text, with the model's begin- and end-of-sequence ids, and those of languages around it."""
        ...

    def encode_target(self, text: str) -> list[int]:
        """Target ids of a text that further ids may follow: nothing is added to it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of target ids; special tokens leave no trace."""
        ...

    def settled(self, ids: Sequence[int]) -> str:
        """As much of the text of target ids as stays what it is, whatever ids follow."""
        ...


def whole_characters(text: str) -> str:
    """A text without what it ends with of a character whose other bytes are still to come."""
    return text.rstrip(_REPLACEMENT)


def load_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The bundle's tokenizer, or None if it has none.

    Raises:
        BundleError: a tokenizer file cannot be read, or gives ids that the model does not have; or a package that the
            tokenizer needs is not installed.
    """
    kind = bundle.manifest.tokenizer.kind
    if kind == "none":
        return None
    readers: dict[str, Callable[[Read, Manifest], Tokenizer]] = {
        "marian": _MarianTokenizer,
        "sentencepiece": _SentencePieceTokenizer,
        "tokenizers": _JsonTokenizer,
        "bytes": _ByteTokenizer,
        "blenderbot_small": blenderbot_small,
        "characters": CharacterTokenizer,
        "moses": moses,
    }
    try:
        tokenizer = readers[kind](bundle.read, bundle.manifest)
    except ModuleNotFoundError as error:
        problem = f"its {kind} tokenizer needs the package {error.name}, which is not installed"
        raise BundleError(bundle.path, problem, _INSTALL) from error
    except BundleError:  # a file has changed since it was verified; it says which
        raise
    except Exception as error:  # the libraries raise many kinds; all mean that the files are no such tokenizer
        problem = f"its {kind} tokenizer cannot be read ({unreadable(error)})"
        raise BundleError(bundle.path, problem, EXPORT_AGAIN) from error
    return CleanedUp(tokenizer) if bundle.manifest.tokenizer.clean_up_spaces else tokenizer


def unreadable(error: Exception) -> str:
    """Why a tokenizer cannot be read, in one line."""
    return f"{error.args[0]} is not in the vocabulary" if isinstance(error, KeyError) else in_short(error)


class CleanedUp:
    """A tokenizer whose texts lose the spaces before punctuation, as transformers clean them up."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        """As `Tokenizer.encode`."""
        return self._inner.encode(text, around)

    def encode_target(self, text: str) -> list[int]:
        """As `Tokenizer.encode_target`."""
        return self._inner.encode_target(text)

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        return _cleaned_up(self._inner.decode(ids))

    def settled(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.settled`: without an end that might become something to replace."""
        # Once more when it is clean: what has been replaced may begin another one.
        return _without_a_begun_one(_cleaned_up(_without_a_begun_one(self._inner.settled(ids))))


def _without_a_begun_one(text: str) -> str:
    """A text without an end that might become something to replace."""
    while " " in text and any(spaced.startswith(text[text.rindex(" ") :]) for spaced in _CLEAN_UP):
        text = text[: text.rindex(" ")]
    return text


def _cleaned_up(text: str) -> str:
    for spaced, clean in _CLEAN_UP.items():
        text = text.replace(spaced, clean)
    return text


def read_sentencepiece(name: str, content: bytes) -> Any:
    """A SentencePiece model, of a file of this name.

    Raises:
        ValueError: it is none.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content or b"\0")
    except RuntimeError as error:  # the library's text names a line of its own source
        raise ValueError(f"{name} is no SentencePiece model") from error


class _MarianTokenizer:
    """Two SentencePiece models and a vocabulary that maps their pieces to ids (MarianMT, M2M100).

    Where no language stands before every source, a text may begin with the code of one.
    """

    def __init__(self, read: Read, manifest: Manifest) -> None:
        own = "target_vocab.json" in manifest.tokenizer.files
        source = read_sentencepiece("source.spm", read("source.spm"))
        target = read_sentencepiece("target.spm", read("target.spm"))
        # As transformers, which write with the source's pieces what they read with the target's.
        self._decoder = target if own else source
        ids = read_vocabulary("vocab.json", read("vocab.json"))
        check_size(max(ids.values()) + 1, manifest.dimensions.source_vocabulary)
        target_ids = read_vocabulary("target_vocab.json", read("target_vocab.json")) if own else ids
        self._bos, self._eos = manifest.special_tokens.source_bos, manifest.special_tokens.source_eos
        special, unknown = special_ids(manifest), ids["<unk>"]
        marked = manifest.languages is not None and manifest.languages.marks_sources
        self._codes_in_text = codes = self._bos is None and not marked
        self._source = _MarianReader(source, ids, {self._bos, self._eos, *language_ids(manifest)}, unknown, codes=codes)
        beyond = ids_beyond(target_ids.values(), manifest)
        target_unknown = known_unknown(target_ids.get("<unk>"), beyond)
        self._target = _MarianReader(target, target_ids, special | beyond, target_unknown, codes=codes)
        silent = special | {target_ids.get("<unk>")}
        self._pieces = {number: piece for piece, number in target_ids.items() if number not in silent}

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        # A code that stands before it makes it `>>fra<< text`, of which transformers read ` text` as words.
        begun = self._codes_in_text and around.before
        ids = self._source.words(f" {text}") if begun else self._source.ids(text)
        return [*around.before, *enclosed(ids, self._bos, self._eos), *around.after]

    def encode_target(self, text: str) -> list[int]:
        return self._target.ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        text = self._decoder.decode_pieces([self._pieces[i] for i in ids if i in self._pieces])
        return str(text).replace("\u2581", " ").strip()

    def settled(self, ids: Sequence[int]) -> str:
        return whole_characters(self.decode(ids))


class _MarianReader:
    """Reads texts of one side of a MarianMT model: a SentencePiece model, and the ids of its pieces.

    `codes` tells whether a text may begin with a language code, `>>fra<<` for one. `control` are ids that no text is
    read as, but for a language code; those of `</s>` and `<pad>` are added.
    """

    def __init__(
        self,
        model: Any,
        ids: Mapping[str, int],
        control: Collection[int | None],
        unknown: int | None,
        *,
        codes: bool,
    ) -> None:
        self._model = model
        self._codes = codes
        self._ids = ids
        self._control = {*control, ids.get("</s>"), ids.get("<pad>")}
        self._unknown = unknown

    def ids(self, text: str) -> list[int]:
        code = text.find("<<") + 2 if self._codes and text.startswith(">>") and "<<" in text else 0
        language = self._numbers([text[:code]] if code else [])
        return [*plain_ids(language, (), self._unknown), *self.words(text[code:])]

    def words(self, text: str) -> list[int]:
        """The ids of a text in which no language code is meant."""
        return plain_ids(self._numbers(self._model.encode(text, out_type=str)), self._control, self._unknown)

    def _numbers(self, pieces: Sequence[str]) -> list[int | None]:
        return [self._ids.get(piece, self._unknown) for piece in pieces]


class _SentencePieceTokenizer:
    """Two SentencePiece models whose piece numbers are the ids."""

    def __init__(self, read: Read, manifest: Manifest) -> None:
        self._source = read_sentencepiece("source.spm", read("source.spm"))
        self._target = read_sentencepiece("target.spm", read("target.spm"))
        check_size(self._source.get_piece_size(), manifest.dimensions.source_vocabulary)
        self._bos, self._eos = manifest.special_tokens.source_bos, manifest.special_tokens.source_eos
        self._special = special_ids(manifest)
        self._size = self._target.get_piece_size()
        self._control = _control_pieces(self._source) | {self._bos, self._eos} | language_ids(manifest)
        beyond = ids_beyond(range(self._size), manifest)
        self._target_control = _control_pieces(self._target) | self._special | beyond
        self._target_unknown = known_unknown(self._target.unk_id(), beyond)

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        ids = plain_ids(self._source.encode(text), self._control, self._source.unk_id())
        return [*around.before, *enclosed(ids, self._bos, self._eos), *around.after]

    def encode_target(self, text: str) -> list[int]:
        return plain_ids(self._target.encode(text), self._target_control, self._target_unknown)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._target.decode([int(i) for i in ids if i not in self._special and i < self._size]))

    def settled(self, ids: Sequence[int]) -> str:
        return whole_characters(self.decode(ids))


def _control_pieces(model: Any) -> frozenset[int]:
    """Ids of the pieces that a SentencePiece model may have for the ends of a text, or of its unknown one."""
    return frozenset(map(model.piece_to_id, ("<s>", "</s>", "<pad>")))


class _JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library (BART).

    Special ids that its post-processor does not add are added here. Where languages are marked around a source, the
    post-processor, which puts one of them there for good, is left out.
    """

    def __init__(self, read: Read, manifest: Manifest) -> None:
        own = "target_tokenizer.json" in manifest.tokenizer.files
        source = read_json_tokenizer(read("tokenizer.json"))
        self._decoder = read_json_tokenizer(read("target_tokenizer.json")) if own else source
        tokens, sizes = manifest.special_tokens, manifest.dimensions
        self._bos, self._eos = tokens.source_bos, tokens.source_eos
        self._special = special_ids(manifest)
        self._whole = manifest.languages is None or not manifest.languages.marks_sources
        self._source = _JsonReader(source, sizes.source_vocabulary, {self._bos, self._eos, *language_ids(manifest)})
        self._target = _JsonReader(self._decoder, sizes.target_vocabulary, self._special)
        self._bytes = _fallback_bytes(self._decoder)

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        ids = enclosed(self._source.ids(text, whole=self._whole), self._bos, self._eos)
        return [*around.before, *ids, *around.after]

    def encode_target(self, text: str) -> list[int]:
        return self._target.ids(text, whole=False)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i not in self._special]
        return str(self._decoder.decode(kept, skip_special_tokens=True))

    def settled(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i not in self._special]
        # One more byte may make the whole row of them, however many, no character.
        while kept and kept[-1] in self._bytes:
            kept.pop()
        return whole_characters(self.decode(kept))


def _fallback_bytes(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that are a byte each, if the tokenizer makes characters of them."""
    if "ByteFallback" not in str(tokenizer.decoder):
        return frozenset()
    known: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return frozenset(i for token, i in known.items() if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token))


class _JsonReader:
    """Reads texts of one side with a tokenizer of the tokenizers library, into the first `vocabulary` ids.

    `control` are ids that no text is read as; those of the tokenizer's own special tokens are added.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, control: Collection[int | None]) -> None:
        self._tokenizer = tokenizer
        self._unknown = unknown_id(tokenizer, vocabulary)
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        # Pretrained tokenizers may know more tokens than the model, <mask> for one.
        beyond = {i for i in tokenizer.get_vocab(with_added_tokens=True).values() if i >= vocabulary}
        self._control = {*control, *special, *beyond} - {self._unknown}

    def ids(self, text: str, *, whole: bool) -> list[int]:
        """The ids of a text, of a whole one with what the post-processor puts around it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=whole)
        # Those that the post-processor has added are meant.
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        ids = (self._unknown if not added and i in self._control else i for i, added in pairs)
        return [i for i in ids if i is not None]


class _ByteTokenizer:
    """The bytes of UTF-8, each of which is a token (ByT5)."""

    def __init__(self, _: Read, manifest: Manifest) -> None:
        sizes = manifest.dimensions
        check_size(BYTES_END, min(sizes.source_vocabulary, sizes.target_vocabulary))
        self._eos, special = manifest.special_tokens.source_eos, special_ids(manifest)
        self._text = frozenset(range(_FIRST_BYTE, BYTES_END)) - special

    def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
        ids = self.encode_target(text)
        return [*around.before, *ids, *([] if self._eos is None else [self._eos]), *around.after]

    def encode_target(self, text: str) -> list[int]:
        return [_FIRST_BYTE + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - _FIRST_BYTE for i in ids if i in self._text).decode(errors="ignore")

    def settled(self, ids: Sequence[int]) -> str:
        # What is no character is left out, and so is one whose other bytes are still to come.
        return self.decode(ids)


def read_json_tokenizer(content: bytes) -> Any:
    """A tokenizer.json, for text of any length in which special tokens are nothing special.

    Raises:
        Exception: the library cannot read it.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # Length limits are the server's to apply and to tell.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def unknown_id(tokenizer: Any, vocabulary: int) -> int | None:
    """The id of words that a tokenizer does not know, if it has one that the model has, too."""
    token = getattr(tokenizer.model, "unk_token", None) or "<unk>"
    number: int | None = tokenizer.token_to_id(token)
    return number if number is not None and number < vocabulary else None
