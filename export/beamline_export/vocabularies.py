"""Whether a checkpoint's tokenizer, its special tokens and its embeddings are of one size, on both sides."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from beamline_export.spec import Checkpoint, ExportError
from beamline_export.tokenizer_json import added_around, load_json_tokenizer, unreadable_tokenizer
from beamline_server.token_ids import read_vocabulary
from beamline_server.tokenizer import BYTES_END, read_sentencepiece, unknown_id

_MOST_SHOWN = 5
_LIKE_TOKENIZERS = ("*.spm", "*.model", "vocab*", "merges.txt", "tokenizer.json", "sentencepiece*")
_FILES = {
    "marian": ("vocab.json", "target_vocab.json"),
    "blenderbot_small": ("vocab.json", "vocab.json"),
    "characters": ("characters.json", "characters.json"),
    "moses": ("vocab.json", "target_vocab.json"),
    "tokenizers": ("tokenizer.json", "target_tokenizer.json"),
    "sentencepiece": ("source.spm", "target.spm"),
}
_OF_VOCABULARIES = ("marian", "blenderbot_small", "characters", "moses")
"""Kinds whose ids are in a vocab.json."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The ids that a file has tokens for.

    Attributes:
        tokens: Every token of the file, with its id.
        special: Those that no text becomes.
        beside: Those that were added to the vocabulary; a pretrained tokenizer may have more of them than its model.
        unknown: The id of words that are not known.
    """

    tokens: Mapping[str, int]
    special: Collection[str] = ()
    beside: Collection[str] = ()
    unknown: int | None = None


def check_vocabularies(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Compare ids with the model's vocabularies.

    Args:
        checkpoint: Its tokenizer files are in `folder`.
        folder: The checkpoint's.

    Returns:
        What the user should know, a line each: words that the model does not know, ids that leave no text.

    Raises:
        ExportError: a special token, or a tokenizer's token, is outside the model's vocabulary.
    """
    if problems := list(_special_tokens_outside(checkpoint)):
        raise ExportError(f"config.json or generation_config.json: {'; '.join(problems)}")
    if checkpoint.tokenizer_kind == "none":
        return list(_not_read(folder))
    if checkpoint.tokenizer_kind == "bytes":
        return list(_bytes(checkpoint.spec.target_vocabulary))
    source, target = _FILES[checkpoint.tokenizer_kind]
    contents = checkpoint.tokenizer_contents
    target = target if target in checkpoint.tokenizer_files or target in contents else source
    spec = checkpoint.spec
    languages = checkpoint.languages
    # What a post-processor puts around a text is left out where languages stand there.
    if checkpoint.tokenizer_kind == "tokenizers" and (languages is None or not languages.marks_sources):
        _check_around(checkpoint, folder / source, contents.get(source))
    files = {name: folder / checkpoint.tokenizer_files.get(name, name) for name in {source, target}}
    read = {
        name: _read(checkpoint.tokenizer_kind, file, contents.get(name), spec.source_vocabulary)
        for name, file in files.items()
    }
    return [
        *_outside(read[source], files[source], "source", spec.source_vocabulary),
        *_outside(read[target], files[target], "target", spec.target_vocabulary),
        *_without_text(read[target], target, spec.target_vocabulary, _not_text(checkpoint)),
    ]


def _not_text(checkpoint: Checkpoint) -> Collection[int]:
    """Ids that no text is expected of."""
    if checkpoint.tokenizer_kind != "characters":
        return checkpoint.removed_tokens
    tokens = checkpoint.special_tokens
    return {*checkpoint.removed_tokens, *tokens.eos, tokens.decoder_start}


def _bytes(size: int) -> Iterator[str]:
    if size < BYTES_END:
        raise ExportError(f"the model's vocabulary has {size} tokens, bytes need {BYTES_END}; correct vocab_size")
    if size > BYTES_END:
        yield f"bytes are {BYTES_END} of the {size} ids that the model may give; the others leave no text"


def _not_read(folder: Path) -> Iterator[str]:
    """Of a checkpoint without a tokenizer that its family reads: files that look like one."""
    if found := sorted({file.name for pattern in _LIKE_TOKENIZERS for file in folder.glob(pattern)}):
        yield (
            f"{_listed(found)}: no tokenizer that is read with this kind of checkpoint, so requests carry token ids; "
            "docs/bring-your-model.md lists the files that are"
        )


def _special_tokens_outside(checkpoint: Checkpoint) -> Iterator[str]:
    """Ids that the model has no token for, by the names of their settings."""
    tokens, spec = checkpoint.special_tokens, checkpoint.spec
    target: Mapping[str, Iterable[int | None]] = {
        "decoder_start_token_id": [tokens.decoder_start],
        "eos_token_id": tokens.eos,
        "pad_token_id": [tokens.pad],
        "forced_bos_token_id": [tokens.forced_bos],
        "forced_eos_token_id": [tokens.forced_eos],
        "bad_words_ids or suppress_tokens": tokens.banned,
        "begin_suppress_tokens": tokens.banned_at_start,
    }
    yield from _ids_outside(target, "target", spec.target_vocabulary)
    if checkpoint.tokenizer_kind in ("none", "sentencepiece"):
        source = {"source_bos_token_id": [tokens.source_bos], "source_eos_token_id": [tokens.source_eos]}
        yield from _ids_outside(source, "source", spec.source_vocabulary)


def _ids_outside(named: Mapping[str, Iterable[int | None]], side: str, size: int) -> Iterator[str]:
    for name, ids in named.items():
        if outside := [i for i in ids if i is not None and i >= size]:
            shown = _listed(map(str, outside))
            yield f"{name} {shown} is outside the {side} vocabulary of {size} (0 to {size - 1}); correct or remove it"


def _check_around(checkpoint: Checkpoint, file: Path, content: bytes | None) -> None:
    """A source begins and ends once, as its config says, or as its tokenizer does, and with tokens of the model."""
    tokens, size = checkpoint.special_tokens, checkpoint.spec.source_vocabulary
    before, after = added_around(load_json_tokenizer(file, content))
    around = (*before, *after, tokens.source_bos, tokens.source_eos)
    if outside := list(dict.fromkeys(str(i) for i in around if i is not None and i >= size)):
        raise ExportError(
            f"{file} or config.json has {_listed(outside)} around a text, which is outside the source vocabulary of "
            f"{size} (0 to {size - 1}); copy the tokenizer that this model was trained with"
        )
    for name, wanted, found in (
        ("source_bos_token_id", tokens.source_bos, before[:1]),
        ("source_eos_token_id", tokens.source_eos, after[-1:]),
    ):
        if wanted is not None and found not in ([], [wanted]):
            raise ExportError(
                f"config.json: {name} {wanted} is not what the post-processor of {file.name} adds ({found[0]}): a text "
                "would get both; correct or remove it"
            )


def _read(kind: str, file: Path, content: bytes | None, size: int) -> _Vocabulary:
    """A side's vocabulary; `content`, if given, stands for the file's."""
    if kind == "tokenizers":
        return _read_json(file, content, size)
    try:
        content = file.read_bytes() if content is None else content
        if kind in _OF_VOCABULARIES:
            return _Vocabulary(read_vocabulary(file.name, content))
        model = read_sentencepiece(file.name, content)
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable_tokenizer(file, error) from error
    return _Vocabulary({model.id_to_piece(i): i for i in range(model.get_piece_size())})


def _read_json(file: Path, content: bytes | None, size: int) -> _Vocabulary:
    tokenizer = load_json_tokenizer(file, content)
    added = tokenizer.get_added_tokens_decoder().values()
    return _Vocabulary(
        tokenizer.get_vocab(with_added_tokens=True),
        special={token.content for token in added if token.special},
        beside={token.content for token in added},
        unknown=unknown_id(tokenizer, size),
    )


def _outside(vocabulary: _Vocabulary, file: Path, side: str, size: int) -> Iterator[str]:
    """What the model has no row for: tokens beside the vocabulary are told of, others are refused."""
    outside = {token: i for token, i in vocabulary.tokens.items() if i >= size}
    read = [token for token in outside if token not in vocabulary.special]
    foreign = [token for token in read if token not in vocabulary.beside]
    if foreign or (read and side == "source" and vocabulary.unknown is None):
        raise ExportError(
            f"{file} has {len(vocabulary.tokens)} tokens with ids up to {max(outside.values())}, the model's {side} "
            f"vocabulary has {size}: copy the tokenizer that this model was trained with, and correct the sizes in "
            "config.json if they are wrong"
        )
    if outside and side == "source":
        told = "read as unknown words" if read else "never read from a text"
        yield f"{file.name} has tokens that the model does not have ({_listed(outside)}): they are {told}"


def _without_text(vocabulary: _Vocabulary, name: str, size: int, removed: Collection[int]) -> Iterator[str]:
    known = {i for i in vocabulary.tokens.values() if i < size} - set(removed)
    if len(known) < (given := size - len(set(removed))):
        yield f"{name} has tokens for {len(known)} of the {given} ids that the model may give; the others leave no text"


def _listed(items: Iterable[str]) -> str:
    shown = list(items)
    more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    return ", ".join(shown[:_MOST_SHOWN]) + more
