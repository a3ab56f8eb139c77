"""What checkpoints of other toolkits share: a small config.json of ours beside weights and settings of theirs."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from beamline_export.checkpoint import MOST_POSITIONS, Fields, check_file
from beamline_export.families.search_settings import read_settings
from beamline_export.generation import Generation, read_generation
from beamline_export.renamer import Renamer
from beamline_export.spec import ExportError, SpecialTokenIds
from beamline_export.tokenizer_files import TokenizerFiles
from beamline_export.tokenizer_json import unreadable_tokenizer
from beamline_server.token_ids import default_special_ids, read_vocabulary

DEFAULT_POSITIONS = 512
"""Of toolkits that compute positions as far as they are asked for."""
DEFAULT_NEW_TOKENS = 200
_LENGTHS = ("max_length", "max_new_tokens")


def check_all(*sources: Fields) -> None:
    """Raise ExportError with the problems of all sources, if any."""
    told = []
    for fields in sources:
        try:
            fields.check()
        except ExportError as error:
            told.append(str(error))
    if told:
        raise ExportError("; ".join(told))


def read_positions(fields: Fields) -> int:
    """`max_positions` of config.json."""
    return fields.integer("max_positions", DEFAULT_POSITIONS, most=MOST_POSITIONS)


def read_search(
    fields: Fields,
    data: Mapping[str, Any],
    ids: Mapping[str, object],
    *others: Fields,
    max_positions: int,
    banned: Collection[int] = (),
) -> Generation:
    """Search settings and special tokens of config.json, whose own other keys have been asked for.

    Args:
        fields: Reads config.json.
        data: The same.
        ids: Settings that hold where config.json has none: the toolkit's special tokens.
        others: Readers of the toolkit's own settings, whose problems are told, too.
        max_positions: Of the target.
        banned: Ids that the toolkit's own search never gives.

    Raises:
        ExportError: with all problems that were found.
    """
    own = {name: value for name, value in read_settings(fields, data, ("model_type",)).items() if value is not None}
    check_all(fields, *others)
    lengths = {} if any(name in own for name in _LENGTHS) else {"max_new_tokens": DEFAULT_NEW_TOKENS}
    # Whoever says how short an output may be says it by either name.
    ids = {name: value for name, value in ids.items() if not (name == "min_new_tokens" and "min_length" in own)}
    found = read_generation({**ids, **lengths, **own}, None, max_positions=max_positions)
    tokens = dataclasses.replace(found.tokens, banned=tuple(sorted({*found.tokens.banned, *banned})))
    return dataclasses.replace(found, tokens=tokens)


def rows(names: Renamer, table: str) -> int:
    """How many rows a table has that was taken; 1 of one that is missing, which `check_weights` reports."""
    found = names.weights.get(table)
    return len(found) if found is not None and found.ndim == 2 and len(found) else 1


def take_product(names: Renamer, canonical: str, weight: str, bias: str | None) -> None:
    """A product that is kept as x @ weight + bias, (in, out); without a bias it is zero."""
    names.take(f"{canonical}.weight", weight)
    taken = names.weights.get(f"{canonical}.weight")
    if taken is not None:
        names.weights[f"{canonical}.weight"] = np.ascontiguousarray(taken.T)
    if bias is not None:
        take_vector(names, f"{canonical}.bias", bias)
    elif taken is not None:
        names.weights[f"{canonical}.bias"] = np.zeros(taken.shape[-1:], np.float32)


def take_vector(names: Renamer, canonical: str, *candidates: str) -> None:
    """A vector that may be kept as (1, N)."""
    names.take(canonical, *candidates)
    taken = names.weights.get(canonical)
    if taken is not None and taken.ndim == 2 and len(taken) == 1:
        names.weights[canonical] = taken[0]


def read_pieces(file: Path) -> dict[str, int]:
    """The object of pieces and ids in a JSON file.

    Raises:
        ExportError: it holds none.
    """
    check_file(file)
    try:
        return read_vocabulary(file.name, file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable_tokenizer(file, error) from error


def piece_tokenizer(
    models: tuple[str, str],
    vocabularies: tuple[Mapping[str, int], Mapping[str, int]],
    origin: str,
    tokens: SpecialTokenIds,
    silent: Collection[int],
) -> tuple[TokenizerFiles, dict[str, bytes]]:
    """SentencePiece models whose pieces are looked up in vocabularies; the latter as files of the bundle.

    Args:
        models: Names of the source's and the target's model in the folder.
        vocabularies: Piece -> id, of source and target.
        origin: What the vocabularies are from, for messages.
        tokens: Special tokens, with what stands around a source.
        silent: Ids that leave no trace in text, beside the special tokens.

    Raises:
        ExportError: the source's vocabulary has no word for what it does not know.
    """
    contents = vocabulary_files(vocabularies, origin)
    target = vocabularies[1]
    default = default_special_ids(dataclasses.asdict(tokens))
    default |= {target["<unk>"]} if "<unk>" in target else set()
    settings = {} if default >= set(silent) else {"special": sorted(default | set(silent))}
    files = dict(zip(("source.spm", "target.spm"), models, strict=True))
    return TokenizerFiles("marian", files, settings, tokens), contents


def vocabulary_files(vocabularies: tuple[Mapping[str, int], Mapping[str, int]], origin: str) -> dict[str, bytes]:
    """Vocabularies of source and target as files of the bundle; errors and `origin` are those of `piece_tokenizer`."""
    source, target = vocabularies
    if "<unk>" not in source:
        raise ExportError(f"{origin} has no '<unk>'; copy the vocabulary of this model")
    contents = {"vocab.json": _as_json(source)}
    if target != source:
        contents["target_vocab.json"] = _as_json(target)
    return contents


def _as_json(vocabulary: Mapping[str, int]) -> bytes:
    return json.dumps(vocabulary, ensure_ascii=False).encode()


def find_models(folder: Path, *shared: str) -> tuple[str, str] | None:
    """Names of the SentencePiece models of both sides: source.spm and target.spm, or one of the `shared` for both.

    Raises:
        ExportError: one side's is there alone.
    """
    own = [name for name in ("source.spm", "target.spm") if (folder / name).exists()]
    if len(own) == 1:
        raise ExportError(f"{folder} holds only one of source.spm and target.spm; copy both, even if they are the same")
    found = next((name for name in shared if (folder / name).exists()), None)
    models = ("source.spm", "target.spm") if own else (found, found) if found else None
    for name in models or ():
        check_file(folder / name)
    return models
