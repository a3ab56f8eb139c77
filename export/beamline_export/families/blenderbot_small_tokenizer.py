"""BlenderbotSmall's tokenizer: a vocabulary, and merges of characters."""

import dataclasses

from beamline_export.checkpoint import check_file
from beamline_export.families.bart_like import Folder
from beamline_export.families.toolkit import read_pieces
from beamline_export.spec import ExportError
from beamline_export.tokenizer_config import read_tokenizer_config
from beamline_export.tokenizer_files import (
    TokenizerFiles,
    entry_settings,
    settings_without_effect,
    with_around,
    without_tokenizer,
)
from beamline_export.tokenizer_json import unreadable_tokenizer
from beamline_server.subwords import BlenderbotSmallSubwords, read_merges
from beamline_server.token_ids import default_special_ids

_FILES = ("vocab.json", "merges.txt")
_UNKNOWN = BlenderbotSmallSubwords.unknown
_SPECIAL = {"bos_token": "__start__", "eos_token": "__end__", "unk_token": _UNKNOWN, "pad_token": "__null__"}


def read_blenderbot_small_tokenizer(folder: Folder) -> TokenizerFiles:
    """The tokenizer of a folder, if it has one; nothing stands around a source.

    Raises:
        ExportError: one of its files is missing or cannot be read.
    """
    found = [name for name in _FILES if (folder.path / name).exists()]
    if not found:
        return without_tokenizer(folder.tokens)
    if missing := [name for name in _FILES if name not in found]:
        raise ExportError(
            f"{folder.path} lacks {missing[0]} of its tokenizer; copy both of {', '.join(_FILES)} or none"
        )
    config = read_tokenizer_config(folder.path, "blenderbot-small")
    vocabulary = read_pieces(folder.path / "vocab.json")
    if _UNKNOWN not in vocabulary:
        raise ExportError(f"{folder.path / 'vocab.json'} has no {_UNKNOWN!r}; copy the vocabulary of this model")
    merges = folder.path / "merges.txt"
    check_file(merges)
    try:
        read_merges(merges.read_bytes(), header=True)
    except (OSError, ValueError) as error:
        raise unreadable_tokenizer(merges, error) from error
    special = {vocabulary[token] for token in config.special(_SPECIAL) if token in vocabulary}
    # The server leaves out what is unknown by itself.
    default = default_special_ids(dataclasses.asdict(folder.tokens)) | {vocabulary[_UNKNOWN]}
    return TokenizerFiles(
        "blenderbot_small",
        {name: name for name in _FILES},
        entry_settings(special, default, clean=config.flags.get("clean_up_tokenization_spaces", False)),
        with_around(folder.tokens, None, None),
        settings_without_effect(config, (), _UNKNOWN, ("BlenderbotSmallTokenizer",)),
    )
