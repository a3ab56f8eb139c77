"""Marian's own files, against the model's formulas written out here."""

import io
import json
import math
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from torch import Tensor

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from beamline_server.tokenizer import load_tokenizer
from doubles.formulas import attend, check_agreement, drawn, halves, normalized, save_npz

pytestmark = pytest.mark.parity

WIDTH, HEADS, INNER, SOURCE, TARGET = 16, 4, 24, 50, 60
OPTIONS = {
    "type": "transformer",
    "version": "v1.9.0 2020-01-01",
    "dim-emb": WIDTH,
    "dim-vocabs": [SOURCE, TARGET],
    "enc-depth": 2,
    "dec-depth": 1,
    "transformer-heads": HEADS,
    "transformer-dim-ffn": INNER,
    "transformer-ffn-depth": 2,
    "transformer-ffn-activation": "swish",
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-decoder-autoreg": "self-attention",
    "transformer-no-projection": False,
    "transformer-tied-layers": [],
    "tied-embeddings": False,
    "tied-embeddings-all": False,
    "input-types": [],
    "lemma-dim-emb": 0,
}
PRE = {"transformer-preprocess": "n", "transformer-postprocess": "da", "transformer-postprocess-top": "n"}
PARTS = {"encoder": ["self"], "decoder": ["self", "context"]}
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes_of(options: dict[str, Any]) -> Shapes:
    suffix = "_pre" if options["transformer-preprocess"] else ""
    shared = options["tied-embeddings-all"]
    if shared:
        yield "Wemb", (SOURCE, WIDTH)
    else:
        yield "encoder_Wemb", (SOURCE, WIDTH)
        yield "decoder_Wemb", (TARGET, WIDTH)
    if not shared and not options["tied-embeddings"]:
        yield (
            ("decoder_ff_logit_out_W", (WIDTH, TARGET))
            if "old" in options
            else (
                "decoder_ff_logit_out_Wt",
                (TARGET, WIDTH),
            )
        )
    yield "decoder_ff_logit_out_b", (1, SOURCE if shared else TARGET)
    if options.get("transformer-train-positions"):
        yield "Wpos", (30, WIDTH)
    for stack, depth in (("encoder", "enc-depth"), ("decoder", "dec-depth")):
        if "n" in options["transformer-postprocess-emb"]:
            yield from norm_shapes(f"{stack}_emb", "_pre")
        if options.get("transformer-postprocess-top"):
            yield from norm_shapes(f"{stack}_top", "")
        for i in range(1, options[depth] + 1):
            for part in PARTS[stack]:
                for letter in "qkvo":
                    yield f"{stack}_l{i}_{part}_W{letter}", (WIDTH, WIDTH)
                    yield f"{stack}_l{i}_{part}_b{letter}", (1, WIDTH)
                yield from norm_shapes(f"{stack}_l{i}_{part}_Wo", suffix)
            yield f"{stack}_l{i}_ffn_W1", (WIDTH, INNER)
            yield f"{stack}_l{i}_ffn_b1", (1, INNER)
            yield f"{stack}_l{i}_ffn_W2", (INNER, WIDTH)
            yield f"{stack}_l{i}_ffn_b2", (1, WIDTH)
            yield from norm_shapes(f"{stack}_l{i}_ffn_ffn", suffix)


def norm_shapes(name: str, suffix: str) -> Shapes:
    yield f"{name}_ln_scale{suffix}", (1, WIDTH)
    yield f"{name}_ln_bias{suffix}", (1, WIDTH)


class Model:
    """The model as Marian's documentation and the paper describe it; the first word of a target is all zeros."""

    def __init__(self, options: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.options, self.state = options, state
        self.pre = options["transformer-preprocess"] == "n"
        self.source = state["Wemb" if "Wemb" in state else "encoder_Wemb"]
        self.target = state["Wemb" if "Wemb" in state else "decoder_Wemb"]

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.stack("encoder", self.source[source], None)
        words = torch.cat([torch.zeros(1, WIDTH), self.target[target[1:]]])
        y = self.stack("decoder", words, memory)
        if "decoder_ff_logit_out_W" in self.state:
            logits = y @ self.state["decoder_ff_logit_out_W"]
        else:
            logits = y @ self.state.get("decoder_ff_logit_out_Wt", self.target).T
        logits = logits + self.state["decoder_ff_logit_out_b"]
        return torch.cat([logits, torch.full((len(y), 1), -math.inf)], dim=1)  # the start is no word

    def stack(self, name: str, x: Tensor, memory: Tensor | None) -> Tensor:
        if self.options.get("transformer-train-positions"):
            x = x + self.state["Wpos"][: len(x)]
        else:
            x = x * math.sqrt(WIDTH) + halves(0, len(x), WIDTH)
        if "n" in self.options["transformer-postprocess-emb"]:
            x = self.norm(f"{name}_emb", x, "_pre")
        for i in range(1, self.options["enc-depth" if name == "encoder" else "dec-depth"] + 1):
            for part in [*PARTS[name], "ffn"]:
                x = self.sublayer(f"{name}_l{i}_{part}", x, memory)
        return self.norm(f"{name}_top", x, "") if self.options.get("transformer-postprocess-top") else x

    def sublayer(self, name: str, x: Tensor, memory: Tensor | None) -> Tensor:
        norm = f"{name}_ffn" if name.endswith("ffn") else f"{name}_Wo"
        y = self.norm(norm, x, "_pre") if self.pre else x
        if name.endswith("ffn"):
            inner = y @ self.state[f"{name}_W1"] + self.state[f"{name}_b1"]
            relu = self.options["transformer-ffn-activation"] == "relu"
            inner = inner.clamp(min=0) if relu else inner / (1 + torch.exp(-inner))
            y = inner @ self.state[f"{name}_W2"] + self.state[f"{name}_b2"]
        else:
            of = memory if memory is not None and name.endswith("context") else y
            q, k, v = (
                what @ self.state[f"{name}_W{letter}"] + self.state[f"{name}_b{letter}"]
                for letter, what in (("q", y), ("k", of), ("v", of))
            )
            y = attend(q, k, v, HEADS, causal=name.startswith("decoder") and name.endswith("self"))
            y = y @ self.state[f"{name}_Wo"] + self.state[f"{name}_bo"]
        return x + y if self.pre else self.norm(norm, x + y, "")

    def norm(self, name: str, x: Tensor, suffix: str) -> Tensor:
        return normalized(x, self.state[f"{name}_ln_scale{suffix}"], self.state[f"{name}_ln_bias{suffix}"], 1e-6)


def written(folder: Path, options: dict[str, Any], state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "marian_npz", **config}))
    text = np.frombuffer(yaml.safe_dump(options).encode() + b"\0", np.int8)
    save_npz(folder / "model.npz", {**{n: t.numpy() for n, t in state.items()}, "special:model.yml": text})
    return folder


def exported(folder: Path, told: io.StringIO | None = None) -> Bundle:
    return export(folder, folder.with_name("bundle"), ExportOptions(), Progress(told or io.StringIO()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**PRE, "transformer-ffn-activation": "relu", "tied-embeddings": True},
        {"tied-embeddings-all": True, "transformer-postprocess-emb": "nd"},
        {"transformer-train-positions": True, "old": True},
    ],
    ids=["post-norm", "pre-norm", "one-table", "learned"],
)
def test_a_model_answers_as_by_its_formulas(changes: dict[str, Any], tmp_path: Path) -> None:
    options = {**OPTIONS, **changes}
    state = drawn(dict(shapes_of(options)))
    bundle = exported(written(tmp_path / "model", options, state, max_positions=40))
    words = SOURCE if options["tied-embeddings-all"] else TARGET
    tokens = bundle.manifest.special_tokens
    assert bundle.manifest.dimensions.target_vocabulary == words + 1
    assert (tokens.decoder_start, tokens.eos, tokens.source_eos, tokens.banned) == (words, (0,), 0, (1, words))
    assert bundle.manifest.dimensions.max_source_tokens == (30 if "Wpos" in state else 40)
    check_agreement(bundle, Model(options, state))


def test_tied_tables_are_stored_once(tmp_path: Path) -> None:
    options = {**OPTIONS, "tied-embeddings-all": True}
    state = drawn(dict(shapes_of(options)))
    tied = exported(written(tmp_path / "model", options, state))
    (tmp_path / "other").mkdir()
    apart = {**OPTIONS}
    other = exported(written(tmp_path / "other" / "model", apart, drawn(dict(shapes_of(apart)))))
    saved = other.manifest.files["weights.bin"].bytes - tied.manifest.files["weights.bin"].bytes
    assert saved > 4 * WIDTH * TARGET


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"transformer-decoder-autoreg": "rnn"},
            r"transformer-decoder-autoreg 'rnn' is not supported \(only \"self-att",
        ),
        (
            {"transformer-ffn-activation": "gelu"},
            r"transformer-ffn-activation 'gelu' is not known \(known: relu, swish\)",
        ),
        ({"transformer-ffn-depth": 3}, "transformer-ffn-depth 3 is not supported"),
        ({"transformer-decoder-dim-ffn": 32}, r"transformer-decoder-dim-ffn 32 is not supported \(only 24 is\)"),
        (
            {"transformer-postprocess": "dh"},
            "transformer-preprocess '' with transformer-postprocess 'h' is not supported",
        ),
        ({"transformer-postprocess-top": "a"}, "transformer-postprocess-top 'a' is not supported"),
        ({"transformer-tied-layers": [1, 1]}, r"transformer-tied-layers \[1, 1\] is not supported"),
        ({"transformer-postprocess": ["dan"]}, "transformer-postprocess must be a text, not a list"),
        ({"right-left": True}, "right-left True is not supported"),
        ({"lemma-dim-emb": -2}, "lemma-dim-emb -2 is not supported"),
        ({"type": "s2s"}, "type 's2s' is not supported"),
        ({"enc-depth": 3}, "missing: encoder_l3_"),
        ({"dec-depth": 0}, "dec-depth must be a whole number from 1"),
        ({"transformer-dim-ffn": 32}, r"encoder_l1_ffn_W1 has shape \[24, 16\], the config says \[32, 16\]"),
        ({"transformer-heads": 3}, "encoder_heads 3 does not divide d_model 16"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    state = drawn(dict(shapes_of(OPTIONS)))
    with pytest.raises(ExportError, match=problem) as told:
        exported(written(tmp_path / "model", {**OPTIONS, **changes}, state))
    assert "\n" not in str(told.value)


def test_archives_that_are_none(tmp_path: Path) -> None:
    state = drawn(dict(shapes_of(OPTIONS)))
    folder = written(tmp_path / "model", OPTIONS, state)
    file = folder / "model.npz"
    whole = file.read_bytes()

    def refused(problem: str) -> None:
        with pytest.raises(ExportError, match=problem) as told:
            exported(folder)
        assert "\n" not in str(told.value)

    file.write_bytes(whole[: len(whole) // 2])
    refused(r"model\.npz cannot be read as a NumPy archive")
    save_npz(file, {name: tensor.numpy() for name, tensor in state.items()})
    refused("holds no special:model.yml")
    np.savez_compressed(file, state["encoder_Wemb"].numpy())
    refused("is compressed; save it again with numpy.savez")
    np.savez(file, bad=np.array([{"a": 1}], dtype=object))
    refused(r"'bad' holds no numbers \(object\)")
    save_npz(file, {"special:model.yml": np.frombuffer(b"a: [1", np.int8)})
    refused("special:model.yml cannot be read as YAML")
    save_npz(file, {"special:model.yml": np.frombuffer(b"!!python/object/apply:os.system [x]", np.int8)})
    refused("special:model.yml cannot be read as YAML")
    laughs = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))
    save_npz(file, {"special:model.yml": np.frombuffer((laughs + "type: *z\n").encode(), np.int8)})
    refused("special:model.yml holds YAML aliases")
    for deep, problem in (("[" * 100_000, "more than 32 deep"), ("{a: " * 50_000, "more than 32 deep")):
        save_npz(file, {"special:model.yml": np.frombuffer(deep.encode(), np.int8)})
        refused(f"special:model.yml is nested {problem}")
    save_npz(file, {"special:model.yml": np.frombuffer(b"a: 1" + b":59" * 9000, np.int8)})
    refused("special:model.yml holds a value of 27,001 characters")
    huge = b"".join(b"%s: 0x%s\n" % (name.encode(), b"f" * 4000) for name in ("dim-emb", "enc-depth"))
    save_npz(file, {"special:model.yml": np.frombuffer(huge, np.int8)})
    refused("dim-emb must be a whole number from 1 to .*, not ")
    strange: Any = {"a\n\x1b[31m": np.array([{"a": 1}], dtype=object)}
    np.savez(file, **strange)
    refused(r"'a\\n\\x1b\[31m' holds no numbers")
    save_npz(file, {"x" * 1100: np.ones(1)})
    refused("a name of more than 1,000 characters")
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999,), }"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("huge.npy", header.ljust(127) + b"\n")
    refused("'huge' is not as large as it says")
    file.unlink()
    refused(r"model\.npz is missing")


def spm(vocabulary: int, **options: Any) -> bytes:
    sentences = ["ein kleiner hund", "eine kleine katze", "der hund und die katze", "klein und rund"] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocabulary, minloglevel=2, **options
    )
    return model.getvalue()


def test_text_by_the_pieces_own_numbers(tmp_path: Path) -> None:
    options = {**OPTIONS, "tied-embeddings-all": True}
    folder = written(tmp_path / "model", options, drawn(dict(shapes_of(options))), num_beams=3)
    content = spm(23, bos_id=-1, eos_id=0, unk_id=1)
    (folder / "vocab.spm").write_bytes(content)
    bundle = exported(folder)
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    ids = sentencepiece.SentencePieceProcessor(model_proto=content).encode("ein hund")
    assert tokenizer.encode("ein hund") == [*ids, 0]
    assert tokenizer.decode([*ids, 0, SOURCE]) == "ein hund"


def test_text_by_a_list_of_pieces(tmp_path: Path) -> None:
    """Pieces that YAML would take for something else are pieces."""
    options = {**OPTIONS, "tied-embeddings-all": True}
    folder = written(tmp_path / "model", options, drawn(dict(shapes_of(options))))
    content = spm(24)
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(content)
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = ["</s>", "<unk>", *(model.id_to_piece(i) for i in range(model.get_piece_size() - 1, 2, -1)), "on", "1.0"]
    (folder / "vocab.yml").write_text(
        "".join(f"{p if p in ('on', '1.0') else json.dumps(p)}: {i}\n" for i, p in enumerate(pieces))
    )
    bundle = exported(folder)
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    expected = [pieces.index(p) for p in model.encode("ein hund", out_type=str)]
    assert tokenizer.encode("ein hund") == [*expected, 0]
    assert tokenizer.decode([*expected, pieces.index("on"), SOURCE, 0]) == "ein hundon"
    (tmp_path / "bundle").rename(tmp_path / "done")
    (folder / "vocab.yml").write_text("a: b\n")
    with pytest.raises(ExportError, match=r"vocab\.yml: 'a' has no id"):
        exported(folder)
