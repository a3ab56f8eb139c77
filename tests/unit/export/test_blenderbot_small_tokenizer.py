"""BlenderbotSmall's own tokenizer reads and writes texts as in transformers."""

import io
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.registry import detect
from beamline_export.progress import Progress
from beamline_export.reference import quiet_transformers
from beamline_export.spec import ExportError
from beamline_export.testing import write_hugging_face
from beamline_export.vocabularies import check_vocabularies
from beamline_server.subwords import Merges
from beamline_server.tokenizer import load_tokenizer
from doubles.alike import assert_alike
from doubles.byte_pairs import learn, merged
from doubles.many_scripts import lines

SPECIAL = ["__null__", "__start__", "__end__", "__unk__", "__newln__"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A random checkpoint with merges of a few lines, and with these settings of its tokenizer."""

    def make(header: str = "#version: 0.2\n", **settings: Any) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        merges, words = learn((line.lower() for line in lines(150, seed=3)), 150)
        tokens = {f"{part}@@" for parts in words for part in parts[:-1]} | {parts[-1][:-4] for parts in words}
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(tokens - set(SPECIAL))])}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text(header + "".join(f"{a} {b}\n" for a, b in merges))
        sizes = {"vocab_size": len(vocabulary), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        write_hugging_face(folder, "blenderbot-small", {**sizes, **ids}, ids)
        if settings:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.mark.parametrize("settings", [{}, {"clean_up_tokenization_spaces": True, "eos_token": "__newln__"}])
def test_texts_are_those_of_transformers(settings: dict[str, Any], write: Callable[..., Path]) -> None:
    folder = write(**settings)
    with quiet_transformers():
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, transformers.BlenderbotSmallTokenizer)
    bundle = export(folder, folder.parent / "bundle", ExportOptions(), Progress(io.StringIO()))
    assert not bundle.manifest.generation_defaults.not_supported
    ours = load_tokenizer(bundle)
    assert ours is not None
    assert_alike(ours, theirs, len(theirs))
    # With transformers, too, all this is text.
    for text in (
        "a\nb",
        "one. Two\n",
        "'\n'",
        "ABC's",
        "don't (really)!",
        "__newln__ x",
        "@@ @@",
        "x@@",
        "İΣ",
        "\x1f.\x1f",
    ):
        expected = theirs(text, split_special_tokens=True).input_ids
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), text


def test_special_tokens_in_a_text_are_unknown(write: Callable[..., Path]) -> None:
    folder = write()
    file = folder / "vocab.json"
    vocabulary = json.loads(file.read_text())
    assert "&" not in vocabulary
    # A name that is a token of text, too.
    renamed = {("&" if token == "__end__" else token): i for token, i in vocabulary.items()}
    file.write_text(json.dumps(renamed))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "&"}))
    ours = load_tokenizer(export(folder, folder.parent / "bundle", ExportOptions(), Progress(io.StringIO())))
    assert ours is not None
    assert ours.encode_target("&") == [vocabulary["__unk__"]]
    assert ours.decode([vocabulary["__end__"], vocabulary["__unk__"]]) == ""


def test_what_a_word_goes_on_after_is_not_settled(write: Callable[..., Path]) -> None:
    folder = write()
    ours = load_tokenizer(export(folder, folder.parent / "bundle", ExportOptions(), Progress(io.StringIO())))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    begun = next(i for token, i in vocabulary.items() if token.endswith("@@"))
    assert ours is not None
    assert ours.decode([vocabulary["cat"], begun]).endswith("@@")
    assert ours.settled([vocabulary["cat"], begun]) == ours.decode([vocabulary["cat"], begun])[:-2]


def test_merges_are_joined_in_their_order() -> None:
    """Whatever the list: also one in which a pair stands before those that make its symbols."""
    rng = random.Random(1)
    for _ in range(500):
        symbols = [letter + end for letter in "abc" for end in ("", "</w>")]
        merges = []
        for _ in range(rng.randint(0, 12)):
            merges.append((rng.choice([s for s in symbols if not s.endswith("</w>")]), rng.choice(symbols)))
            symbols.append("".join(merges[-1]))
        rng.shuffle(merges)
        word = "".join(rng.choice("abc") for _ in range(rng.randint(1, 14)))
        assert Merges(merges).symbols(word) == slowly(word, merges), (word, merges)


def slowly(word: str, merges: list[tuple[str, str]]) -> tuple[str, ...]:
    ranks = {pair: i for i, pair in enumerate(merges)}
    symbols = (*word[:-1], f"{word[-1]}</w>")
    while found := [pair for pair in pairwise(symbols) if pair in ranks]:
        symbols = merged(symbols, min(found, key=ranks.__getitem__))
    return symbols


def test_a_tokenizer_is_whole(write: Callable[..., Path]) -> None:
    folder = write()
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({token: i for token, i in vocabulary.items() if token != "__unk__"}))
    with pytest.raises(ExportError, match=r"vocab\.json has no '__unk__'; copy"):
        detect(folder).read(folder)
    (folder / "vocab.json").write_text("[]")
    with pytest.raises(ExportError, match=r"vocab\.json cannot be read as a tokenizer"):
        detect(folder).read(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_bytes(b"\xff\n\xff\n")
    with pytest.raises(ExportError, match=r"merges\.txt cannot be read as a tokenizer"):
        detect(folder).read(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(ExportError, match=r"lacks merges\.txt of its tokenizer; copy both of vocab\.json, merges\.txt"):
        detect(folder).read(folder)


def test_a_larger_vocabulary_than_the_models_is_refused(write: Callable[..., Path]) -> None:
    folder = write()
    file = folder / "vocab.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "more": 5000}))
    with pytest.raises(ExportError, match="copy the tokenizer that this model was trained with"):
        check_vocabularies(detect(folder).read(folder), folder)


def test_settings_without_effect_are_told(write: Callable[..., Path]) -> None:
    ignored = detect(folder := write(unk_token="<unk>", tokenizer_class="GPT2Tokenizer")).read(folder).generation
    found = ignored["not_supported"]
    assert isinstance(found, dict)
    assert set(found) == {"tokenizer_config.json: unk_token", "tokenizer_config.json: tokenizer_class"}
