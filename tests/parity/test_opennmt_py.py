"""Checkpoints of OpenNMT-py, against the model's formulas written out here."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from beamline_server.tokenizer import load_tokenizer
from doubles.formulas import attend, check_agreement, drawn, normalized

pytestmark = pytest.mark.parity

WIDTH, HEADS, INNER, SOURCE, TARGET = 16, 4, 24, 50, 60
OPTIONS = {
    "encoder_type": "transformer",
    "decoder_type": "transformer",
    "enc_layers": 2,
    "dec_layers": 1,
    "rnn_size": WIDTH,
    "heads": HEADS,
    "transformer_ff": INNER,
    "position_encoding": True,
    "max_relative_positions": 0,
    "self_attn_type": "scaled-dot",
    "copy_attn": False,
    "share_decoder_embeddings": False,
    "generator_function": "softmax",
    "alignment_layer": -3,
    "learning_rate": 2.0,
}
EMBEDDING = "embeddings.make_embedding.emb_luts.0.weight"
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def norm(name: str) -> Shapes:
    yield f"{name}.weight", (WIDTH,)
    yield f"{name}.bias", (WIDTH,)


def shapes_of(options: dict[str, Any], *, bias: bool) -> Shapes:
    yield f"encoder.{EMBEDDING}", (SOURCE, WIDTH)
    if not options.get("share_embeddings"):
        yield f"decoder.{EMBEDDING}", (TARGET, WIDTH)
    target = SOURCE if options.get("share_embeddings") else TARGET
    if not options["share_decoder_embeddings"]:
        yield "generator.0.weight", (target, WIDTH)
    yield "generator.0.bias", (target,)
    for i in range(2):
        layer = f"encoder.transformer.{i}"
        yield from attention_shapes(f"{layer}.self_attn", bias=bias)
        yield from norm(f"{layer}.layer_norm")
        yield from feed_forward_shapes(layer)
    layer = "decoder.transformer_layers.0"
    for number, name in ((1, "self_attn"), (2, "context_attn")):
        yield from attention_shapes(f"{layer}.{name}", bias=bias)
        yield from norm(f"{layer}.layer_norm_{number}")
    yield from feed_forward_shapes(layer)
    yield from norm("encoder.layer_norm")
    yield from norm("decoder.layer_norm")


def attention_shapes(name: str, *, bias: bool) -> Shapes:
    for part in ("linear_keys", "linear_values", "linear_query", "final_linear"):
        yield from linear(f"{name}.{part}", WIDTH, WIDTH, bias=bias)


def feed_forward_shapes(layer: str) -> Shapes:
    yield from linear(f"{layer}.feed_forward.w_1", INNER, WIDTH)
    yield from linear(f"{layer}.feed_forward.w_2", WIDTH, INNER)
    yield from norm(f"{layer}.feed_forward.layer_norm")


def table(rows: int) -> Tensor:
    """Sine at even, cosine at odd features, as (rows, 1, D)."""
    rate = torch.exp(torch.arange(0, WIDTH, 2) * -(math.log(10000) / WIDTH))
    angle = torch.arange(rows)[:, None] * rate
    result = torch.zeros(rows, 1, WIDTH)
    result[:, 0, 0::2], result[:, 0, 1::2] = angle.sin(), angle.cos()
    return result


def state_of(options: dict[str, Any], *, bias: bool = True) -> dict[str, Tensor]:
    state = drawn(dict(shapes_of(options, bias=bias)))
    state["generator.0.bias"] *= 2
    for stack in ("encoder", "decoder"):
        state[f"{stack}.embeddings.make_embedding.pe.pe"] = table(5000)
    if options.get("share_embeddings"):
        state[f"decoder.{EMBEDDING}"] = state[f"encoder.{EMBEDDING}"]
    return state


class Model:
    """The model as OpenNMT-py's documentation describes it: each part reads what a norm makes of its input."""

    def __init__(self, options: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.options, self.state = options, state

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.embedded("encoder", source)
        for i in range(self.options["enc_layers"]):
            layer = f"encoder.transformer.{i}"
            y = self.norm(f"{layer}.layer_norm", x)
            x = self.feed_forward(layer, x + self.attention(f"{layer}.self_attn", y, y))
        memory = self.norm("encoder.layer_norm", x)
        x, layer = self.embedded("decoder", target), "decoder.transformer_layers.0"
        y = self.norm(f"{layer}.layer_norm_1", x)
        query = x + self.attention(f"{layer}.self_attn", y, y)
        y = self.norm(f"{layer}.layer_norm_2", query)
        x = self.feed_forward(layer, query + self.attention(f"{layer}.context_attn", y, memory))
        y = self.norm("decoder.layer_norm", x)
        weight = self.state.get("generator.0.weight", self.state[f"decoder.{EMBEDDING}"])
        return y @ weight.T + self.state["generator.0.bias"]

    def embedded(self, stack: str, ids: Tensor) -> Tensor:
        return self.state[f"{stack}.{EMBEDDING}"][ids] * math.sqrt(WIDTH) + table(len(ids))[:, 0]

    def attention(self, name: str, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.linear_{p}", of) for p, of in (("query", x), ("keys", memory), ("values", memory))
        )
        causal = name.startswith("decoder") and name.endswith("self_attn")
        return self.linear(f"{name}.final_linear", attend(q, k, v, HEADS, causal=causal))

    def feed_forward(self, layer: str, x: Tensor) -> Tensor:
        inner = self.linear(f"{layer}.feed_forward.w_1", self.norm(f"{layer}.feed_forward.layer_norm", x))
        gelu = self.options.get("pos_ffn_activation_fn") == "gelu"
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2 if gelu else inner.clamp(min=0)
        return x + self.linear(f"{layer}.feed_forward.w_2", inner)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", torch.zeros(1))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return normalized(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)


def written(folder: Path, options: dict[str, Any], state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "opennmt_py", **config}))
    (folder / "opt.json").write_text(json.dumps(options))
    torch.save(state, folder / "model.pt")
    return folder


def exported(folder: Path, told: io.StringIO | None = None) -> Bundle:
    return export(folder, folder.with_name("bundle"), ExportOptions(), Progress(told or io.StringIO()))


@pytest.mark.parametrize(
    ("changes", "bias"),
    [
        ({}, True),
        ({"share_decoder_embeddings": True, "share_embeddings": True}, True),
        ({"pos_ffn_activation_fn": "gelu", "rnn_size": None, "hidden_size": WIDTH}, False),
    ],
    ids=["separate", "one-table", "version-3"],
)
def test_a_model_answers_as_by_its_formulas(changes: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    options = {**OPTIONS, **changes}
    state = state_of(options, bias=bias)
    # Version 3 has a linear layer alone, without a softmax behind it, and attention without biases.
    saved = {name if bias else name.replace("generator.0.", "generator."): t for name, t in state.items()}
    bundle = exported(written(tmp_path / "model", options, saved, max_positions=40, source_eos_token_id=3))
    tokens = bundle.manifest.special_tokens
    assert (tokens.decoder_start, tokens.eos, tokens.pad, tokens.source_eos) == (2, (3,), 1, 3)
    assert bundle.manifest.dimensions.max_target_tokens == 40
    check_agreement(bundle, Model(options, state))


def test_nothing_stands_around_a_source_unless_config_says_so(tmp_path: Path) -> None:
    bundle = exported(written(tmp_path / "model", OPTIONS, state_of(OPTIONS)))
    assert (bundle.manifest.special_tokens.source_bos, bundle.manifest.special_tokens.source_eos) == (None, None)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_relative_positions": 20}, r"max_relative_positions 20 is not supported \(only 0 is\)"),
        ({"position_encoding": None}, "position_encoding is missing"),
        ({"position_encoding": False}, r"position_encoding False is not supported \(only true is\)"),
        ({"copy_attn": True}, "copy_attn True is not supported"),
        ({"encoder_type": "brnn"}, "encoder_type 'brnn' is not supported"),
        ({"self_attn_type": "average"}, "self_attn_type 'average' is not supported"),
        ({"layer_norm": "rms"}, "layer_norm 'rms' is not supported"),
        ({"pos_ffn_activation_fn": "gated-gelu"}, "pos_ffn_activation_fn 'gated-gelu' is not known"),
        ({"heads": None}, "heads is missing"),
        ({"dec_layers": 2}, r"missing: decoder\.transformer_layers\.1"),
        ({"enc_layers": 1}, r"not part of the model: encoder\.transformer\.1"),
        ({"rnn_size": 32}, r"emb_luts\.0\.weight has shape \[50, 16\], d_model is 32"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=problem) as told:
        exported(written(tmp_path / "model", {**OPTIONS, **changes}, state_of(OPTIONS)))
    assert "\n" not in str(told.value)


def test_a_position_table_of_another_formula_is_refused(tmp_path: Path) -> None:
    state = state_of(OPTIONS)
    state["encoder.embeddings.make_embedding.pe.pe"] += 0.1
    with pytest.raises(ExportError, match=r"not part of the model: encoder\.embeddings\.make_embedding\.pe\.pe"):
        exported(written(tmp_path / "model", OPTIONS, state))


def test_text_by_the_pieces_of_the_vocabularies(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", OPTIONS, state_of(OPTIONS))
    model = io.BytesIO()
    sentences = ["ein kleiner hund", "eine kleine katze", "der hund und die katze", "klein und rund"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=24, minloglevel=2
    )
    (folder / "sentencepiece.model").write_bytes(model.getvalue())
    with pytest.raises(ExportError, match=r"lacks vocab\.json"):
        exported(folder)
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [spm.id_to_piece(i) for i in range(3, spm.get_piece_size())]
    special = ["<unk>", "<blank>", "<s>", "</s>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate([*special, *pieces])}))
    (folder / "target_vocab.json").write_text(json.dumps({p: i for i, p in enumerate([*special, *pieces[::-1]])}))
    bundle = exported(folder)
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    hund = spm.encode("ein hund", out_type=str)
    assert tokenizer.encode("ein hund") == [4 + pieces.index(p) for p in hund]
    assert tokenizer.decode([2, *(4 + pieces[::-1].index(p) for p in hund), 3, 1]) == "ein hund"


def test_text_by_words_of_moses_and_pieces_of_subword_nmt(tmp_path: Path) -> None:
    words = {"tokenizer": "moses", "bpe": "subword_nmt", "bpe_codes": "merges", "bpe_separator": "~"}
    folder = written(tmp_path / "model", OPTIONS, state_of(OPTIONS), **words)
    (folder / "merges").write_text("h u\nn d\nnd </w>\n")
    vocabulary = ["<unk>", "<blank>", "<s>", "</s>", "hu~", "nd", "s", "&apos;", "."]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    with pytest.raises(ExportError, match=r"source_lang is missing; Moses.*target_lang is missing"):
        exported(folder)
    told = {"model_type": "opennmt_py", **words, "source_lang": "de", "target_lang": "en"}
    (folder / "config.json").write_text(json.dumps(told))
    tokenizer = load_tokenizer(exported(folder))
    assert tokenizer is not None
    # Without merges of it, `&apos;` is seven pieces.
    pieces = ["hu~", "nd", *["<unk>"] * 6, "s", "hu~", "nd", "."]
    assert tokenizer.encode("hund's hund.") == [vocabulary.index(piece) for piece in pieces]
    assert tokenizer.decode([2, 4, 5, 7, 6, 8, 3, 1]) == "hund 's."
