"""Reads what stands beside a Hugging Face tokenizer: tokenizer_config.json and special_tokens_map.json."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beamline_export.checkpoint import Fields, read_optional_json
from beamline_export.known_settings import READ, TOKENIZER, without_effect
from beamline_export.spec import ExportError

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("separate_vocabs", "legacy_behaviour", "add_prefix_space", "clean_up_tokenization_spaces")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What a tokenizer's settings say, as far as they change an answer.

    Attributes:
        named: Special tokens by what they are for, `eos_token` for one.
        extra: Further special tokens.
        added: Words that transformers look for in a text before they split it; special tokens are not among them.
        flags: Settings that are true or false, as far as they are given.
        tokenizer_class: The class in transformers, if it is named.
        source_language: The code of the language that sources are in, if it is named.
        without_effect: Settings that would change answers and do not, with their values.
    """

    named: Mapping[str, str]
    extra: frozenset[str]
    added: frozenset[str]
    flags: Mapping[str, bool]
    tokenizer_class: str | None
    source_language: str | None
    without_effect: Mapping[str, str]

    def token(self, name: str, default: str) -> str:
        """A named special token, or what it is by default."""
        return self.named.get(name, default)

    def special(self, defaults: Mapping[str, str]) -> frozenset[str]:
        """All special tokens, with these where the settings name none."""
        return frozenset({**defaults, **self.named}.values()) | self.extra


def read_tokenizer_config(folder: Path, family: str) -> TokenizerConfig:
    """The settings of a folder's tokenizer, as transformers put them together; empty ones if it has none.

    Raises:
        ExportError: a file cannot be read, or a setting is of the wrong kind.
    """
    data = read_optional_json(folder / CONFIG_FILE) or {}
    if "added_tokens_decoder" not in data:  # which has been there ever since the map does not count any more
        data |= read_optional_json(folder / _MAP_FILE) or {}
    fields = Fields(data, str(folder / CONFIG_FILE))
    for name in _FLAGS:
        fields.flag(name, False)
    fields.check()
    try:
        return _read(folder, data, family)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{folder / CONFIG_FILE} holds tokens that are none ({error}); download it again") from error


def _read(folder: Path, data: Mapping[str, Any], family: str) -> TokenizerConfig:
    beside = list((data.get("added_tokens_decoder") or {}).values())
    words = {_text(token) for token in beside if not token.get("special")}
    models_own = {name: value for name, value in data.items() if _is_models_own(name, value)}
    models_own |= data.get("model_specific_special_tokens") or {}
    extra: Any = next((data[name] for name in _EXTRA if data.get(name)), [])
    special = [*_texts(extra), *_texts(models_own), *(_text(token) for token in beside if token.get("special"))]
    if not beside:  # as transformers kept them before
        words = set(read_optional_json(folder / "added_tokens.json") or {}) - set(special)
    return TokenizerConfig(
        named={name: _text(data[name]) for name in _NAMED if data.get(name) is not None},
        extra=frozenset(special),
        added=frozenset(words) - {_text(data[name]) for name in _NAMED if data.get(name) is not None},
        flags={name: value for name, value in data.items() if isinstance(value, bool)},
        tokenizer_class=tokenizer_class(data, CONFIG_FILE),
        source_language=None if data.get("src_lang") is None else _text(data["src_lang"]),
        without_effect=without_effect(
            data, {**TOKENIZER[family], **dict.fromkeys(models_own, READ)}, name_unknown=True
        ),
    )


def tokenizer_class(data: Mapping[str, Any], file: str) -> str | None:
    """The class in transformers that a config names, if it names one.

    Raises:
        ExportError: it is no name.
    """
    name = data.get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise ExportError(f"{file}: tokenizer_class must be the name of a class, not {json.dumps(name)[:60]}")
    return name


def _is_models_own(name: str, value: object) -> bool:
    """Whether a setting is a special token that this model alone has; `add_bos_token`, for one, says yes or no."""
    return name.endswith("_token") and name not in _NAMED and isinstance(value, str | Mapping)


def _texts(tokens: Any) -> Iterator[str]:
    if isinstance(tokens, str):
        raise TypeError(f"{tokens[:60]!r} is no list of tokens")
    return (_text(token) for token in (tokens.values() if isinstance(tokens, Mapping) else tokens) if token is not None)


def _text(token: Any) -> str:
    """A token's text; it is given alone, or with how it is matched."""
    text = token["content"] if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise TypeError(f"{json.dumps(token)[:60]} is no token")
    return text
