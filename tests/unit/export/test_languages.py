"""The languages of a checkpoint: which tokens are their codes, and what an export does with texts that name none."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from beamline_export.languages import default_around, opus_languages, read_languages
from beamline_export.spec import ExportError
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


def test_texts_of_an_export_have_the_default_language(tmp_path: Path) -> None:
    described = read(tmp_path, "fr_XX", "en_XX")
    assert described is not None
    default = {**described.model_dump(), "default_source": "fr_XX"}
    assert default_around(make_manifest(languages=default)) == Around(before=(4,))
    assert default_around(make_manifest()) == Around()
    with pytest.raises(ExportError, match=re.escape("name the one of this file as src_lang in tokenizer_config.json")):
        default_around(make_manifest(languages=described.model_dump()))
