"""A SentencePiece model that stands alone is read as transformers read it."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.registry import detect
from beamline_export.progress import Progress
from beamline_export.reference import quiet_transformers
from beamline_export.spec import ExportError
from beamline_export.testing import T5_FAMILIES, write_hugging_face
from beamline_export.vocabularies import check_vocabularies
from beamline_server.bundle import Bundle
from beamline_server.tokenizer import load_tokenizer
from doubles.alike import assert_alike
from doubles.many_scripts import lines

CORPUS = [line for line in lines(300, seed=1) if line.strip()][:40] * 3
PADDED = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
FAIRSEQ, T5 = "sentencepiece.bpe.model", "spiece.model"
FAIRSEQ_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def train(file: Path, **options: Any) -> int:
    """Write a small model; its number of pieces."""
    content = io.BytesIO()
    sizes = {"vocab_size": 900, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=content, **{**sizes, **options}
    )
    file.write_bytes(content.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_file=str(file)).get_piece_size())


def write(
    folder: Path, family: str, file: str, settings: Mapping[str, Any], more: int, options: Mapping[str, Any]
) -> Path:
    """A random checkpoint with a SentencePiece model alone, `more` ids behind its pieces, and these settings."""
    folder.mkdir()
    size = train(folder / file, **options) + more
    ids = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0} if file == T5 else FAIRSEQ_IDS
    sizes = {"num_layers": 1} if family in T5_FAMILIES else {"encoder_layers": 1, "decoder_layers": 1}
    write_hugging_face(folder, family, {"vocab_size": size, "d_model": 16, **sizes, **ids}, ids)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def nllb_settings(pieces: int) -> dict[str, Any]:
    """As slow tokenizers of transformers 4 saved them: ids of codes, and of <mask> behind them."""
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    numbers = {**dict(enumerate(first)), **{pieces + 1 + i: code for i, code in enumerate([*NLLB_CODES, "<mask>"])}}
    how = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": token, **how, "lstrip": token == "<mask>"} for i, token in numbers.items()}
    return {"tokenizer_class": "NllbTokenizer", "src_lang": "fra_Latn", "added_tokens_decoder": added}


MODELS: dict[str, tuple[str, str, Mapping[str, Any], int, Mapping[str, Any]]] = {
    "mbart": ("mbart", FAIRSEQ, {"src_lang": "fr_XX"}, 27, {}),
    "mbart50": ("mbart", FAIRSEQ, {"tokenizer_class": "MBart50TokenizerFast", "src_lang": "de_DE"}, 54, {}),
    "plbart": ("plbart", FAIRSEQ, {"src_lang": "java"}, 5, {}),
    "plbart-plain": ("plbart", FAIRSEQ, {"clean_up_tokenization_spaces": False}, 5, {"model_type": "bpe"}),
    "plbart-multi": ("plbart", FAIRSEQ, {"language_codes": "multi"}, 8, {"normalization_rule_name": "identity"}),
    "t5": ("t5", T5, {}, 100, PADDED),
    "t5-own": ("t5", T5, {"extra_ids": 7, "clean_up_tokenization_spaces": True}, 7, PADDED),
    "mt5": ("mt5", T5, {"extra_ids": 0}, 0, {**PADDED, "byte_fallback": True}),
    "t5-words": ("t5", T5, {}, 100, {**PADDED, "user_defined_symbols": ["the cat", "▁x"]}),
    "pegasus": ("pegasus", T5, {}, 103, PADDED),
    "pegasus-offset": ("pegasus", T5, {"offset": 5}, 5, PADDED),
}


def exported(folder: Path) -> tuple[Bundle, str]:
    told = io.StringIO()
    bundle = export(folder, folder.parent / "bundle", ExportOptions(), Progress(told))
    return bundle, told.getvalue()


def by_transformers(folder: Path) -> Any:
    with quiet_transformers():
        return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, file, settings, more, options = MODELS[name]
    folder = write(tmp_path / "checkpoint", family, file, settings, more, options)
    theirs = by_transformers(folder)
    bundle, _ = exported(folder)
    assert bundle.manifest.dimensions.target_vocabulary == len(theirs)
    ours = load_tokenizer(bundle)
    assert ours is not None
    assert_alike(ours, theirs, len(theirs), bundle.manifest.model_languages().marks().around)
    assert not bundle.manifest.generation_defaults.not_supported


def test_texts_of_nllb_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", "m2m_100", FAIRSEQ, {}, 2 + len(NLLB_CODES), {"model_type": "bpe"})
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / FAIRSEQ)).get_piece_size()
    file = folder / "tokenizer_config.json"
    settings = nllb_settings(pieces)
    file.write_text(json.dumps(settings))
    theirs = by_transformers(folder)
    assert theirs.convert_tokens_to_ids(["ace_Arab", "<mask>"]) == [pieces + 1, pieces + 1 + len(NLLB_CODES)]
    bundle, told = exported(folder)
    assert "the language of sources is fra_Latn" in told
    ours, languages = load_tokenizer(bundle), bundle.manifest.model_languages()
    assert ours is not None
    assert_alike(ours, theirs, len(theirs), languages.marks().around)
    theirs.src_lang = "deu_Latn"
    marks = languages.marks("deu_Latn", "zul_Latn")
    assert ours.encode("Guten Tag", marks.around) == theirs("Guten Tag").input_ids
    assert marks.forced_first == theirs.convert_tokens_to_ids("zul_Latn")
    # Without ids, transformers put <mask> where the first code was in training.
    without = {key: value for key, value in settings.items() if key != "added_tokens_decoder"}
    for given in (without, {**without, "additional_special_tokens": NLLB_CODES}):
        file.write_text(json.dumps(given))
        with pytest.raises(ExportError, match=r"transformers 5 give them other ids than NLLB was trained with"):
            detect(folder).read(folder)


def notices(folder: Path) -> Sequence[str]:
    checkpoint = detect(folder).read(folder)
    return [*checkpoint.notices, *check_vocabularies(checkpoint, folder)]


def test_what_transformers_leave_out_of_a_model_is_told(tmp_path: Path) -> None:
    mbart = write(tmp_path / "mbart", "mbart", FAIRSEQ, {}, 27, {"byte_fallback": True})
    left_out = "its normalization of characters and its bytes of unknown characters"
    assert f"{FAIRSEQ} is read without {left_out}, as by transformers' MBartTokenizer" in notices(mbart)
    mt5 = write(tmp_path / "mt5", "mt5", T5, {"extra_ids": 0}, 0, {**PADDED, "byte_fallback": True})
    assert any("is read without its bytes of unknown characters, as" in notice for notice in notices(mt5))
    plain = write(tmp_path / "plain", "mbart", FAIRSEQ, {}, 27, {"normalization_rule_name": "identity"})
    assert not any("is read without" in notice for notice in notices(plain))
    t5 = write(tmp_path / "t5", "t5", T5, {}, 100, PADDED)
    assert not any("is read without" in notice for notice in notices(t5))


@pytest.mark.parametrize(
    ("family", "file", "class_", "known"),
    [
        ("mbart", FAIRSEQ, "BarthezTokenizer", "MBartTokenizer, MBart50Tokenizer"),
        ("umt5", T5, "T5Tokenizer", "none"),
        ("mt5", T5, "TokenizersBackend", "T5Tokenizer"),
        ("pegasus", T5, "XLNetTokenizerFast", "PegasusTokenizer"),
    ],
)
def test_classes_that_are_not_known_are_refused(
    family: str, file: str, class_: str, known: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "checkpoint", family, file, {"tokenizer_class": class_}, 0, PADDED)
    with pytest.raises(ExportError, match=f"{known} can be read here, not {class_.removesuffix('Fast')}; write"):
        detect(folder).read(folder)


def test_settings_cannot_stand_for_the_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", "t5", T5, {}, 100, PADDED)
    usual = detect(folder).read(folder).tokenizer_contents
    settings = {"vocab": [["<pad>", 0.0]], "unk_id": 3, "vocab_file": "/nowhere", "tokenizer_file": "/nowhere"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    read = detect(folder).read(folder)
    assert read.tokenizer_contents == usual
    ignored = read.generation["not_supported"]
    assert isinstance(ignored, dict)
    assert set(ignored) == {f"tokenizer_config.json: {name}" for name in ("vocab", "unk_id")}


@pytest.mark.parametrize("family", ["mbart", "plbart", "pegasus", "t5"])
def test_files_that_are_no_model_are_refused(family: str, tmp_path: Path) -> None:
    file = T5 if family in ("t5", "pegasus") else FAIRSEQ
    folder = write(tmp_path / "checkpoint", family, file, {}, 0, PADDED)
    for content in (b"", b"nothing of the kind", (folder / file).read_bytes()[:1000]):
        (folder / file).write_bytes(content)
        with pytest.raises(ExportError, match=f"{file} cannot be read as a tokenizer .*; download it again"):
            detect(folder).read(folder)


def test_settings_that_transformers_refuse_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", "pegasus", T5, {"offset": "many"}, 103, PADDED)
    with pytest.raises(ExportError, match=r"transformers' PegasusTokenizer cannot be made of .*; correct the settings"):
        detect(folder).read(folder)


@pytest.fixture
def plbart(tmp_path: Path) -> Callable[..., Path]:
    def make(options: Mapping[str, Any] = {}, **settings: Any) -> Path:
        return write(tmp_path / "checkpoint", "plbart", FAIRSEQ, settings, 5, options)

    return make


def test_languages_of_plbart_are_named_as_in_transformers(plbart: Callable[..., Path]) -> None:
    folder = plbart(src_lang="java")
    python = sentencepiece.SentencePieceProcessor(model_file=str(folder / FAIRSEQ)).get_piece_size() + 2
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "decoder_start_token_id": python}))
    theirs = by_transformers(folder)
    bundle, told = exported(folder)
    assert "the language of sources is java where a request names none" in told
    ours, languages = load_tokenizer(bundle), bundle.manifest.model_languages()
    assert ours is not None
    assert languages.names == dict.fromkeys(("source", "target"), ("en_XX", "java", "python"))
    assert languages.default == {"source": "java", "target": "python"}
    for source, target in (("en_XX", "java"), ("python", "en_XX")):
        theirs.src_lang = source
        marks = languages.marks(source, target)
        assert ours.encode("def f(x):", marks.around) == theirs("def f(x):").input_ids
        assert marks.decoder_start == theirs.lang_code_to_id[f"__{target}__"]
    assert ours.decode([python, 5, 6]) == theirs.decode([5, 6], skip_special_tokens=True)


def test_a_plbart_that_begins_with_no_language_names_none_for_targets(plbart: Callable[..., Path]) -> None:
    checkpoint = detect(folder := plbart()).read(folder)
    assert checkpoint.languages is None
    assert any("no language stands behind a source" in notice for notice in checkpoint.notices)
    assert any("which begin with decoder_start_token_id 2, no code" in notice for notice in checkpoint.notices)


@pytest.mark.parametrize(
    ("options", "settings", "told"),
    [
        ({}, {"src_lang": "cobol"}, r"src_lang 'cobol' is not known \(known: java, python, en_XX\)"),
        ({}, {"language_codes": "all"}, r"language_codes 'all' is not known \(known: base, multi\)"),
        ({}, {"eos_token": "<end>"}, "eos_token '<end>' is no piece of"),
        (PADDED, {}, "begins with <pad>, </s>, <unk>, not with <unk>, <s>, </s>"),
        ({"byte_fallback": True}, {}, "has pieces of bytes, which PLBart's do not have"),
    ],
)
def test_a_plbart_tokenizer_that_is_none_is_refused(
    options: Mapping[str, Any], settings: Mapping[str, Any], told: str, plbart: Callable[..., Path]
) -> None:
    folder = plbart(options, **settings)
    with pytest.raises(ExportError, match=told):
        detect(folder).read(folder)


def test_settings_of_plbart_without_effect_are_told(plbart: Callable[..., Path]) -> None:
    folder = plbart(legacy=False, sp_model_kwargs={"enable_sampling": True}, tokenizer_class="XLNetTokenizer")
    ignored = detect(folder).read(folder).generation["not_supported"]
    assert isinstance(ignored, dict)
    names = ("legacy", "sp_model_kwargs", "tokenizer_class")
    assert set(ignored) == {f"tokenizer_config.json: {name}" for name in names}
