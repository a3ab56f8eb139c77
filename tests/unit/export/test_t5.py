"""The T5 family: what configs may say, how distances share numbers, and its tokenizers beside transformers'."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.t5.modeling_t5 import T5Attention

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.registry import detect
from beamline_export.families.relative_positions import Buckets
from beamline_export.progress import Progress
from beamline_export.spec import Checkpoint, ExportError, check_weights
from beamline_export.testing import write_hugging_face
from beamline_export.vocabularies import check_vocabularies
from beamline_server.bundle import Bundle, BundleError, load_bundle
from beamline_server.manifest import Dimensions
from beamline_server.tokenizer import load_tokenizer
from doubles.alike import assert_alike

FAMILIES = ["t5", "mt5", "umt5"]
TEXTS = [
    "Hello, world!",
    "  two  spaces\tand a tab\nand a line ",
    "Übergrößenträger — naïve café",
    "日本語のテキスト。",
    "مرحبا بالعالم",
    "Привет, мир",
    "हिन्दी में पाठ",
    "👩‍👩‍👧 emoji 🎉",
    "e\u0301 and ﬁ and ① and \u00a0",
    "",
    "x",
    "\x00\x7f",
]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a lazy dog", "many other words", "Hello hello"]
CORPUS = [*TEXTS, *WORDS]


@pytest.mark.parametrize("count", [4, 5, 8, 32, 33])
@pytest.mark.parametrize("farthest", [17, 20, 64, 128, 200])
def test_distances_share_buckets_as_in_transformers(count: int, farthest: int) -> None:
    buckets, reach = Buckets(count, farthest), farthest + 90
    of = {"num_buckets": count, "max_distance": farthest}
    offsets = torch.arange(-reach, reach + 1)
    both = T5Attention._relative_position_bucket(offsets, bidirectional=True, **of)
    back = T5Attention._relative_position_bucket(-torch.arange(reach + 1), bidirectional=False, **of)
    assert buckets.both_ways(reach).tolist() == both.tolist()
    assert buckets.looking_back(reach).tolist() == back.tolist()
    # What is beyond has the bucket of the farthest.
    assert set(back[farthest:].tolist()) == {count - 1}


def problems(folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        check_weights(detect(folder).read(folder))
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"is_encoder_decoder": False}, "is_encoder_decoder False is not supported (only true is)"),
        ({"is_decoder": True}, "is_decoder True is not supported"),
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj 'gated-mish' is not known (known: relu, gelu"),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, "is_gated_act True is not supported"),
        ({"feed_forward_proj": "relu", "is_gated_act": False, "dense_act_fn": "silu"}, "are two activations"),
        ({"head_dim": 7}, "head_dim 7 and d_kv 16 are the same field with two values"),
        ({"num_attention_heads": 7}, "num_attention_heads 7 and num_heads 3 are the same field"),
        ({"d_kv": None}, "d_kv is missing"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets must be a whole number from 4"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance must be a whole number from 5"),
        (
            {"relative_attention_num_buckets": 10},
            r"relative_attention_bias.weight has shape [8, 3], the config says [10",
        ),
        ({"num_heads": 4}, "has shape [8, 3], the config says [8, 4]"),
        ({"d_ff": 10}, "the config says [10, 32]"),
    ],
)
def test_what_a_config_may_not_say_is_told(
    family: str, changes: dict[str, Any], told: str, make_checkpoint: Callable[[str], Any]
) -> None:
    assert told in problems(make_checkpoint(family).config(**changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_the_model_does_not_have_or_lacks_are_told(
    family: str, make_checkpoint: Callable[[str], Any]
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["encoder.block.0.layer.0.SelfAttention.q.bias"] = torch.zeros(48)
        del state["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        # Of the first checkpoints; nobody reads it.
        state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 3)

    found = problems(make_checkpoint(family).tensors(spoil))
    assert "not part of the model: encoder.block.0.layer.0.SelfAttention.q.bias [48]" in found
    assert "missing: decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in found
    assert "EncDecAttention" not in found


@pytest.mark.parametrize(
    "changes", [{"n_positions": ...}, {"n_positions": ..., "tokenizer_class": "ByT5Tokenizer"}, {}]
)
def test_the_longest_text_is_what_the_config_says(
    changes: dict[str, Any], make_checkpoint: Callable[[str], Any]
) -> None:
    folder = make_checkpoint("t5").config(**changes)
    checkpoint = detect(folder).read(folder)
    longest = 48 if not changes else 1024 if "tokenizer_class" in changes else 512
    assert (checkpoint.spec.max_source_positions, checkpoint.spec.max_target_positions) == (longest, longest)
    assert any("names no n_positions" in notice for notice in checkpoint.notices) == bool(changes)


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": False}, {"scale_decoder_outputs": False}])
def test_the_head_reads_what_transformers_scale(said: dict[str, Any], make_checkpoint: Callable[[str], Any]) -> None:
    folder = make_checkpoint("t5").config(**{"tie_word_embeddings": ..., "scale_decoder_outputs": ..., **said})
    config = json.loads((folder / "config.json").read_text())
    scaled = transformers.T5Config.from_dict(config).scale_decoder_outputs
    assert scaled == (not said)
    plain = weights_of(folder)["decoder.final_layer_norm.weight"]
    found = detect(folder).read(folder).weights["decoder.final_norm.weight"]
    assert found == pytest.approx(plain * (32**-0.5 if scaled else 1.0), rel=1e-6)


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = load_file(folder / "model.safetensors")
    return weights


def unigram(words: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer.json as T5's: pieces after three special tokens, sentinels behind them."""
    rng = np.random.default_rng(0)
    spelled = ["\u2581" + word for text in words for word in text.split()]
    parts = {word[i : i + length] for word in spelled for length in (1, 2, 3) for i in range(len(word))}
    # One character is left out, so that something is unknown.
    known = sorted(part for part in parts if "x" not in part)
    scores = -rng.uniform(2, 12, len(known))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *zip(known, scores.tolist(), strict=True)]
    model = tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False)
    made = tokenizers.Tokenizer(model)
    metaspace: dict[str, Any] = {"replacement": "\u2581", "prepend_scheme": "always", "split": True}
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace(**metaspace)]
    )
    made.decoder = tokenizers.decoders.Metaspace(**metaspace)
    made.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in reversed(range(5)))])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def write(folder: Path, family: str, class_: str, words: tokenizers.Tokenizer | None, vocabulary: int) -> Path:
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "bos_token_id": None}
    write_hugging_face(folder, family, {"vocab_size": vocabulary, "num_layers": 1, **ids}, ids)
    if words is not None:
        words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": class_, "extra_ids": 0 if words is None else 5})
    )
    return folder


def exported(folder: Path, silent: Progress) -> Bundle:
    return export(folder, folder.with_name("bundle"), ExportOptions(), silent)


@pytest.mark.parametrize(
    ("family", "class_"), [("t5", "T5Tokenizer"), ("mt5", "T5TokenizerFast"), ("umt5", "TokenizersBackend")]
)
def test_pieces_are_those_of_transformers(family: str, class_: str, tmp_path: Path, silent: Progress) -> None:
    words = unigram(CORPUS)
    folder = write(tmp_path / "checkpoint", family, class_, words, words.get_vocab_size() + 3)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(exported(folder, silent))
    assert ours is not None
    assert_alike(ours, theirs, words.get_vocab_size())


def test_bytes_are_those_of_transformers(tmp_path: Path, silent: Progress) -> None:
    folder = write(tmp_path / "checkpoint", "t5", "ByT5Tokenizer", None, 384)
    theirs = transformers.ByT5Tokenizer()
    bundle = exported(folder, silent)
    ours = load_tokenizer(bundle)
    assert ours is not None
    assert (bundle.manifest.tokenizer.kind, bundle.manifest.tokenizer.files) == ("bytes", ())
    assert_alike(ours, theirs, len(theirs))
    for text in CORPUS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode_target(text) == ids[:-1]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
        for i in range(len(ids)):
            assert text.startswith(ours.settled(ids[:i]))
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, 384, 12).tolist()
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        whole = ours.decode(ids)
        assert all(whole.startswith(ours.settled(ids[:i])) for i in range(len(ids)))
    # Text is text, whatever it spells.
    assert ours.decode(ours.encode("a </s> <extra_id_0>")) == "a </s> <extra_id_0>"


def read(folder: Path) -> tuple[Checkpoint, list[str]]:
    checkpoint = detect(folder).read(folder)
    return checkpoint, [*checkpoint.notices, *check_vocabularies(checkpoint, folder)]


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has 200 tokens, bytes need 259"):
        read(write(tmp_path / "checkpoint", "t5", "ByT5Tokenizer", None, 200))


def test_other_special_tokens_of_bytes_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", "t5", "ByT5Tokenizer", None, 384)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "eos_token": "<end>"}')
    with pytest.raises(ExportError, match=re.escape("eos_token of a ByT5Tokenizer must be </s>, <unk>, <pad>")):
        read(folder)


def test_pieces_without_a_tokenizer_json_are_told_how_to_get_one(make_checkpoint: Callable[[str], Any]) -> None:
    folder = make_checkpoint("umt5").folder
    (folder / "spiece.model").write_bytes(b"")
    with pytest.raises(ExportError, match=r"has spiece\.model but no tokenizer\.json, .*; write tokenizer\.json with"):
        read(folder)


def test_what_t5s_own_class_does_otherwise_is_told(tmp_path: Path) -> None:
    words = unigram(CORPUS)
    words.post_processor = None
    checkpoint, notices = read(write(tmp_path / "none", "t5", "T5Tokenizer", words, words.get_vocab_size()))
    assert checkpoint.special_tokens.source_eos == 1
    assert any("has no post-processor; </s> is added" in notice for notice in notices)
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 1)]
    )
    checkpoint, notices = read(write(tmp_path / "other", "t5", "T5Tokenizer", words, words.get_vocab_size()))
    assert (checkpoint.special_tokens.source_bos, checkpoint.special_tokens.source_eos) == (0, 1)
    assert any("puts <pad> and </s> around a text" in notice for notice in notices)
    assert any("would build its own of the pieces" in notice for notice in notices)


def test_servers_that_know_no_relative_positions_refuse_them(tmp_path: Path, silent: Progress) -> None:
    """The manifest has fields that those forbid; without them its graphs are not what dimensions say."""
    folder = write_hugging_face(tmp_path / "checkpoint", "t5", {"num_layers": 1}, {})
    bundle = export(folder, tmp_path / "bundle", ExportOptions(), silent)
    told = json.loads((bundle.path / "manifest.json").read_text())["dimensions"]
    assert told["attention_width"] == 48
    assert told["relative_positions"] == {"layers": 1, "distances": 13}
    assert Dimensions.model_config["extra"] == "forbid"
    (bundle.path / "relative_bias.bin").write_bytes(b"1234")
    with pytest.raises(BundleError, match=r"relative_bias\.bin: has 4 bytes, the manifest says 156"):
        load_bundle(bundle.path)
