"""Checkpoints in fairseq's layout, against its formulas written out here."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.registry import detect
from beamline_export.progress import Progress
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from beamline_server.tokenizer import load_tokenizer
from doubles.fairseq_files import ARGS, ATTENTIONS, HEADS, WIDTH, state_of, written
from doubles.formulas import attend, check_agreement, halves, normalized

pytestmark = pytest.mark.parity


class Model:
    """The model as fairseq's documentation and the paper describe it."""

    def __init__(self, args: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.args, self.state, self.old = args, state, float(state["encoder.version"]) < 2

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        y = self.stack("decoder", target, self.stack("encoder", source, source))
        if self.args.get("share_decoder_input_output_embed"):
            return y @ self.state["decoder.embed_tokens.weight"].T
        return y @ self.state["decoder.embed_out" if self.old else "decoder.output_projection.weight"].T

    def stack(self, name: str, ids: Tensor, memory: Tensor) -> Tensor:
        scale = 1 if self.args.get("no_scale_embedding") else math.sqrt(WIDTH)
        x = self.state[f"{name}.embed_tokens.weight"][ids] * scale
        if self.args.get(f"{name}_learned_pos"):
            x = x + self.state[f"{name}.embed_positions.weight"][2 : 2 + len(ids)]
        else:
            x = x + halves(2, len(ids), WIDTH)
        if self.args.get("layernorm_embedding"):
            x = self.norm(f"{name}.layernorm_embedding", x)
        for i in range(self.args[f"{name}_layers"]):
            for number, part in enumerate([*ATTENTIONS[name], "final"]):
                x = self.residual(f"{name}.layers.{i}", part, number, x, memory)
        return self.norm(f"{name}.layer_norm", x) if f"{name}.layer_norm.weight" in self.state else x

    def residual(self, layer: str, part: str, number: int, x: Tensor, memory: Tensor) -> Tensor:
        norm = f"{layer}.layer_norms.{number}" if self.old else f"{layer}.{part}_layer_norm"
        pre = self.args["encoder_normalize_before"]
        y = self.norm(norm, x) if pre else x
        if part == "final":
            y = self.linear(f"{layer}.fc2", self.activated(self.linear(f"{layer}.fc1", y)))
        else:
            y = self.attention(f"{layer}.{part}", y, memory if part == "encoder_attn" else y)
        return x + y if pre else self.norm(norm, x + y)

    def attention(self, name: str, x: Tensor, memory: Tensor) -> Tensor:
        causal = name.startswith("decoder") and name.endswith("self_attn")
        if self.old:
            weights = self.state[f"{name}.in_proj_weight"].chunk(3)
            biases = self.state[f"{name}.in_proj_bias"].chunk(3)
            q, k, v = (of @ w.T + b for of, w, b in zip((x, memory, memory), weights, biases, strict=True))
        else:
            q, k, v = (self.linear(f"{name}.{p}_proj", of) for p, of in (("q", x), ("k", memory), ("v", memory)))
        return self.linear(f"{name}.out_proj", attend(q, k, v, HEADS, causal=causal))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return normalized(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def activated(self, x: Tensor) -> Tensor:
        match self.args.get("activation_fn", "relu"):
            case "relu":
                return x.clamp(min=0)
            case "gelu":
                return x * (1 + torch.erf(x / math.sqrt(2))) / 2
            case "gelu_accurate":
                return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            case _:
                return x / (1 + torch.exp(-x))


def exported(folder: Path, told: io.StringIO | None = None) -> Bundle:
    return export(folder, folder.with_name("bundle"), ExportOptions(), Progress(told or io.StringIO()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_normalize_before": True, "decoder_normalize_before": True, "activation_fn": "gelu"},
        {
            "encoder_learned_pos": True,
            "decoder_learned_pos": True,
            "layernorm_embedding": True,
            "no_scale_embedding": True,
            "activation_fn": "gelu_accurate",
        },
        {"decoder_learned_pos": True, "share_decoder_input_output_embed": True, "activation_fn": "swish"},
    ],
    ids=["post-norm", "pre-norm", "learned", "mixed"],
)
def test_a_model_answers_as_by_its_formulas(changes: dict[str, Any], tmp_path: Path) -> None:
    args = {**ARGS, **changes}
    state = state_of(args)
    bundle = exported(written(tmp_path / "model", args, state))
    assert (bundle.manifest.dimensions.max_source_tokens, bundle.manifest.dimensions.max_target_tokens) == (40, 30)
    tokens = bundle.manifest.special_tokens
    assert (tokens.decoder_start, tokens.eos, tokens.source_eos, tokens.banned) == (2, (2,), 2, (1,))
    assert bundle.manifest.generation_defaults.min_new_tokens == 1
    check_agreement(bundle, Model(args, state))


def test_the_least_length_is_the_users(tmp_path: Path) -> None:
    state = state_of(ARGS)
    folder = written(tmp_path / "model", ARGS, state, min_length=5)
    assert detect(folder).read(folder).generation["min_new_tokens"] == 4


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_checkpoint_of_before(pre_norm: bool, tmp_path: Path) -> None:
    """Projections in one, numbered norms, no norm at the end of a stack, and an output matrix of its own."""
    args = {**ARGS, "encoder_normalize_before": pre_norm, "decoder_normalize_before": pre_norm}
    state = state_of(args, old=True)
    if pre_norm:  # nothing keeps what it reads near 1, and rounding grows with it
        state["decoder.embed_out"] *= 0.2
    check_agreement(exported(written(tmp_path / "model", args, state)), Model(args, state))


def test_the_last_norm_of_a_new_checkpoint_must_be_there(tmp_path: Path) -> None:
    args = {**ARGS, "encoder_normalize_before": True, "decoder_normalize_before": True}
    state = {name: t for name, t in state_of(args).items() if not name.startswith("decoder.layer_norm.")}
    with pytest.raises(ExportError, match=r"missing: decoder\.layer_norm\.weight"):
        exported(written(tmp_path / "model", args, state))
    state = state_of(args)
    without = {**args, "no_decoder_final_norm": True}
    del state["decoder.layer_norm.weight"], state["decoder.layer_norm.bias"]
    check_agreement(exported(written(tmp_path / "other", without, state)), Model(without, state), count=5)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"decoder_normalize_before": True}, "encoder_normalize_before and decoder_normalize_before differ"),
        (
            {"adaptive_softmax_cutoff": "100,200"},
            r"adaptive_softmax_cutoff '100,200' is not supported \(only null is\)",
        ),
        ({"cross_self_attention": True}, "cross_self_attention True is not supported"),
        ({"activation_fn": "tanh"}, r"activation_fn 'tanh' is not known \(known: relu, gelu"),
        ({"arch": "lightconv"}, "arch 'lightconv' is not supported"),
        ({"task": "translation_from_pretrained_bart"}, "task translation_from_pretrained_bart puts language tokens"),
        ({"decoder_embed_dim": 32}, r"decoder_embed_dim 32 is not supported \(only 16 is\)"),
        ({"source_lang": "../de"}, "source_lang must be the name of a language"),
        ({"encoder_layers": None}, "encoder_layers is missing"),
        (
            {"encoder_ffn_embed_dim": 32},
            r"encoder\.layers\.0\.fc1\.weight has shape \[24, 16\], the config says \[32, 16\]",
        ),
        ({"encoder_layers": 3}, r"missing: encoder\.layers\.2"),
        ({"decoder_layers": 0}, "decoder_layers must be a whole number from 1"),
    ],
)
def test_what_is_not_supported_is_named(args: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=problem) as told:
        exported(written(tmp_path / "model", {**ARGS, **args}, state_of(ARGS)))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "bundle").exists()


def test_files_that_are_missing(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", ARGS, state_of(ARGS), generation={"num_beam": 3})
    with pytest.raises(ExportError, match=r"generation: num_beam is not known \(did you mean num_beams\?\)"):
        exported(folder)
    (folder / "args.json").unlink()
    with pytest.raises(ExportError, match=r"args\.json is missing"):
        exported(folder)
    (folder / "args.json").write_text(json.dumps(ARGS))
    (folder / "model.pt").unlink()
    with pytest.raises(ExportError, match="holds no weights"):
        exported(folder)


def test_text_by_pieces_of_the_dictionary(tmp_path: Path) -> None:
    """A piece's id is its line in the dictionary, whatever its number in the SentencePiece model."""
    folder = written(tmp_path / "model", ARGS, state_of(ARGS), max_positions=20, num_beams=3)
    sentences = ["ein kleiner hund", "eine kleine katze", "der hund und die katze", "klein und rund"] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=24, minloglevel=2
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    with pytest.raises(ExportError, match=r"lacks dict\.de\.txt, dict\.en\.txt"):
        exported(folder)
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [spm.id_to_piece(i) for i in range(3, spm.get_piece_size())]
    lines = [f"{piece} {7 * i}" for i, piece in enumerate(reversed(pieces))]
    (folder / "dict.de.txt").write_text("\n".join(lines) + "\n")
    (folder / "dict.en.txt").write_text("\n".join([*lines[::-1], "<s> 1 #fairseq:overwrite", "madeupword0000 0", ""]))
    told = io.StringIO()
    bundle = exported(folder, told)
    assert bundle.manifest.dimensions.max_source_tokens == 20
    assert bundle.manifest.generation_defaults.beam_size == 3
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    expected = [4 + list(reversed(pieces)).index(p) for p in spm.encode("ein hund", out_type=str)]
    assert tokenizer.encode("ein hund") == [*expected, 2]
    target = [4 + pieces.index(p) for p in spm.encode("ein hund", out_type=str)]
    assert tokenizer.decode([0, *target, 2, 1]) == "ein hund"
    assert tokenizer.encode("Ω")[-2:] == [3, 2]


CODES = ["h u", "hu n", "hun d</w>", "e i", "ei n</w>", "@ -", "@- @</w>"]
CODES += ["& a", "&a p", "&ap o", "&apo s", "&apos ;</w>"]
PIECES = ["hund", "ein", "&apos;", "@-@", "'", "s", "e@@", "d@@", "r", "k@@", "ei@@", "n@@", "-@@", ".", "er", "e"]


def folder_of_words(folder: Path, **config: object) -> Path:
    """With subword-nmt's codes and dictionaries."""
    written(folder, ARGS, state_of(ARGS), max_positions=20, **config)
    (folder / "bpe.codes").write_text("\n".join(["#version: 0.2", *CODES, ""]))
    for name, pieces in (("de", PIECES), ("en", PIECES[::-1])):
        (folder / f"dict.{name}.txt").write_text("".join(f"{piece} 7\n" for piece in pieces))
    return folder


WORDS = {"tokenizer": "moses", "bpe": "subword_nmt"}


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            {},
            {"ein hund.": "ein hund .", "hund's": "hund &apos; s", "ein-hund": "ein @-@ hund", "der Ω": "d@@ e@@ r Ω"},
        ),
        (
            {"moses_no_dash_splits": True, "moses_no_escape": True},
            {"hund's": "hund ' s", "ein-hund": "ei@@ n@@ -@@ hund"},
        ),
        ({"source_lang": "en"}, {"hund's": "hund &apos@@ ;@@ s"}),
    ],
)
def test_text_by_words_of_moses_and_pieces_of_subword_nmt(
    options: dict[str, object], texts: dict[str, str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(exported(folder_of_words(tmp_path / "model", **WORDS, **options)))
    assert tokenizer is not None
    source, target = ({piece: 4 + i for i, piece in enumerate(known)} for known in (PIECES, PIECES[::-1]))
    for text, pieces in texts.items():
        assert tokenizer.encode(text) == [*(source.get(piece, 3) for piece in pieces.split()), 2], text
    assert tokenizer.encode_target("ein er") == [target["ein"], target["e@@"], target["r"]]
    ids = [target[piece] for piece in ("d@@", "er", "hund", "@-@", "e@@", "r", "&apos;", "s", ".", "k@@")]
    assert tokenizer.decode([0, *ids, 2, 1, 3]) == "der hund-er 's. k"
    assert [tokenizer.settled(ids[:end]) for end in range(5)] == ["", "", "", "der", "der"]
    assert tokenizer.settled(ids) == "der hund-er 's."


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"bpe": "subword_nmt"}, r"tokenizer is missing \(known: moses\)"),
        ({"tokenizer": "moses"}, r"bpe is missing \(known: subword_nmt\)"),
        ({**WORDS, "bpe": "fastbpe"}, r"bpe 'fastbpe' is not known"),
        ({**WORDS, "tokenizer": "nltk"}, r"tokenizer 'nltk' is not known"),
        ({**WORDS, "source_lang": 7}, "source_lang must be the code of a language, not '7'"),
        ({**WORDS, "bpe_codes": "other"}, "lacks other, the merges of subword-nmt; copy it, or name it by bpe_codes"),
        ({**WORDS, "bpe_codes": "../codes"}, "bpe_codes must be the name of a file in the folder"),
        ({**WORDS, "bpe_separator": ""}, "bpe_separator must be a text without spaces"),
        ({**WORDS, "moses_no_escape": "yes"}, "moses_no_escape must be true or false"),
    ],
)
def test_words_that_a_folder_cannot_have(config: dict[str, object], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=problem):
        exported(folder_of_words(tmp_path / "model", **config))


def test_a_folder_has_one_kind_of_pieces(tmp_path: Path) -> None:
    folder = folder_of_words(tmp_path / "model", **WORDS)
    (folder / "bpe.codes").write_text("a b 17\n")
    with pytest.raises(ExportError, match=r"bpe\.codes cannot be read as a tokenizer.*merge 1 is no pair"):
        exported(folder)
    (folder / "spm.model").write_bytes(b"")
    with pytest.raises(ExportError, match=r"holds spm\.model, and config\.json asks for bpe subword_nmt; remove"):
        exported(folder)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("hund", "line 2 is no token and its count"),
        ("<unk> 3", "line 2 has '<unk>' again"),
        ("a b", "line 2 is no token"),
    ],
)
def test_a_dictionary_that_is_none(line: str, problem: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", ARGS, state_of(ARGS))
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(b"")
    for name in ("de", "en"):
        (folder / f"dict.{name}.txt").write_text(f"katze 5\n{line}\n")
    with pytest.raises(ExportError, match=problem):
        exported(folder)
