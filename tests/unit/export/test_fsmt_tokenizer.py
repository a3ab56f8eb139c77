"""FSMT's own tokenizer reads and writes texts as in transformers."""

import io
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sacremoses
import transformers

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.registry import detect
from beamline_export.progress import Progress
from beamline_export.reference import quiet_transformers
from beamline_export.spec import ExportError
from beamline_export.testing import write_hugging_face
from beamline_server.bundle import Bundle, BundleError
from beamline_server.moses import MOST_CHARACTERS, MosesSettings, MosesSubwords
from beamline_server.subwords import Merges
from beamline_server.tokenizer import Tokenizer, load_tokenizer
from beamline_server.word_pieces import EndMarkedPieces
from beamline_server.word_tokenizer import UnreadableText
from doubles.alike import TEXTS, assert_alike
from doubles.byte_pairs import learn
from doubles.many_scripts import lines

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WRITTEN = ["@-@", "&apos;", "&quot;", "&apos;s", "l&apos;", "s", "$", "(", ")", ",", ".", "?", ":", "„", "“", "12", "3"]
WRITTEN += ["&amp;", "&lt;", "&#124;", "世界", "世", "-", "li", "EU:", "ssa"]
"""Words that a detokenizer has rules for."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A random checkpoint with merges of a few lines, and with these settings of its tokenizer."""

    def make(languages: object = ("en", "de"), **settings: Any) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        merges, words = learn(lines(150, seed=3), 150)
        merges += [("@", "-"), ("@-", "@</w>"), ("&", "a"), ("&a", "p"), ("&ap", "os"), ("&apos", ";</w>"), ("o", "s")]
        parts = sorted({part for symbols in words for part in symbols} | {f"{word}</w>" for word in WRITTEN})
        known = {"vocab-src.json": parts[::2] + parts[1::4], "vocab-tgt.json": [*parts[::-1], "@", "@-", "@-@", "&"]}
        for name, tokens in known.items():
            (folder / name).write_text(json.dumps({token: i for i, token in enumerate([*SPECIAL, *tokens])}))
        (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges))
        sizes = {"src_vocab_size": len(known["vocab-src.json"]) + 4, "tgt_vocab_size": len(known["vocab-tgt.json"]) + 4}
        sizes |= {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
        write_hugging_face(folder, "fsmt", {**sizes, **ids, "vocab_size": sizes["tgt_vocab_size"]}, ids)
        told = {"langs": languages, **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
        return folder

    return make


def exported(folder: Path) -> Bundle:
    return export(folder, folder.parent / "bundle", ExportOptions(), Progress(io.StringIO()))


def loaded(bundle: Bundle) -> Tokenizer:
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(
    ("languages", "settings"),
    [
        (["en", "ru"], {}),
        (["fr", "en"], {"do_lower_case": True}),
        (["de", "it"], {"clean_up_tokenization_spaces": True}),
        (["ko", "fi"], {}),
        (["it", "cs"], {}),
    ],
)
def test_texts_are_those_of_transformers(
    languages: list[str], settings: dict[str, Any], write: Callable[..., Path]
) -> None:
    folder = write(languages, **settings)
    size = len(json.loads((folder / "vocab-tgt.json").read_text()))
    with quiet_transformers():
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, transformers.FSMTTokenizer)
    # As transformers read the other direction, they would read what a target begins with.
    target = transformers.FSMTTokenizer(
        languages[::-1],
        str(folder / "vocab-tgt.json"),
        str(folder / "vocab-src.json"),
        str(folder / "merges.txt"),
        do_lower_case=settings.get("do_lower_case", False),
    )
    bundle = exported(folder)
    assert not bundle.manifest.generation_defaults.not_supported
    ours = loaded(bundle)
    assert_alike(ours, theirs, size, target=target)
    for text in (
        "<s> a </s>",
        "a.b. c. d.",
        "No. 5, p. a. Mr. X.",
        "x-y—z a@-@b @-@ c",
        "l'été d'«a», \"b.\" c",
        "a\nb\tc",
    ):
        expected = theirs(text, split_special_tokens=True).input_ids
        assert ours.encode(text) == expected, text


@pytest.mark.parametrize("language", ["en", "fr", "it", "ga", "cs", "fi", "de", "ko", "zh"])
def test_what_is_settled_stays(language: str) -> None:
    """Whatever tokens follow; and all but the last word is settled, but for Czech numbers, which wait for the end."""
    subwords = MosesSubwords(
        language, MosesSettings(source_language="en", target_language=language), EndMarkedPieces(Merges([]))
    )
    rng = random.Random(5)
    tokens = [f"{word}</w>" for word in WRITTEN] * 2 + ["@", "@-", "@-@", "&", "'", "a", "s", "1", ";", "apos"]
    for _ in range(1500):
        chosen = [rng.choice(tokens) for _ in range(rng.randint(1, 14))]
        whole, shown = subwords.join(chosen), ""
        for end in range(len(chosen) + 1):
            settled = subwords.settled(chosen[:end])
            assert settled.startswith(shown), (chosen, end)
            shown = settled
            last = [rng.choice(tokens) for _ in range(rng.randint(0, 3))]
            assert subwords.join([*chosen[:end], *last]).startswith(settled), (chosen[:end], last)
        assert whole.startswith(shown)
    assert subwords.settled(["one</w>", "two</w>", "thr"]) == "one two"
    assert subwords.settled(["one</w>", "two</w>"]) == "one"
    assert subwords.settled(["one</w>", "two</w>", "@"]) == "one"
    assert subwords.settled(["one</w>", "two</w>", "@x"]) == "one two"
    assert subwords.settled(["a</w>", "b</w>", "3</w>", "c</w>", "d"]) == ("a b" if language == "cs" else "a b 3 c")


def test_words_are_those_of_the_library() -> None:
    """Of which a part is replaced by one that is faster."""
    for language, texts in (("en", TEXTS[::4]), ("ja", TEXTS[::20])):
        theirs = sacremoses.MosesTokenizer(lang=language)
        settings = MosesSettings(source_language=language, target_language="en")
        ours = MosesSubwords(language, settings, EndMarkedPieces(Merges([])))
        for text in (*texts, "a.b. c", "é.è. É", "1.2. a", "X. y", "X. Y", "世.界. 世", "ア. カ", "..a. b"):
            words = theirs.tokenize(text, aggressive_dash_splits=True, return_str=False, escape=True)
            assert ours.split(text) == [t for word in words for t in (*word[:-1], f"{word[-1]}</w>")], text


def test_an_expected_output_of_such_a_text_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "expected.jsonl"
    file.write_text(json.dumps({"source": "." * 20_001, "target": "a"}) + "\n")
    with pytest.raises(ExportError, match="line 1: the source has 20001 characters; expected at most 20000"):
        export(write(), tmp_path / "bundle", ExportOptions(expect=file), Progress(io.StringIO()))


@pytest.mark.parametrize("language", ["de", "es", "fr"])
def test_dots_before_quotes_are_those_of_the_library(language: str) -> None:
    theirs = sacremoses.MosesPunctNormalizer(lang=language, pre_replace_unicode_punct=True)
    settings = MosesSettings(source_language=language, target_language="en", normalize=True, escape=False)
    ours = MosesSubwords(language, settings, EndMarkedPieces(Merges([])))
    plain = sacremoses.MosesTokenizer(lang=language)
    rng = random.Random(2)
    for _ in range(3000):
        text = "".join(rng.choice('..."" <,a') for _ in range(rng.randint(1, 14)))
        words = plain.tokenize(theirs.normalize(text), aggressive_dash_splits=True, return_str=False, escape=False)
        assert ours.split(text) == [t for word in words for t in (*word[:-1], f"{word[-1]}</w>")], text


def test_a_czech_text_that_the_library_fails_at_has_its_words() -> None:
    settings = MosesSettings(source_language="en", target_language="cs")
    subwords = MosesSubwords("cs", settings, EndMarkedPieces(Merges([])))
    words = ["l&apos;", "-", "li", "a"]
    with pytest.raises(TypeError):
        sacremoses.MosesDetokenizer(lang="cs").detokenize(words)
    assert subwords.join([f"{word}</w>" for word in words]) == "l' - li a"


def test_a_text_that_would_take_long_is_refused(write: Callable[..., Path]) -> None:
    ours = loaded(exported(write(("fr", "de"))))
    for encode in (ours.encode, ours.encode_target):
        with pytest.raises(UnreadableText, match=r"has 20001 characters; expected at most 20000, .* by sentence"):
            encode("." * 20_001)
    units = (".", "a.b. ", "No. 1 ", '.."<', "&")
    longest = [(unit * MOST_CHARACTERS)[:MOST_CHARACTERS] for unit in units]
    began = time.process_time()
    for text in longest:
        assert ours.encode(text)
    # 0.5 s; with the library's own rule for dots, or its own sets, seven times as much or more.
    assert time.process_time() - began < 3


def test_a_bundle_tells_what_it_needs(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported(write())
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(BundleError, match=r"needs the package sacremoses, which is not installed; .*\[moses\]'$"):
        load_tokenizer(bundle)


def test_an_export_tells_what_it_needs(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write()
    monkeypatch.setattr("beamline_export.moses_files.find_spec", lambda _: None)
    with pytest.raises(ExportError, match=r"need sacremoses; pip install 'beamline-serving\[moses\]'"):
        detect(folder).read(folder)


@pytest.mark.parametrize(
    ("languages", "problem"),
    [(None, "is missing"), (["en"], "is no list of two"), ("en", "is no list of two")],
)
def test_languages_are_told(languages: object, problem: str, write: Callable[..., Path]) -> None:
    folder = write(languages)
    with pytest.raises(ExportError, match=f"tokenizer_config.json: langs {problem}.*; set it to those"):
        detect(folder).read(folder)


def test_a_tokenizer_is_whole(write: Callable[..., Path]) -> None:
    folder = write()
    file = folder / "vocab-tgt.json"
    target = json.loads(file.read_text())
    file.write_text(json.dumps({token: i for token, i in target.items() if token != "<pad>"}))
    with pytest.raises(ExportError, match=r"vocab-tgt\.json has no '<pad>'; copy"):
        detect(folder).read(folder)
    file.write_text(json.dumps({**target, "</s>": target["<s>"], "<s>": target["</s>"]}))
    with pytest.raises(ExportError, match=r"'</s>' has the id 2 in vocab-src\.json and 0 in vocab-tgt\.json"):
        detect(folder).read(folder)
    file.write_text(json.dumps(target))
    (folder / "merges.txt").write_bytes(b"\xff\n\xff\n")
    with pytest.raises(ExportError, match=r"merges\.txt cannot be read as a tokenizer"):
        detect(folder).read(folder)
    file.unlink()
    with pytest.raises(ExportError, match=r"lacks vocab-tgt\.json of its tokenizer; copy all of vocab-src\.json"):
        detect(folder).read(folder)


def test_a_larger_vocabulary_than_the_models_is_refused(write: Callable[..., Path]) -> None:
    folder = write()
    file = folder / "vocab-tgt.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "more": 5000}))
    with pytest.raises(ExportError, match="copy the tokenizer that this model was trained with"):
        exported(folder)


def test_settings_without_effect_are_told(write: Callable[..., Path]) -> None:
    found = detect(folder := write(tokenizer_class="GPT2Tokenizer")).read(folder).generation["not_supported"]
    assert isinstance(found, dict)
    assert set(found) == {"tokenizer_config.json: tokenizer_class"}
