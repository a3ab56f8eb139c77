"""Every setting of the installed transformers has its place: read, neutral, or named to the user."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from transformers.tokenization_python import PreTrainedTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from beamline_export.known_settings import (
    ALIASES,
    ANY,
    CONFIG,
    GENERATION,
    READ,
    T5_ALIASES,
    TOKENIZER,
    contradictions,
    without_effect,
)
from beamline_export.testing import DECODER_ONLY_FAMILIES, HUGGING_FACE_CLASSES, T5_FAMILIES

CONFIG_CLASSES = {family: getattr(transformers, name).config_class for family, name in HUGGING_FACE_CLASSES.items()}
_T5_TOKENIZERS = [
    transformers.T5Tokenizer,
    transformers.ByT5Tokenizer,
    transformers.PreTrainedTokenizerFast,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
]
TOKENIZER_CLASSES = {
    "marian": [transformers.MarianTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase],
    "bart": [
        transformers.BartTokenizer,
        transformers.BartTokenizerFast,
        transformers.PreTrainedTokenizerFast,
        PreTrainedTokenizerBase,
    ],
    "m2m_100": [transformers.M2M100Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase],
    "blenderbot-small": [transformers.BlenderbotSmallTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase],
    "fsmt": [transformers.FSMTTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase],
    "plbart": [transformers.PLBartTokenizer, SentencePieceBackend, PreTrainedTokenizer, PreTrainedTokenizerBase],
    "bart_relatives": [
        transformers.MBartTokenizer,
        transformers.MBart50Tokenizer,
        transformers.NllbTokenizer,
        transformers.PegasusTokenizer,
        transformers.BlenderbotTokenizer,
        transformers.PreTrainedTokenizerFast,
        PreTrainedTokenizerBase,
    ],
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5_TOKENIZERS),
    "decoder_only": [
        transformers.GPT2Tokenizer,
        transformers.GPTNeoXTokenizer,
        transformers.LlamaTokenizer,
        transformers.Qwen2Tokenizer,
        transformers.PreTrainedTokenizerFast,
        PreTrainedTokenizerBase,
    ],
}
EVERY = [GENERATION, *CONFIG.values(), *TOKENIZER.values()]


def generation_settings() -> set[str]:
    settings = transformers.GenerationConfig()
    runtime = {name for name in vars(settings) if name.endswith("_tensor") or name == "_original_object_hash"}
    return {*vars(settings), *settings._get_default_generation_params()} - runtime


def config_fields(config: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def tokenizer_settings(classes: list[type[Any]]) -> Iterator[str]:
    """What a tokenizer's class takes: its named arguments, and what it looks up among the others."""
    for cls in classes:
        own = cls.__init__
        parameters = inspect.signature(own).parameters.values()
        yield from (p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self")
        yield from re.findall(r"kwargs\.(?:pop|get|setdefault)\(\s*\"(\w+)\"", inspect.getsource(own))
    yield from PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES


def test_every_generation_setting_has_its_place() -> None:
    settings = generation_settings()
    assert len(settings) > 60
    assert settings - set(GENERATION) == set()


@pytest.mark.parametrize("family", CONFIG)
def test_every_config_field_has_its_place(family: str) -> None:
    fields = config_fields(CONFIG_CLASSES[family])
    assert "architectures" in fields
    assert fields - set(CONFIG[family]) == set()
    # Of an initialization, and what the family refuses where it has another value.
    more = {"plbart": {"initializer_range": "init_std"}, "fsmt": {"vocab_size": "tgt_vocab_size"}}.get(family, {})
    aliases = T5_ALIASES if family in T5_FAMILIES else {**ALIASES, **more}
    if family in DECODER_ONLY_FAMILIES:
        aliases = dict(DECODER_ONLY_FAMILIES[family].aliases)
    assert CONFIG_CLASSES[family].attribute_map == aliases


@pytest.mark.parametrize("family", TOKENIZER)
def test_every_tokenizer_setting_has_its_place(family: str) -> None:
    settings = set(tokenizer_settings(TOKENIZER_CLASSES[family]))
    assert {"clean_up_tokenization_spaces", "eos_token", "split_special_tokens", "model_max_length"} < settings
    assert settings - set(TOKENIZER[family]) == set()


@pytest.mark.parametrize("known", EVERY)
def test_places_are_of_three_kinds(known: dict[str, object]) -> None:
    assert all(effect in (READ, ANY) or isinstance(effect, tuple) for effect in known.values())


def test_defaults_of_transformers_change_nothing() -> None:
    """What is written out in full by a `save_pretrained` is not told to anybody."""
    defaults = transformers.GenerationConfig()._get_default_generation_params()
    assert without_effect(defaults, GENERATION, name_unknown=True) == {}
    for family, config in CONFIG_CLASSES.items():
        assert without_effect(config().to_dict(), CONFIG[family], name_unknown=False) == {}


@pytest.mark.parametrize("family", CONFIG)
def test_what_changes_a_model_and_is_not_read_is_named(family: str) -> None:
    alone = family in DECODER_ONLY_FAMILIES
    config = {"is_decoder": True, "is_encoder_decoder": alone, "per_layer_config": {"0": {}}, "dropout": 0.5}
    named = {"is_encoder_decoder", "per_layer_config", *([] if alone else ["is_decoder"])}
    assert without_effect(config, CONFIG[family], name_unknown=False).keys() == named


def test_a_field_under_two_names_has_one_value() -> None:
    assert contradictions({"hidden_size": 8, "d_model": 8, "num_hidden_layers": 2}) == []
    [problem] = contradictions({"num_hidden_layers": 6, "encoder_layers": 12})
    assert problem.startswith("num_hidden_layers 6 and encoder_layers 12 are the same field")
