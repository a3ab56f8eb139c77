"""Tokenizers of BART's relatives read and write texts as transformers' own do."""

import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M_100_CODES
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.registry import detect
from beamline_export.progress import Progress
from beamline_export.reference import quiet_transformers
from beamline_export.spec import ExportError
from beamline_export.testing import write_hugging_face
from beamline_server.tokenizer import load_tokenizer
from doubles.alike import assert_alike
from doubles.many_scripts import lines

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
CORPUS = list(lines(300, seed=1))


def unigram(special: Sequence[str], size: int = 800) -> list[tuple[str, float]]:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:30] * 3, trainer)
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def byte_pairs(split: Any, alphabet: Sequence[str] = (), size: int = 500) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:150], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def byte_level() -> dict[str, Any]:
    return byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.ByteLevel.alphabet())


def mbart() -> Any:
    codes = [(code, 0.0) for code in FAIRSEQ_LANGUAGE_CODES]
    return transformers.MBartTokenizer(vocab=[*unigram(SPECIAL), *codes, ("<mask>", 0.0)], src_lang="fr_XX")


def mbart50() -> Any:
    return transformers.MBart50Tokenizer(vocab=unigram(["<unk>", "<s>", "</s>"]), src_lang="de_DE")


def nllb() -> Any:
    return transformers.NllbTokenizer(**byte_pairs(pre_tokenizers.Metaspace(), size=1200), src_lang="fra_Latn")


def pegasus() -> Any:
    masks = [("<mask_1>", 0.0), ("<mask_2>", 0.0), *((f"<unk_{i}>", 0.0) for i in range(2, 103))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), *masks, ("<unk>", 0.0), *unigram(["<unk>"])[1:]]
    return transformers.PegasusTokenizer(vocab=vocabulary)


def blenderbot() -> Any:
    return transformers.BlenderbotTokenizer(**byte_level())


def mvp() -> Any:
    """As its folders have it, whose class transformers do not have any more."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**byte_level(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    "mbart": ("mbart", mbart, ["the language of sources is fr_XX"]),
    "mbart50": ("mbart", mbart50, ["the language of sources is de_DE"]),
    "nllb": ("m2m_100", nllb, ["the language of sources is fra_Latn"]),
    "pegasus": ("pegasus", pegasus, []),
    "blenderbot": ("blenderbot", blenderbot, ["tokenizer.json has no post-processor that puts special tokens"]),
    "mvp": ("mvp", mvp, []),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """A random checkpoint with a tokenizer of a few hundred pieces."""

    def make(name: str) -> Path:
        family, made, _ = TOKENIZERS[name]
        with quiet_transformers():
            tokenizer = made()
        eos, pad = tokenizer.convert_tokens_to_ids(["</s>", "<pad>"])
        ids = {"eos_token_id": eos, "pad_token_id": pad, "bos_token_id": 0, "decoder_start_token_id": eos}
        sizes = {"vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        folder = write_hugging_face(tmp_path / "checkpoint", family, {**sizes, **ids}, ids)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_those_of_transformers(name: str, write: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write(name)
    with quiet_transformers():
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    told = io.StringIO()
    bundle = export(folder, tmp_path / "bundle", ExportOptions(), Progress(told))
    ours = load_tokenizer(bundle)
    assert ours is not None
    around = bundle.manifest.model_languages().marks().around
    assert_alike(ours, theirs, len(theirs), around)
    assert all(notice in told.getvalue() for notice in TOKENIZERS[name][2])
    assert not bundle.manifest.generation_defaults.not_supported


def write_m2m_100(folder: Path, **settings: Any) -> Path:
    """A random checkpoint with a small SentencePiece model, and room for 100 language codes after its pieces."""
    folder.mkdir()
    text = [line for line in CORPUS[:30] if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "pieces"),
        vocab_size=700,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    # As in the real one, some pieces of the model are not in the vocabulary.
    pieces = [*SPECIAL, *(model.id_to_piece(i) for i in range(3, model.get_piece_size() - 20))]
    (folder / "pieces.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    tokenizer = transformers.M2M100Tokenizer(str(folder / "pieces.json"), str(folder / "pieces.model"), **settings)
    ids = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 2}
    sizes = {"vocab_size": len(pieces) + 108, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    write_hugging_face(folder, "m2m_100", {**sizes, **ids}, ids)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("language", ["fr", None])
def test_texts_of_m2m_100_are_those_of_transformers(language: str | None, tmp_path: Path) -> None:
    codes = [f"__{code}__" for code in M2M_100_CODES["m2m100"]]
    folder = write_m2m_100(tmp_path / "checkpoint", src_lang=language)
    theirs = transformers.M2M100Tokenizer.from_pretrained(folder)
    told = io.StringIO()
    bundle = export(folder, tmp_path / "bundle", ExportOptions(), Progress(told))
    assert f"the language of sources is {language or 'en'} where" in told.getvalue()
    assert not bundle.manifest.generation_defaults.not_supported
    ours = load_tokenizer(bundle)
    assert ours is not None
    languages = bundle.manifest.model_languages()
    assert sorted(languages.needed) == ["target"]
    assert len(languages.names["target"]) == 100
    size = len(json.loads((folder / "vocab.json").read_text()))
    sources = [*lines(400), ">>fra<< bonjour", "<<", ">> <<"]
    for text in sources:
        expected = theirs(text).input_ids
        assert expected[0] == size + codes.index(f"__{language or 'en'}__")
        assert ours.encode(text, languages.marks(target="de").around) == expected, text
        assert ours.decode(expected) == theirs.decode(expected[1:], skip_special_tokens=True), text
    rng = random.Random(5)
    for _ in range(100):
        ids = [rng.randrange(size) for _ in range(rng.randint(1, 30))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_an_m2m_100_tokenizer_is_whole_and_knows_its_language(tmp_path: Path) -> None:
    folder = write_m2m_100(tmp_path / "checkpoint", src_lang="de")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "src_lang": "xx"}))
    with pytest.raises(ExportError, match=r"src_lang 'xx' is not known \(known: af, am, "):
        detect(folder).read(folder)
    file.write_text(json.dumps({**settings, "language_codes": "none"}))
    with pytest.raises(ExportError, match=r"language_codes 'none' is not known \(known: m2m100, wmt21\)"):
        detect(folder).read(folder)
    (folder / "sentencepiece.bpe.model").unlink()
    with pytest.raises(ExportError, match=r"lacks sentencepiece\.bpe\.model of its tokenizer; copy both"):
        detect(folder).read(folder)


def test_a_language_that_the_file_does_not_have_is_refused(write: Callable[[str], Path]) -> None:
    folder = write("mbart")
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"fr_XX",\n  "tgt_lang"', '"ro_RO",\n  "tgt_lang"'))
    assert json.loads(file.read_text())["src_lang"] == "ro_RO"
    with pytest.raises(ExportError, match=r"src_lang 'ro_RO' is not what tokenizer\.json puts .* \(</s> and fr_XX\)"):
        detect(folder).read(folder)


def test_a_space_before_a_text_is_as_the_file_has_it(write: Callable[[str], Path]) -> None:
    folder = write("blenderbot")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_prefix_space": False}))
    ignored = detect(folder).read(folder).generation["not_supported"]
    assert ignored == {"tokenizer_config.json: add_prefix_space": "false; true is used, as in tokenizer.json"}


def test_a_request_names_the_languages_of_m2m_100_as_transformers_do(tmp_path: Path) -> None:
    folder = write_m2m_100(tmp_path / "checkpoint")
    theirs = transformers.M2M100Tokenizer.from_pretrained(folder)
    bundle = export(folder, tmp_path / "bundle", ExportOptions(), Progress(io.StringIO()))
    ours, languages = load_tokenizer(bundle), bundle.manifest.model_languages()
    assert ours is not None
    for source, target in (("fr", "en"), ("de", "zu"), ("zh", "fr")):
        theirs.src_lang = source
        marks = languages.marks(source, target)
        assert ours.encode("bonjour", marks.around) == theirs("bonjour").input_ids
        assert (marks.forced_first, marks.decoder_start) == (theirs.get_lang_id(target), None)


@pytest.mark.parametrize(
    ("name", "source", "target", "begins"),
    [
        ("mbart", "de_DE", "ro_RO", "decoder_start"),
        ("mbart50", "fr_XX", "ro_RO", "forced_first"),
        ("nllb", "deu_Latn", "zho_Hans", "forced_first"),
    ],
)
def test_a_request_names_the_languages_of_a_tokenizer_json(
    name: str, source: str, target: str, begins: str, write: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = write(name)
    with quiet_transformers():
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.src_lang = source
    ours_at = export(folder, tmp_path / "bundle", ExportOptions(), Progress(io.StringIO()))
    ours, languages = load_tokenizer(ours_at), ours_at.manifest.model_languages()
    assert ours is not None
    marks = languages.marks(source, target)
    for text in ("bonjour", "Grüße, 世界", ""):
        assert ours.encode(text, marks.around) == theirs(text, split_special_tokens=True).input_ids
    code = theirs.convert_tokens_to_ids(target)
    expected = (code, None) if begins == "decoder_start" else (None, code)
    assert (marks.decoder_start, marks.forced_first) == expected
