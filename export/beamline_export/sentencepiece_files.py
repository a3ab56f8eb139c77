"""Makes the tokenizer.json of a folder that holds a SentencePiece model alone, as transformers make one of it."""

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from beamline_export.checkpoint import check_file, read_optional_json
from beamline_export.reference import quiet_transformers
from beamline_export.spec import ExportError
from beamline_export.tokenizer_config import CONFIG_FILE
from beamline_export.tokenizer_json import TokenizerJson, made_tokenizer_json, unreadable_tokenizer
from beamline_server.tokenizer import read_sentencepiece, unreadable

WRITE_JSON = (
    "write tokenizer.json with transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), or copy it"
)
_BESIDE = ("special_tokens_map.json", "added_tokens.json")
_DROPPED = ("auto_map", "vocab", "merges", "post_processor", "tokenizer_object", "gguf_file", "unk_id", "tokenizer")
"""Settings that would stand for the files themselves, or name code."""
_WIDE = "\N{FULLWIDTH LATIN CAPITAL LETTER A}"
"""What every normalization of SentencePiece's own replaces."""
_SHOWN = 200
"""Of a normalizer's JSON, its kinds: what follows is a table of characters."""


def tokenizer_json_of_pieces(folder: Path, name: str, class_: str, classes: Collection[str]) -> TokenizerJson:
    """What a class of transformers makes of a SentencePiece model and the tokenizer's settings.

    Args:
        folder: The checkpoint.
        name: The model's name in it.
        class_: The class that the folder names, or the family's own.
        classes: Those that can be read so.

    Raises:
        ExportError: the file is no such model, or the class is another, or makes nothing of it.
    """
    file, class_ = folder / name, class_.removesuffix("Fast")
    if class_ not in classes:
        known = ", ".join(classes) or "none"
        raise ExportError(
            f"{folder} has {name} but no tokenizer.json, and of the classes that make one {known} can be read here, "
            f"not {class_}; {WRITE_JSON}"
        )
    check_file(file)
    try:
        model = read_sentencepiece(name, file.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable_tokenizer(file, error) from error
    made = _as_transformers(folder, name, class_)
    notices = list(_left_out(name, class_, model, json.loads(made)))
    return made_tokenizer_json(file, made.encode(), notices)


def _as_transformers(folder: Path, name: str, class_: str) -> str:
    """The tokenizer.json of a class in transformers, which sees this model, the settings and nothing else."""
    import transformers

    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        shutil.copyfile(folder / name, Path(scratch) / name)
        for beside in _BESIDE:
            if (data := read_optional_json(folder / beside)) is not None:
                (Path(scratch) / beside).write_text(json.dumps(data))
        settings = read_optional_json(folder / CONFIG_FILE) or {}
        kept = {key: value for key, value in settings.items() if key not in _DROPPED and not key.endswith("_file")}
        (Path(scratch) / CONFIG_FILE).write_text(json.dumps(kept))
        try:
            tokenizer = getattr(transformers, class_).from_pretrained(scratch, local_files_only=True)
            return str(tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # its constructors raise all kinds; all mean the same to the user
            raise ExportError(
                f"transformers' {class_} cannot be made of {folder / name} and {CONFIG_FILE} ({unreadable(error)}); "
                "correct the settings, or download both again"
            ) from error


def _left_out(name: str, class_: str, model: Any, made: Mapping[str, Any]) -> Iterator[str]:
    """What SentencePiece itself would do to a text, and the class in transformers does not."""
    parts = []
    if _WIDE not in model.normalize(_WIDE) and "Precompiled" not in json.dumps(made["normalizer"])[:_SHOWN]:
        parts.append("its normalization of characters")
    if any(model.is_byte(i) for i in range(model.get_piece_size())) and not made["model"].get("byte_fallback"):
        parts.append("its bytes of unknown characters")
    if parts:
        yield f"{name} is read without {' and '.join(parts)}, as by transformers' {class_}"
