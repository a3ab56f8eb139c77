"""What a bundle tells of a tokenizer of Moses' words."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from pathlib import Path

from beamline_export.checkpoint import check_file
from beamline_export.spec import ExportError, SpecialTokenIds
from beamline_export.tokenizer_files import TokenizerFiles, entry_settings
from beamline_export.tokenizer_json import unreadable_tokenizer
from beamline_server.moses import SETTINGS, MosesSettings, MosesSubwords
from beamline_server.token_ids import default_special_ids


def moses_files(
    settings: MosesSettings,
    files: Mapping[str, str],
    tokens: SpecialTokenIds,
    special: Collection[int],
    target: Mapping[str, int],
    *,
    clean: bool = False,
) -> TokenizerFiles:
    """A tokenizer of Moses' words.

    Args:
        settings: How texts become words.
        files: Name in the bundle -> name in the checkpoint folder.
        tokens: Special tokens, with what stands around a source.
        special: Target ids that leave no trace in text.
        target: The target's vocabulary.
        clean: Whether texts lose the spaces before punctuation.

    Raises:
        ExportError: sacremoses is not installed.
    """
    if find_spec("sacremoses") is None:
        raise ExportError("Moses' rules, which split words, need sacremoses; pip install 'beamline-serving[moses]'")
    # The server leaves out what is unknown by itself.
    unknown = {target[MosesSubwords.unknown]} if MosesSubwords.unknown in target else set()
    default = default_special_ids(dataclasses.asdict(tokens)) | unknown
    return TokenizerFiles(
        "moses",
        files,
        entry_settings(special, default, clean=clean),
        tokens,
        contents={SETTINGS: settings.model_dump_json().encode()},
    )


def is_language(name: object) -> bool:
    """Whether this can be the code of a language; Moses takes any, and has rules for some."""
    return isinstance(name, str) and re.fullmatch(r"[\w-]{1,64}", name) is not None


def check_merges(file: Path, read: Callable[[bytes], object]) -> None:
    """That a file holds merges.

    Raises:
        ExportError: it is missing, or `read` raises ValueError of it.
    """
    check_file(file)
    try:
        read(file.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable_tokenizer(file, error) from error
