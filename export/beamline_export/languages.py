"""Finds the languages of a checkpoint among the tokens of its tokenizer."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from beamline_export.checkpoint import Fields, read_optional_json
from beamline_export.spec import ExportError
from beamline_export.tokenizer_config import CONFIG_FILE
from beamline_server.bounds import LONGEST_LANGUAGE, MOST_LANGUAGES, MOST_TOKENS
from beamline_server.languages import Around, Language, Languages, near_names
from beamline_server.manifest import Manifest

SourceMarked = Literal["none", "source_before", "source_after"]
TargetBegins = Literal["none", "forced_first", "decoder_start"]

_CODE = re.compile(
    r"__(?P<bare>[A-Za-z]+(?:_[A-Za-z]+)?)__"  # M2M100, PLBart: __fr__, __java__, __en_XX__
    r"|[a-z]{2,3}_[A-Z]{2}"  # mBART: fr_XX
    r"|[a-z]{3}_[A-Z][a-z]{3}"  # NLLB: fra_Latn
)
"""What a special token looks like that is the code of a language."""
_OPUS_CODE = re.compile(r">>(?P<bare>[^\s\x00-\x1f\x7f<>]+)<<")


def read_languages(
    folder: Path,
    known: Mapping[str, int],
    special: Iterable[str],
    *,
    source_marked: SourceMarked,
    target_begins: TargetBegins,
) -> Languages | None:
    """The languages of a checkpoint whose special tokens are their codes; None if it has none.

    Each can be a source and a target, as far as these are marked. Its name is the code without underscores around it:
    `__fr__` is fr, `fr_XX` and `fra_Latn` are what they are. The default source is what tokenizer_config.json names as
    `src_lang`; a default target is no more than what the checkpoint's own first token or decoder start is.

    Args:
        folder: The checkpoint.
        known: Every token of its tokenizer, with its id.
        special: Its special tokens; those that are not known, or do not look like a code, are passed over.
        source_marked: As in `Languages`.
        target_begins: As in `Languages`.

    Raises:
        ExportError: tokenizer_config.json names a source language that the tokenizer does not have.
    """
    codes: dict[str, int] = {}
    for token in special:
        if token in known and (match := _CODE.fullmatch(token)):
            name = match["bare"] or token
            codes[token if name in codes else name] = known[token]
    if not codes:
        return None
    source, target = source_marked != "none", target_begins != "none"
    entries = _entries(codes, source=source, target=target)
    return Languages(
        codes=entries,
        source_marked=source_marked,
        target_begins=target_begins,
        default_source=_default_source(folder, entries) if source else None,
    )


def _entries(codes: Mapping[str, int], *, source: bool, target: bool) -> dict[str, Language]:
    """The languages of a manifest, by name.

    Raises:
        ExportError: there are more than any model has, or their ids are beyond any vocabulary.
    """
    if len(codes) > MOST_LANGUAGES or max(codes.values()) >= MOST_TOKENS:
        raise ExportError(
            f"the tokenizer has {len(codes):,} language codes with ids up to {max(codes.values()):,}, more than any "
            f"model has ({MOST_LANGUAGES:,}, below {MOST_TOKENS:,}); copy the vocabulary of this model"
        )
    return {name: Language(token=codes[name], source=source, target=target) for name in sorted(codes)}


def _default_source(folder: Path, codes: Mapping[str, Language]) -> str | None:
    """What the tokenizer's settings name, as the name or as the token."""
    data: Mapping[str, Any] = read_optional_json(folder / CONFIG_FILE) or {}
    fields = Fields(data, str(folder / CONFIG_FILE))
    given = data.get("src_lang")
    if given is None:
        return None
    if not isinstance(given, str):
        fields.problems.append("src_lang must be the name of a language")
        fields.check()
    name = str(given)
    match = _CODE.fullmatch(name)
    name = (match["bare"] if match else None) or name
    if name not in codes:
        near = near_names(name, codes)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ExportError(
            f"{folder / CONFIG_FILE}: src_lang {given[:LONGEST_LANGUAGE]!r} is no language of the tokenizer{meant}; "
            "correct or remove it"
        )
    return name


def opus_languages(vocabulary: Mapping[str, int]) -> Languages | None:
    """The target languages of a multilingual MarianMT model: `>>fra<<` in its source vocabulary; None if it has none.

    A text can say its target language by itself, so none is needed.
    """
    codes = {match["bare"]: i for token, i in vocabulary.items() if (match := _OPUS_CODE.fullmatch(token))}
    codes = {name: number for name, number in codes.items() if len(name) <= LONGEST_LANGUAGE}
    if not codes:
        return None
    return Languages(codes=_entries(codes, source=False, target=True), source_marked="target_before")


def default_around(manifest: Manifest) -> Around:
    """What stands around a text that is given to an export, with which no language can be named.

    Raises:
        ExportError: the model needs the language of a text.
    """
    languages = manifest.model_languages()
    if "source" in languages.needed:
        raise ExportError(
            f"the model needs the language of each text; name the one of this file as src_lang in {CONFIG_FILE}, such "
            f"as {languages.names['source'][0]}"
        )
    return languages.marks().around


def require_default_target(manifest: Manifest) -> None:
    """Searches of an export begin as the model's own settings say: they have to say it.

    Raises:
        ExportError: the model needs a language to begin a target with.
    """
    languages = manifest.model_languages()
    if "target" in languages.needed:
        setting = "forced_bos_token_id" if languages.forces_first else "decoder_start_token_id"
        raise ExportError(
            f"the model needs the language of each target; give the id of the one of this file as {setting} in "
            "generation_config.json"
        )
