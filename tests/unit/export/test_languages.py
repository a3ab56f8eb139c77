"""The languages of a checkpoint: which tokens are their codes, and what an export does with texts that name none."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from beamline_export.families.registry import detect
from beamline_export.languages import default_around, opus_languages, read_languages, require_default_target
from beamline_export.spec import ExportError
from beamline_export.testing import write_hugging_face
from beamline_export.vocabularies import check_vocabularies
from beamline_server.languages import Around, Languages
from doubles.service import make_manifest

WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "fr_XX",
    "en_XX",
    "xho_Latn",
    "<mask>",
    "word",
    "__zh__",
    "__en_XX__",
    "ab_CD",
]
KNOWN = {word: number for number, word in enumerate(WORDS)}


def read(folder: Path, *special: str, marked: Any = "source_before", begins: Any = "forced_first") -> Languages | None:
    return read_languages(folder, KNOWN, special, source_marked=marked, target_begins=begins)


def test_special_tokens_that_look_like_codes_are_languages(tmp_path: Path) -> None:
    found = read(tmp_path, "<s>", "en_XX", "fr_XX", "<mask>", "word", "xho_Latn", "de_DE")
    assert found is not None
    assert {name: code.token for name, code in found.codes.items()} == {"en_XX": 5, "fr_XX": 4, "xho_Latn": 6}
    assert all(code.source and code.target for code in found.codes.values())
    assert (found.source_marked, found.target_begins, found.default_source) == ("source_before", "forced_first", None)
    assert not list(make_manifest(languages=found.model_dump()).problems())


def test_underscores_around_a_code_are_no_part_of_its_name(tmp_path: Path) -> None:
    found = read(tmp_path, "__zh__", "__en_XX__", marked="source_after", begins="decoder_start")
    assert found is not None
    assert {name: code.token for name, code in found.codes.items()} == {"zh": 9, "en_XX": 10}


@pytest.mark.parametrize("special", [(), ("<s>", "word"), ("de_DE",)])
def test_a_checkpoint_without_codes_has_no_languages(tmp_path: Path, special: tuple[str, ...]) -> None:
    assert read(tmp_path, *special) is None


@pytest.mark.parametrize(("given", "name"), [("fr_XX", "fr_XX"), ("zh", "zh"), ("__zh__", "zh"), (None, None)])
def test_the_tokenizers_source_language_is_the_default(tmp_path: Path, given: str | None, name: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"src_lang": given}))
    found = read(tmp_path, "fr_XX", "__zh__")
    assert found is not None
    assert found.default_source == name
    unmarked = read(tmp_path, "fr_XX", "__zh__", marked="none")
    assert unmarked is not None
    assert (unmarked.default_source, unmarked.codes["zh"].source, unmarked.codes["zh"].target) == (None, False, True)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("fr", r"src_lang 'fr' is no language of the tokenizer \(did you mean fr_XX\?\); correct or remove it"),
        ("klingon", "src_lang 'klingon' is no language of the tokenizer; correct or remove it"),
        (7, "src_lang must be the name of a language"),
    ],
)
def test_another_source_language_is_refused(tmp_path: Path, given: object, told: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"src_lang": given}))
    with pytest.raises(ExportError, match=told):
        read(tmp_path, "fr_XX", "en_XX")


def test_codes_of_opus_are_target_languages() -> None:
    vocabulary = {"</s>": 0, "a": 1, ">>fra<<": 2, ">>cmn_Hans<<": 3, ">><<": 4, ">>x": 5, f">>{'x' * 65}<<": 6}
    found = opus_languages(vocabulary)
    assert found is not None
    assert {name: code.token for name, code in found.codes.items()} == {"fra": 2, "cmn_Hans": 3}
    assert not any(code.source for code in found.codes.values())
    assert found.source_marked == "target_before"
    assert opus_languages({"</s>": 0, "a": 1}) is None
    assert opus_languages({">>\x1b[2Jx<<": 1, ">> <<": 2, ">>fra\r<<": 3}) is None


@pytest.mark.parametrize("codes", [{f">>{i}<<": i for i in range(4097)}, {">>fra<<": 2**40}])
def test_more_codes_than_any_model_has_are_refused_in_a_line(codes: dict[str, int]) -> None:
    with pytest.raises(ExportError, match=r"language codes with ids up to [0-9,]+, more than any model has") as told:
        opus_languages(codes)
    assert "\n" not in str(told.value)


def test_two_codes_that_would_have_one_name_keep_theirs(tmp_path: Path) -> None:
    known = {"en_XX": 5, "__en_XX__": 6}
    found = read_languages(tmp_path, known, known, source_marked="source_before", target_begins="none")
    assert found is not None
    assert {name: code.token for name, code in found.codes.items()} == {"en_XX": 5, "__en_XX__": 6}


def test_texts_of_an_export_have_the_default_language(tmp_path: Path) -> None:
    described = read(tmp_path, "fr_XX", "en_XX")
    assert described is not None
    default = {**described.model_dump(), "default_source": "fr_XX"}
    assert default_around(make_manifest(languages=default)) == Around(before=(4,))
    assert default_around(make_manifest()) == Around()
    with pytest.raises(ExportError, match=re.escape("name the one of this file as src_lang in tokenizer_config.json")):
        default_around(make_manifest(languages=described.model_dump()))


@pytest.mark.parametrize(
    ("begins", "setting"), [("forced_first", "forced_bos_token_id"), ("decoder_start", "decoder_start_token_id")]
)
def test_searches_of_an_export_have_the_default_target(tmp_path: Path, begins: str, setting: str) -> None:
    described = read(tmp_path, "fr_XX", "en_XX", begins=begins)
    assert described is not None
    tokens = {"decoder_start": 2, "eos": [2], "source_eos": 2}
    own = {"forced_bos": 4} if begins == "forced_first" else {"decoder_start": 4}
    require_default_target(make_manifest(languages=described.model_dump(), special_tokens={**tokens, **own}))
    with pytest.raises(ExportError, match=f"as {setting} in generation_config.json"):
        require_default_target(make_manifest(languages=described.model_dump(), special_tokens=tokens))


def test_a_post_processor_with_a_language_of_its_own_is_no_contradiction(tmp_path: Path) -> None:
    """As mBART's `text </s> en_XX`, whose last id is not the end of sequence."""
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    write_hugging_face(tmp_path, "bart", {"vocab_size": len(WORDS), **ids}, ids)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(KNOWN, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>", "en_XX", "fr_XX"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s> en_XX", special_tokens=[("</s>", 2), ("en_XX", 5)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    checkpoint = detect(tmp_path).read(tmp_path)
    tokens = dataclasses.replace(checkpoint.special_tokens, source_bos=None, source_eos=2)
    plain = dataclasses.replace(checkpoint, special_tokens=tokens)
    with pytest.raises(ExportError, match="is not what the post-processor"):
        check_vocabularies(plain, tmp_path)
    languages = read(tmp_path, "fr_XX", "en_XX", marked="source_after", begins="decoder_start")
    assert check_vocabularies(dataclasses.replace(plain, languages=languages), tmp_path) == []
