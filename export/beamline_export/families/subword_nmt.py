"""Words by Moses' rules in subword-nmt's pieces, where the config.json of a toolkit's folder asks for them."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from beamline_export.checkpoint import Fields
from beamline_export.families.toolkit import find_models, piece_tokenizer, vocabulary_files
from beamline_export.moses_files import check_merges, is_language, moses_files
from beamline_export.spec import ExportError, SpecialTokenIds
from beamline_export.tokenizer_files import TokenizerFiles
from beamline_server.moses import CODES, MosesSettings
from beamline_server.token_ids import default_special_ids
from beamline_server.word_pieces import read_codes

_LANGUAGES = ("source_lang", "target_lang")
_OWN = ("bpe", "bpe_codes", "bpe_separator", *_LANGUAGES, "moses_no_dash_splits", "moses_no_escape")
"""Keys beside `tokenizer`, by the names that fairseq has for them."""


@dataclasses.dataclass(frozen=True, slots=True)
class MosesWords:
    """What a config.json asks for.

    Attributes:
        settings: How texts become words, and words pieces.
        codes: Name of the file with the merges.
    """

    settings: MosesSettings
    codes: str


def read_moses_words(fields: Fields, languages: Mapping[str, object]) -> MosesWords | None:
    """What config.json asks for, if it asks for Moses' words.

    Args:
        fields: Reads config.json; collects what is wrong.
        languages: The languages by the names of their keys, as the toolkit's own settings tell them.
    """
    if not any(fields.given.get(name) is not None for name in ("tokenizer", *_OWN)):
        return None
    fields.choice("tokenizer", {"moses": "moses"})
    fields.choice("bpe", {"subword_nmt": "subword_nmt"})
    source, target = (_language(fields, name, languages.get(name)) for name in _LANGUAGES)
    codes, separator = _text(fields, "bpe_codes", CODES), _text(fields, "bpe_separator", "@@")
    if "/" in codes or "\\" in codes:
        fields.problems.append(f"bpe_codes must be the name of a file in the folder, not {codes!r}")
    settings = MosesSettings(
        source_language=source,
        target_language=target,
        dash_splits=not fields.flag("moses_no_dash_splits", False),
        escape=not fields.flag("moses_no_escape", False),
        separator=separator,
    )
    return MosesWords(settings, codes)


def _language(fields: Fields, name: str, told: object) -> str:
    value = fields.raw(name)
    value = told if value is None else value
    if not is_language(value):
        wrong = "is missing" if value is None else f"must be the code of a language, not {str(value)[:60]!r}"
        fields.problems.append(f"{name} {wrong}; Moses splits words by the rules of it")
        return "en"
    return str(value)


def _text(fields: Fields, name: str, default: str) -> str:
    value = fields.raw(name)
    if value is None:
        return default
    if not isinstance(value, str) or not re.fullmatch(r"\S{1,64}", value):
        fields.problems.append(f"{name} must be a text without spaces, not {str(value)[:60]!r}")
        return default
    return value


Pieces = MosesWords | tuple[str, str]
"""Subword-nmt's, or the names of SentencePiece models of source and target."""


def find_pieces(folder: Path, words: MosesWords | None, *shared: str) -> Pieces | None:
    """What a folder's pieces are, if it says so; `shared` is as in `find_models`.

    Raises:
        ExportError: it has SentencePiece models, and its config.json asks for subword-nmt; or as `find_models`.
    """
    models = find_models(folder, *shared)
    if words is not None and models is not None:
        raise ExportError(
            f"{folder} holds {models[0]}, and config.json asks for bpe subword_nmt; remove what this model was not "
            "trained with"
        )
    return words or models


def toolkit_tokenizer(
    folder: Path,
    pieces: Pieces,
    vocabularies: tuple[Mapping[str, int], Mapping[str, int]],
    origin: str,
    tokens: SpecialTokenIds,
    silent: Collection[int],
) -> tuple[TokenizerFiles, Mapping[str, bytes]]:
    """A tokenizer of these pieces; other arguments, result and errors are those of `piece_tokenizer`.

    Raises:
        ExportError: the file with subword-nmt's merges is missing or holds none; or as `piece_tokenizer`.
    """
    if not isinstance(pieces, MosesWords):
        return piece_tokenizer(pieces, vocabularies, origin, tokens, silent)
    file = folder / pieces.codes
    if not file.exists():
        raise ExportError(f"{folder} lacks {pieces.codes}, the merges of subword-nmt; copy it, or name it by bpe_codes")
    check_merges(file, read_codes)
    contents = vocabulary_files(vocabularies, origin)
    target = vocabularies[1]
    unknown = [target["<unk>"]] if "<unk>" in target else []
    special = {*default_special_ids(dataclasses.asdict(tokens)), *silent, *unknown}
    found = moses_files(pieces.settings, {CODES: pieces.codes}, tokens, special, target)
    return found, {**found.contents, **contents}
