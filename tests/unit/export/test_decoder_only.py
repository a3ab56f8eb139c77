"""Decoders without an encoder: what their folders hold, what is refused, and what the user is told."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.registry import detect
from beamline_export.progress import Progress
from beamline_export.spec import Checkpoint, ExportError, check_weights
from beamline_export.testing import EOS, write_hugging_face
from beamline_server.bundle import Bundle
from beamline_server.tokenizer import load_tokenizer
from doubles.alike import TEXTS, assert_alike
from doubles.many_scripts import lines

LAYER = "model.layers.0"


def read(folder: Path) -> Checkpoint:
    checkpoint = detect(folder).read(folder)
    check_weights(checkpoint)
    return checkpoint


def told(folder: Path, precision: str = "fp32", **options: Any) -> tuple[Bundle, str]:
    """The bundle, and what an export says of it."""
    stream = io.StringIO()
    target = folder.with_name(f"bundle-{precision}-{len(options)}")
    return export(folder, target, ExportOptions(precision, **options), Progress(stream)), stream.getvalue()


@pytest.mark.parametrize(("family", "base"), [("gpt2", "transformer."), ("llama", "model."), ("opt", "model.")])
def test_the_model_within_may_have_been_saved_alone(family: str, base: str, make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(family)
    whole = read(checkpoint.folder)
    state = load_file(checkpoint.weights)
    within = {name.removeprefix(base): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    save_file(within, checkpoint.weights)
    checkpoint.config(tie_word_embeddings=True)
    alone = read(checkpoint.folder)
    assert np.array_equal(alone.weights["decoder.0.ffn.up.weight"], whole.weights["decoder.0.ffn.up.weight"])
    assert alone.weights["head.weight"] is alone.weights["target_embedding"]


def test_a_head_that_is_not_the_embedding_is_needed_unless_they_are_tied(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint("llama")
    checkpoint.tensors(lambda state: state.pop("lm_head.weight"))
    with pytest.raises(ExportError, match=r"missing: lm_head\.weight"):
        read(checkpoint.folder)
    assert read(checkpoint.config(tie_word_embeddings=True)).weights["head.weight"].shape == (120, 32)


def test_tables_that_differ_although_they_are_tied_are_told_of(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint("gpt2")
    checkpoint.tensors(lambda state: state.update({"lm_head.weight": state["transformer.wte.weight"] + 1}))
    assert any("differ in the file; each is used as it is" in notice for notice in read(checkpoint.folder).notices)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"),
        ("opt", "model.decoder.layers.0.fc1.weight"),
        ("llama", f"{LAYER}.self_attn.k_proj.weight"),
    ],
)
@pytest.mark.parametrize("change", ["missing", "narrow", "flat", "number"])
def test_weights_that_do_not_fit_are_named(family: str, name: str, change: str, make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(family)
    make: dict[str, Callable[[Any], object]] = {
        "missing": lambda state: state.pop(name),
        "narrow": lambda state: state.update({name: state[name][:-1].contiguous()}),
        "flat": lambda state: state.update({name: state[name].flatten()}),
        "number": lambda state: state.update({name: torch.tensor(1.0)}),
    }
    checkpoint.tensors(make[change])
    with pytest.raises(ExportError, match=rf"missing: .*{name}|{name} has shape"):
        read(checkpoint.folder)


@pytest.mark.parametrize(
    ("family", "config", "problem"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("opt", {"enable_bias": False}, "enable_bias False is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not known"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not known"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_parameters: factor must be a number from 1"),
        ("llama", {"rope_parameters": {"rope_theta": 100.0, "mscale": 2}}, "rope_parameters: mscale is not known"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor must be a number from"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported here"),
        ("llama", {"head_dim": 1 << 22}, "positions of 4194304 numbers, more than any model has"),
        ("llama", {"head_dim": 5}, "5 of the 5 numbers of a head are turned, which must be even"),
        ("llama", {"num_key_value_heads": 3}, "key_value_heads 3 does not divide decoder_heads 4"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder True is not supported"),
        ("gpt2", {"hidden_size": 64}, "hidden_size 64 and n_embd 32 are the same field with two values"),
    ],
)
def test_what_graphs_do_not_have_is_refused(
    family: str, config: dict[str, Any], problem: str, make_checkpoint: Any
) -> None:
    checkpoint = make_checkpoint(family)
    with pytest.raises(ExportError, match=problem):
        read(checkpoint.config(**config))


def test_a_model_that_looks_back_so_far_serves_so_much(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint("mistral")
    windowed = read(checkpoint.config(sliding_window=10))
    assert (windowed.spec.max_target_positions, windowed.spec.max_source_positions) == (10, 9)
    assert windowed.notices[0].startswith("the model looks back 10 tokens (sliding_window)")
    wide = read(checkpoint.config(sliding_window=64))
    assert (wide.spec.max_target_positions, wide.notices) == (64, ())
    # It knows no such field.
    assert read(checkpoint.config(sliding_window=10, use_sliding_window=False)).spec.max_target_positions == 10


@pytest.mark.parametrize(
    ("family", "config", "positions"),
    [
        ("qwen2", {"use_sliding_window": False}, 64),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, 10),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, 64),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, 10),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2, "max_window_layers": 0}, 64),
        ("llama", {}, 64),
    ],
)
def test_a_window_counts_where_a_layer_has_it(
    family: str, config: dict[str, Any], positions: int, tmp_path: Path
) -> None:
    folder = write_hugging_face(tmp_path / "checkpoint", family, {}, {})
    data = json.loads((folder / "config.json").read_text())
    data.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**data, "sliding_window": 10, **config}))
    assert read(folder).spec.max_target_positions == positions


def test_more_positions_than_a_bundle_has_are_told_of(make_checkpoint: Any) -> None:
    long = read(make_checkpoint("llama").config(max_position_embeddings=131072))
    assert long.spec.max_target_positions == 8192
    assert any("counts up to 131072 positions, a bundle up to 8192" in notice for notice in long.notices)
    assert long.weights["rotary_cosine_positions"].shape == (8192, 4)


def test_settings_that_count_the_prompt_have_no_effect_and_are_told_of(make_checkpoint: Any) -> None:
    folder = make_checkpoint("gpt2").folder
    settings = {"eos_token_id": EOS, "bos_token_id": 3, "max_length": 50, "min_length": 4, "forced_bos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    checkpoint = read(folder)
    ignored = checkpoint.generation["not_supported"]
    assert isinstance(ignored, dict)
    assert ignored.keys() == {"max_length", "min_length", "forced_bos_token_id"}
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 3, "forced_bos_token_id": 0}))
    told = read(folder).generation["not_supported"]
    assert isinstance(told, dict)
    assert told.keys() == {"forced_bos_token_id", "eos_token_id"}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert checkpoint.generation["max_new_tokens"] == 20
    assert (checkpoint.special_tokens.decoder_start, checkpoint.special_tokens.forced_bos) == (3, None)
    (folder / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 30, "min_length": 0}))
    known = read(folder).generation
    assert known["max_new_tokens"] == 30
    assert list(known["not_supported"]) == ["forced_bos_token_id"]  # type: ignore[call-overload]


def test_an_empty_prompt_begins_with_the_end_where_there_is_no_beginning(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint("qwen2")
    (checkpoint.folder / "generation_config.json").unlink()
    assert read(checkpoint.config(bos_token_id=None, eos_token_id=[7, 8])).special_tokens.decoder_start == 7


def test_fields_may_have_their_other_names(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint("gpt2")
    renamed = {"n_embd": ..., "n_layer": ..., "hidden_size": 32, "num_hidden_layers": 1}
    assert read(checkpoint.config(**renamed)).spec.d_model == 32


def test_prompts_to_calibrate_with_and_expected_outputs_may_be_long(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "checkpoint", "gpt2", {}, {}, sharpness=0.5)
    sentences = tmp_path / "sentences"
    sentences.write_text("\n".join(" ".join(["7"] * length) for length in (1, 44, 60, 63)))
    bundle, _ = told(folder, "int8", calibrate=sentences)
    assert bundle.manifest.activations is not None
    assert bundle.manifest.activations.sentences == 4
    file = tmp_path / "expected"
    file.write_text(json.dumps({"source_ids": [7] * 60, "target_ids": [5] * 5, "max_new_tokens": 5}))
    with pytest.raises(ExportError, match="max_new_tokens 5 is beyond the model's 64 positions, behind a prompt of 60"):
        told(folder, expect=file)


def test_narrow_embeddings_need_what_widens_them(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "narrow", "opt", {"word_embed_proj_dim": 20}, {})
    assert read(folder).weights["target_embedding"].shape == (120, 32)
    state = load_file(folder / "model.safetensors")
    del state["model.decoder.project_in.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"missing: model\.decoder\.project_in\.weight"):
        read(folder)


def test_a_tokenizer_that_transformers_make_anew_is_told_of(tmp_path: Path) -> None:
    tokenizer = byte_level(list(lines(50)))
    tokenizer.normalizer = normalizers.Lowercase()
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    folder = write_hugging_face(tmp_path / "checkpoint", "gpt2", {"vocab_size": 400, **ids}, ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert not [notice for notice in read(folder).notices if "transformers" in notice]
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (notice,) = (notice for notice in read(folder).notices if "transformers" in notice)
    assert "transformers' GPT2Tokenizer reads texts such as 'The cat sat on the mat.' otherwise" in notice


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama"])
def test_int8_passes_its_gate(family: str, tmp_path: Path) -> None:
    grouped = {"num_key_value_heads": 2} if family == "llama" else {}
    folder = write_hugging_face(tmp_path / "checkpoint", family, grouped, {}, sharpness=0.5)
    sentences = tmp_path / "sentences"
    sentences.write_text("\n".join(" ".join(map(str, range(2 + i, 12 + i))) for i in range(20)))
    per_row, _ = told(folder, "int8")
    calibrated, _ = told(folder, "int8", calibrate=sentences)
    for bundle in (per_row, calibrated):
        assert bundle.manifest.parity["forced_decode"]["relative_rms"] < 0.1  # type: ignore[index]
    assert set(per_row.manifest.files) == {f"decoder_piece_{i}.onnx" for i in range(3)} | {"weights.bin"}


def test_there_is_no_graph_for_cuda(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "checkpoint", "gpt2", {}, {})
    with pytest.raises(ExportError, match="gpt2 is a decoder without an encoder, which no graph for CUDA is yet"):
        told(folder, "fp16")


def test_outputs_of_the_users_own_model_are_compared(tmp_path: Path) -> None:
    import transformers

    folder = write_hugging_face(tmp_path / "checkpoint", "gpt2", {}, {}, seed=4)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    examples = []
    for prompt in ([5, 6, 7], [9], [11, 30, 2, 44]):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0].tolist()
        examples.append({"source_ids": prompt, "target_ids": output[len(prompt) :], "max_new_tokens": 9})
    file = tmp_path / "expected"
    file.write_text("\n".join(map(json.dumps, examples)))
    bundle, _ = told(folder, expect=file)
    assert bundle.manifest.parity["expected"] == {"examples": 3, "same": 3, "near_ties": 0}
    examples[1]["target_ids"][2] += 1
    file.write_text("\n".join(map(json.dumps, examples)))
    with pytest.raises(ExportError, match="the first that differs is in line 2, at token 3"):
        told(folder, name="other", expect=file)


def byte_level(texts: Sequence[str]) -> Tokenizer:
    """As GPT-2's: byte pairs of bytes, nothing around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_fallback(texts: Sequence[str]) -> Tokenizer:
    """As Llama's: byte pairs of characters, bytes of those that are not known, `<s>` before a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special[:3]))
    content = json.loads(tokenizer.to_str())
    known = content["model"]["vocab"]
    for token in special[3:]:
        known.setdefault(token, len(known))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize(
    ("family", "make", "special"),
    [
        ("gpt2", byte_level, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
        ("llama", byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    ],
)
def test_prompts_are_read_and_texts_written_as_transformers_do(
    family: str, make: Callable[[Sequence[str]], Tokenizer], special: dict[str, str], tmp_path: Path
) -> None:
    tokenizer = make(list(lines(200)))
    size = tokenizer.get_vocab_size()
    ids = {name.replace("token", "token_id"): tokenizer.token_to_id(token) for name, token in special.items()}
    ids = {name: number for name, number in ids.items() if name in ("bos_token_id", "eos_token_id")}
    folder = write_hugging_face(tmp_path / "checkpoint", family, {"vocab_size": size, **ids}, ids)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    bundle, _ = told(folder)
    ours = load_tokenizer(bundle)
    assert ours is not None
    assert_alike(ours, AutoTokenizer.from_pretrained(folder), size)
    if family == "llama":
        assert bundle.manifest.special_tokens.source_bos == 1
        assert ours.encode("") == [1]
    else:
        assert ours.encode("") == []
    assert len(TEXTS) == 2000


def makemore(folder: Path, *, words: str = "emma\nolivia\n", **config: Any) -> Path:
    """A folder as makemore leaves it, with a config.json."""
    characters = sorted({*words} - {"\n"})
    torch.manual_seed(0)
    width, layers, positions = 16, 2, 12
    shapes = {
        "transformer.wte.weight": (len(characters) + 1, width),
        "transformer.wpe.weight": (positions, width),
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
        "lm_head.weight": (len(characters) + 1, width),
    }
    for i in range(layers):
        block = f"transformer.h.{i}"
        for name, out, into in (
            ("attn.c_attn", 3 * width, width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        shapes |= {f"{block}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes[f"{block}.attn.bias"] = (1, 1, positions, positions)
    folder.mkdir()
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.pt")
    (folder / "names.txt").write_text(words)
    told = {"model_type": "makemore", "words_file": "names.txt", "n_head": 2, **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in told.items() if v is not ...}))
    return folder


def test_makemores_transformer_reads_and_writes_characters(tmp_path: Path) -> None:
    bundle, said = told(makemore(tmp_path / "names", words="zoë\nan\n"))
    tokens = bundle.manifest.special_tokens
    assert (tokens.decoder_start, tokens.eos, tokens.source_bos) == (0, (0,), 0)
    assert bundle.manifest.generation_defaults.max_new_tokens == 11
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    assert tokenizer.encode("zoë") == [0, 4, 3, 5]
    assert tokenizer.decode([4, 3, 5, 0]) == "zoë"
    assert "warning" not in said


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"n_head": 3}, "decoder_heads 3 does not divide d_model 16"),
        ({"characters": "abc"}, "characters and words_file say the same"),
        ({"words_file": "../names.txt"}, "words_file must be the name of a file of the folder"),
        ({"words_file": "none.txt"}, r"none\.txt cannot be read"),
        ({"words_file": ..., "characters": "abca"}, "characters must be a text of whole characters in which none"),
        ({"words_file": ..., "characters": "ab\ud800"}, "characters must be a text of whole characters in which none"),
        ({"words_file": "a\0b"}, "cannot be read"),
        ({"generation": {"eos_token_id": 3}}, "eos_token_id is makemore's own, 0; leave it out"),
        ({"words_file": ..., "characters": "abc"}, "there are 3 characters, the model has 8 tokens"),
        ({"block_size": 16}, "block_size is not known"),
        ({"generation": {"num_beam": 2}}, "generation: num_beam is not known"),
    ],
)
def test_a_config_of_makemore_that_makes_no_sense_is_refused(
    config: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=problem):
        read(makemore(tmp_path / "names", **config))


def test_weights_of_another_kind_are_not_makemores(tmp_path: Path) -> None:
    folder = makemore(tmp_path / "names")
    torch.save({"rnn.weight": torch.zeros(2, 2)}, folder / "model.pt")
    with pytest.raises(ExportError, match="the weights are not makemore's Transformer"):
        read(folder)


def test_without_characters_makemores_tokens_are_numbers(tmp_path: Path) -> None:
    bundle, said = told(makemore(tmp_path / "names", words_file=...))
    assert bundle.manifest.tokenizer.kind == "none"
    assert "config.json names no characters and no words_file" in said
