"""Text to token ids and back, with the tokenizer files of a bundle."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from beamline_server.bundle import Bundle, BundleError, Manifest


class Tokenizer(Protocol):
    """Text to ids and back. Thread-safe."""

    def encode(self, text: str) -> list[int]:
        """Source ids of a text, with the model's begin- and end-of-sequence ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of target ids; special tokens leave no trace."""
        ...


def load_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The bundle's tokenizer, or None if it has none.

    Raises:
        BundleError: a tokenizer file cannot be read, or gives ids that the model does not have.
    """
    kind = bundle.manifest.tokenizer.kind
    if kind == "none":
        return None
    readers: dict[str, Callable[[Path, Manifest], Tokenizer]] = {
        "marian": _MarianTokenizer,
        "sentencepiece": _SentencePieceTokenizer,
        "tokenizers": _JsonTokenizer,
    }
    try:
        return readers[kind](bundle.path, bundle.manifest)
    except Exception as error:  # the libraries raise many kinds; all mean that the files are no such tokenizer
        raise BundleError(bundle.path, f"its {kind} tokenizer cannot be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    text = f"{error.args[0]} is not in the vocabulary" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def _special_ids(manifest: Manifest) -> frozenset[int]:
    tokens = manifest.special_tokens
    optional = (tokens.pad, tokens.forced_bos, tokens.decoder_start)
    return frozenset([*tokens.eos, *(t for t in optional if t is not None)])


def _check_size(ids: int, vocabulary: int) -> None:
    if ids > vocabulary:
        raise ValueError(f"it has ids up to {ids - 1}, the model has {vocabulary}")


def _sentencepiece(file: Path) -> Any:
    import sentencepiece

    model = file.read_bytes()
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
    except RuntimeError as error:  # the library's text names a line of its own source
        raise ValueError(f"{file.name} is no SentencePiece model") from error


class _MarianTokenizer:
    """Two SentencePiece models and a vocabulary that maps their pieces to ids (MarianMT)."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._source = _sentencepiece(folder / "source.spm")
        self._target = _sentencepiece(folder / "target.spm")
        self._ids = _read_vocabulary(folder / "vocab.json")
        _check_size(max(self._ids.values()) + 1, manifest.dimensions.source_vocabulary)
        own = "target_vocab.json" in manifest.tokenizer.files
        target_ids = _read_vocabulary(folder / "target_vocab.json") if own else self._ids
        self._unknown = self._ids["<unk>"]
        # As transformers, which count the unknown token among the special ones.
        special = _special_ids(manifest) | {target_ids.get("<unk>")}
        self._pieces = {number: piece for piece, number in target_ids.items() if number not in special}
        self._eos = manifest.special_tokens.source_eos

    def encode(self, text: str) -> list[int]:
        code = text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0
        pieces = [text[:code]] if code else []
        pieces += self._source.encode(text[code:], out_type=str)
        ids = [self._ids.get(piece, self._unknown) for piece in pieces]
        return ids if self._eos is None else [*ids, self._eos]

    def decode(self, ids: Sequence[int]) -> str:
        text = self._target.decode_pieces([self._pieces[i] for i in ids if i in self._pieces])
        return str(text).replace("\u2581", " ").strip()


def _read_vocabulary(file: Path) -> dict[str, int]:
    vocabulary = json.loads(file.read_text("utf-8"))
    if not isinstance(vocabulary, dict) or not all(isinstance(number, int) for number in vocabulary.values()):
        raise ValueError(f"{file.name} is no object of pieces and their ids")
    return vocabulary


class _SentencePieceTokenizer:
    """Two SentencePiece models whose piece numbers are the ids."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._source = _sentencepiece(folder / "source.spm")
        self._target = _sentencepiece(folder / "target.spm")
        _check_size(self._source.get_piece_size(), manifest.dimensions.source_vocabulary)
        self._bos, self._eos = manifest.special_tokens.source_bos, manifest.special_tokens.source_eos
        self._special = _special_ids(manifest)
        self._size = self._target.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return _enclosed(self._source.encode(text), self._bos, self._eos)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._target.decode([int(i) for i in ids if i not in self._special and i < self._size]))


class _JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library (BART).

    Special ids that its post-processor does not add are added here.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        own = "target_tokenizer.json" in manifest.tokenizer.files
        self._source = _json_tokenizer(folder / "tokenizer.json")
        self._target = _json_tokenizer(folder / "target_tokenizer.json") if own else self._source
        self._bos, self._eos = manifest.special_tokens.source_bos, manifest.special_tokens.source_eos
        self._special = _special_ids(manifest)
        self._vocabulary = manifest.dimensions.source_vocabulary

    def encode(self, text: str) -> list[int]:
        # Pretrained tokenizers may know more tokens than the model, <mask> for one: those are left out.
        ids = (i for i in self._source.encode(text).ids if i < self._vocabulary)
        return _enclosed(ids, self._bos, self._eos)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i not in self._special]
        return str(self._target.decode(kept, skip_special_tokens=True))


def _json_tokenizer(file: Path) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    # Length limits are the server's to apply and to tell.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _enclosed(ids: Iterable[int], bos: int | None, eos: int | None) -> list[int]:
    """The ids between begin- and end-of-sequence, unless they stand there already."""
    inner = list(ids)
    start = [bos] if bos is not None and inner[:1] != [bos] else []
    end = [eos] if eos is not None and [*start, *inner][-1:] != [eos] else []
    return [*start, *inner, *end]
