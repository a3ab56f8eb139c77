"""FSMT's tokenizer: Moses' words, merges of characters, and a vocabulary of each language."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from beamline_export.checkpoint import Fields, read_optional_json
from beamline_export.families.bart_like import Folder
from beamline_export.families.toolkit import read_pieces
from beamline_export.moses_files import check_merges, is_language, moses_files
from beamline_export.spec import ExportError
from beamline_export.tokenizer_config import CONFIG_FILE, TokenizerConfig, read_tokenizer_config
from beamline_export.tokenizer_files import TokenizerFiles, settings_without_effect, with_around, without_tokenizer
from beamline_server.moses import MERGES, MosesSettings, MosesSubwords
from beamline_server.subwords import read_merges

_FILES = {"vocab.json": "vocab-src.json", "target_vocab.json": "vocab-tgt.json", MERGES: MERGES}
"""Name in a bundle -> name in a folder."""
_SPECIAL = {"bos_token": "<s>", "sep_token": "</s>", "unk_token": MosesSubwords.unknown, "pad_token": "<pad>"}


def read_fsmt_tokenizer(folder: Folder) -> TokenizerFiles:
    """The tokenizer of a folder, if it has one: `source </s>`.

    Raises:
        ExportError: one of its files is missing or cannot be read, its languages are not told, or its vocabularies have
            special tokens with different ids.
    """
    found = [name for name in _FILES.values() if (folder.path / name).exists()]
    if not found:
        return without_tokenizer(folder.tokens)
    if missing := [name for name in _FILES.values() if name not in found]:
        raise ExportError(
            f"{folder.path} lacks {missing[0]} of its tokenizer; copy all of {', '.join(_FILES.values())} or none"
        )
    config = read_tokenizer_config(folder.path, "fsmt")
    source, target = (read_pieces(folder.path / name) for name in list(_FILES.values())[:2])
    check_merges(folder.path / MERGES, partial(read_merges, header=False))
    special = _special(config, source, target)
    files = moses_files(
        _settings(folder.path),
        _FILES,
        with_around(folder.tokens, None, source[config.token("sep_token", _SPECIAL["sep_token"])]),
        special,
        target,
        clean=config.flags.get("clean_up_tokenization_spaces", False),
    )
    without_effect = settings_without_effect(config, (), MosesSubwords.unknown, ("FSMTTokenizer",))
    return dataclasses.replace(files, without_effect=without_effect)


def _special(config: TokenizerConfig, source: Mapping[str, int], target: Mapping[str, int]) -> set[int]:
    """The ids of the special tokens; transformers leave out of a target those that they have in the source."""
    tokens = sorted(config.special(_SPECIAL))
    for name, vocabulary in (("vocab-src.json", source), ("vocab-tgt.json", target)):
        if missing := [token for token in tokens if token not in vocabulary]:
            raise ExportError(f"{name} has no {missing[0]!r}; copy the vocabularies of this model")
    if other := [token for token in tokens if source[token] != target[token]]:
        raise ExportError(
            f"{other[0]!r} has the id {source[other[0]]} in vocab-src.json and {target[other[0]]} in vocab-tgt.json, "
            "which is not supported; copy the vocabularies of this model"
        )
    return {source[token] for token in tokens}


def _settings(folder: Path) -> MosesSettings:
    fields = Fields(read_optional_json(folder / CONFIG_FILE) or {}, str(folder / CONFIG_FILE))
    languages, lower_case = fields.raw("langs"), fields.flag("do_lower_case", False)
    named = isinstance(languages, list) and len(languages) == 2 and all(map(is_language, languages))
    if not named:
        told = "is missing" if languages is None else "is no list of two languages"
        fields.problems.append(f'langs {told}; set it to those of source and target, ["en", "de"] for one')
    fields.check()
    source, target = languages
    return MosesSettings(source_language=source, target_language=target, normalize=True, lower_case=lower_case)
