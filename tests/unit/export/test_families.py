"""How each family reads its folder: names, ties, tokenizer files, and configs that make no sense."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from beamline_export.checkpoint import read_state_dict
from beamline_export.families.positions import interleaved_positions, sinusoidal_positions
from beamline_export.families.refused import REFUSED
from beamline_export.families.registry import FAMILIES, detect
from beamline_export.spec import Checkpoint as Read
from beamline_export.spec import ExportError, check_weights

FAMILY_FIELDS = {
    "nn_transformer": [
        "d_model", "nhead", "num_encoder_layers", "dim_feedforward", "activation", "norm_first", "layer_norm_eps",
        "positions", "max_positions", "source_vocab_size", "target_vocab_size", "tie_embeddings", "scale_embedding",
        "eos_token_id", "decoder_start_token_id", "source_eos_token_id", "generation", "num_beams", "length_penalty",
        "early_stopping", "max_length", "bad_words_ids", "suppress_tokens", "forced_eos_token_id",
    ],
    "marian": [
        "d_model", "vocab_size", "encoder_layers", "decoder_attention_heads", "decoder_ffn_dim",
        "activation_function", "scale_embedding", "max_position_embeddings", "share_encoder_decoder_embeddings",
        "tie_word_embeddings", "static_position_embeddings",
    ],
    "m2m_100": ["pad_token_id", "scale_embedding", "tie_word_embeddings", "max_position_embeddings"],
    "fsmt": ["src_vocab_size", "tgt_vocab_size", "pad_token_id"],
    "mvp": ["use_prompt", "encoder_ffn_dim"],
    "bart": ["d_model", "vocab_size", "max_position_embeddings", "normalize_before", "bos_token_id", "decoder_layers"],
    "gpt2": [
        "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size", "activation_function",
        "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
        "tie_word_embeddings", "is_encoder_decoder",
    ],
    "gpt_neox": [
        "rotary_pct", "rotary_emb_base", "use_parallel_residual", "attention_bias", "rope_parameters", "rope_scaling",
    ],
    "opt": [
        "do_layer_norm_before", "word_embed_proj_dim", "_remove_final_layer_norm", "enable_bias", "ffn_dim",
        "layer_norm_elementwise_affine", "max_position_embeddings",
    ],
    "llama": [
        "head_dim", "num_key_value_heads", "rms_norm_eps", "attention_bias", "mlp_bias", "hidden_act",
        "max_position_embeddings", "rope_parameters", "intermediate_size",
    ],
    "mistral": ["sliding_window"],
    "qwen2": ["use_sliding_window"],
    "t5": [
        "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "vocab_size", "n_positions",
        "feed_forward_proj", "dense_act_fn", "is_gated_act", "relative_attention_num_buckets", "layer_norm_epsilon",
        "relative_attention_max_distance", "tie_word_embeddings", "scale_decoder_outputs", "is_encoder_decoder",
        "tokenizer_class",
    ],
}  # fmt: skip
ODD_VALUES = [
    "512",
    "",
    -1,
    0,
    7,
    10**7,
    10**30,
    1e300,
    0.5,
    float("nan"),
    [],
    [[1]],
    [["x", {}]],
    {},
    {"a": [1]},
    True,
]


def read(folder: Any) -> Read:
    checkpoint = detect(folder).read(folder)
    check_weights(checkpoint)
    return checkpoint


@pytest.mark.parametrize(("family", "field"), [(f, name) for f, names in FAMILY_FIELDS.items() for name in names])
def test_no_value_of_a_config_field_is_worse_than_an_export_error(
    family: str, field: str, make_checkpoint: Callable[[str], Any]
) -> None:
    """Whatever stands there, reading works or says in one line what is wrong."""
    checkpoint = make_checkpoint(family)
    messages = []
    for value in ODD_VALUES:
        folder = checkpoint.config(**{field: value})
        try:
            read(folder)
        except ExportError as error:
            messages.append(str(error))
    assert messages, "some of these values make no sense anywhere"
    assert not any("\n" in message or len(message) > 2500 for message in messages)


@pytest.mark.parametrize("model_type", ["perceiver", None, 3, ["marian"], {"marian": 1}, "../marian"])
def test_an_unknown_model_type_lists_the_known_ones(model_type: object, checkpoint: Any) -> None:
    wrong = "is missing" if model_type is None else "is not known"
    with pytest.raises(ExportError, match=rf"{wrong} \(known: {', '.join(FAMILIES)}\)"):
        detect(checkpoint.config(model_type=model_type))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("led", "attention is sparse"),
        ("switch_transformers", "mixtures of experts"),
        ("prophetnet", "attention in several streams"),
        ("whisper", "source is audio"),
        ("encoder-decoder", "joins two models"),
        ("gptj", "a decoder alone"),
        ("mixtral", "mixtures of experts"),
        ("bert", "an encoder alone"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_reason(model_type: str, reason: str, checkpoint: Any) -> None:
    with pytest.raises(ExportError, match=f"model_type '{model_type}' is not supported: .*{reason}.*; "):
        detect(checkpoint.config(model_type=model_type))


def test_what_is_refused_is_a_type_of_transformers_and_no_family() -> None:
    """As far as the installed version has it: some types are of others."""
    assert REFUSED.keys().isdisjoint(FAMILIES)
    assert all("; " in reason for reason in REFUSED.values())
    known = REFUSED.keys() & CONFIG_MAPPING_NAMES.keys()
    assert len(known) > 0.9 * len(REFUSED)


def test_weights_of_a_family_are_those_of_transformers(make_checkpoint: Callable[[str], Any]) -> None:
    """Positions of a table with rows for padding begin after them."""
    checkpoint = make_checkpoint("fsmt")
    read_ = read(checkpoint.folder)
    state = load_file(checkpoint.weights)
    assert (read_.spec.source_vocabulary, read_.spec.target_vocabulary) == (90, 120)
    table = state["model.encoder.embed_positions.weight"].numpy()
    assert np.array_equal(read_.weights["source_positions"], table[1:])


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("mbart", {"normalize_before": False}, "normalize_before False is not supported"),
        ("pegasus", {"static_position_embeddings": False}, "static_position_embeddings False is not supported"),
        ("mvp", {"use_prompt": True}, "use_prompt True is not supported"),
        ("plbart", {"add_final_layer_norm": True}, "add_final_layer_norm True is not supported"),
        ("m2m_100", {"pad_token_id": None}, "pad_token_id is missing"),
        ("fsmt", {"vocab_size": 7}, "vocab_size is tgt_vocab_size under another name"),
        ("fsmt", {"tie_word_embeddings": True}, "src_vocab_size 90 and tgt_vocab_size 120 differ"),
        ("fsmt", {"pad_token_id": 100}, "pad_token_id 100 is outside the source vocabulary of 90"),
    ],
)
def test_what_a_family_does_not_do_is_refused_by_name(
    family: str, changes: dict[str, Any], told: str, make_checkpoint: Callable[[str], Any]
) -> None:
    with pytest.raises(ExportError, match=re.escape(told)):
        read(make_checkpoint(family).config(**changes))


def test_a_target_may_not_begin_with_a_token_that_is_not_numbered(make_checkpoint: Callable[[str], Any]) -> None:
    checkpoint = make_checkpoint("m2m_100")
    settings = checkpoint.folder / "generation_config.json"
    settings.write_text(settings.read_text().replace('"decoder_start_token_id": 2', '"decoder_start_token_id": 0'))
    with pytest.raises(ExportError, match="decoder_start_token_id 0 is the pad_token_id, which m2m_100 does not"):
        read(checkpoint.folder)


def test_a_table_with_positions_for_padding_is_refused(make_checkpoint: Callable[[str], Any]) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.decoder.embed_positions.weight"][0] += 1

    with pytest.raises(ExportError, match=r"decoder\.embed_positions\.weight: row 0, of padding, is not zero"):
        read(make_checkpoint("fsmt").tensors(change))


def test_a_file_is_no_checkpoint(checkpoint: Any) -> None:
    with pytest.raises(ExportError, match="is not a folder"):
        detect(checkpoint.weights)


def test_a_folder_without_config_says_so(checkpoint: Any) -> None:
    (checkpoint.folder / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json is missing"):
        detect(checkpoint.folder)


def test_an_embedding_larger_than_the_vocabulary_is_refused(checkpoint: Any) -> None:
    with pytest.raises(ExportError, match=r"src_embed\.weight has shape \[90, 32\], the config says \[80, 32\]"):
        read(checkpoint.config(source_vocab_size=80))


def test_missing_and_foreign_tensors_are_told_together_foreign_ones_first(checkpoint: Any) -> None:

    def rename(state: dict[str, torch.Tensor]) -> None:
        state["head.weight"] = state.pop("generator.weight")
        state["head.bias"] = state.pop("generator.bias")

    with pytest.raises(ExportError) as caught:
        read(checkpoint.tensors(rename))
    assert str(caught.value).startswith(
        "the checkpoint does not fit its config: not part of the model: head.bias [120], head.weight [120, 32]; "
        'missing: generator.weight; where names differ, "names" or "layout" in config.json tell'
    )


def test_a_missing_embedding_is_not_told_as_missing_positions(checkpoint: Any) -> None:
    """Tables that are computed lack only because nothing says how wide they may be."""
    with pytest.raises(ExportError, match=r"config: missing: src_embed\.weight; where names"):
        read(checkpoint.tensors(lambda state: state.pop("src_embed.weight")))


@pytest.mark.parametrize("family", ["marian", "bart"])
def test_a_hugging_face_folder_of_other_names_is_told_by_them(
    family: str, make_checkpoint: Callable[[str], Any]
) -> None:
    def wrap(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[f"module.{name}"] = state.pop(name)

    with pytest.raises(ExportError) as caught:
        read(make_checkpoint(family).tensors(wrap))
    assert "config: not part of the model: module." in str(caught.value)
    assert "missing: model.shared.weight, " in str(caught.value)
    assert not re.search(r"(source|target)_positions", str(caught.value))


def test_a_learned_table_without_learned_positions_is_foreign(checkpoint: Any) -> None:
    with pytest.raises(ExportError, match=r"not part of the model: src_positions\.weight \[48, 32\] \(not the sinu"):
        read(checkpoint.tensors(lambda state: state.update({"src_positions.weight": torch.zeros(48, 32)})))


def test_one_learned_table_serves_both_stacks(checkpoint: Any) -> None:
    checkpoint.tensors(lambda state: state.update({"positions.weight": torch.ones(48, 32)}))
    weights = read(checkpoint.config(positions="learned")).weights
    assert weights["source_positions"] is weights["target_positions"]


def test_of_a_tie_that_is_none_each_table_is_used_and_told(checkpoint: Any) -> None:
    untied = read(checkpoint.folder)
    tied = read(checkpoint.config(tie_embeddings=True))
    for name in ("target_embedding", "head.weight"):
        assert (tied.weights[name] == untied.weights[name]).all()
    assert tied.notices == (
        "tie_embeddings is true, but tgt_embed.weight and generator.weight differ in the file; each is used as it is",
    )
    assert untied.notices == ()


def test_a_bias_that_is_forgotten_is_told(checkpoint: Any) -> None:
    """A model without any has none, as its file shows."""

    def forget(state: dict[str, torch.Tensor]) -> None:
        del state["generator.bias"], state["transformer.encoder.layers.0.linear1.bias"]

    (notice,) = read(checkpoint.tensors(forget)).notices
    assert notice == (
        "not in the file: generator.bias, transformer.encoder.layers.0.linear1.bias; zeros are used, which is right if "
        "the model has none there"
    )
    checkpoint.tensors(lambda state: [state.pop(name) for name in list(state) if name.endswith("bias")])
    assert read(checkpoint.folder).notices == ()


@pytest.mark.parametrize("kept", ["tgt_embed.weight", "generator.weight"])
def test_of_tied_weights_either_may_be_in_the_file(kept: str, checkpoint: Any) -> None:
    other = {"tgt_embed.weight", "generator.weight"} - {kept}
    checkpoint.tensors(lambda state: [state.pop(name) for name in other])
    weights = read(checkpoint.config(tie_embeddings=True)).weights
    assert weights["head.weight"] is weights["target_embedding"]


def test_a_bare_bart_is_read(make_checkpoint: Callable[[str], Any]) -> None:
    """Pretrained BART is published without its head, and without the prefix that goes with one."""

    def strip(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            tensor = state.pop(name)
            if name.startswith("model."):
                state[name.removeprefix("model.")] = tensor

    bart = make_checkpoint("bart")
    expected = read(bart.folder).weights
    found = read(bart.tensors(strip)).weights
    assert set(found) == set(expected)
    assert (found["source_embedding"] == expected["source_embedding"]).all()
    assert not found["head.bias"].any()


@pytest.mark.parametrize("setting", ["normalize_before", "add_final_layer_norm"])
def test_a_bart_of_another_shape_is_refused(setting: str, make_checkpoint: Callable[[str], Any]) -> None:
    with pytest.raises(ExportError, match=rf"{setting} True is not supported \(only false is\)"):
        read(make_checkpoint("bart").config(**{setting: True}))


def test_barts_positions_begin_at_their_offset(make_checkpoint: Callable[[str], Any]) -> None:
    bart = make_checkpoint("bart")
    table = load_file(bart.weights)["model.encoder.embed_positions.weight"]
    assert (read(bart.folder).weights["source_positions"] == table[2:].numpy()).all()


@pytest.mark.parametrize("missing", ["source.spm", "target.spm", "vocab.json"])
def test_half_a_marian_tokenizer_is_refused(missing: str, make_checkpoint: Callable[[str], Any]) -> None:
    marian = make_checkpoint("marian")
    for name in {"source.spm", "target.spm", "vocab.json"} - {missing}:
        (marian.folder / name).write_bytes(b"")
    with pytest.raises(ExportError, match=f"lacks {missing} of its tokenizer"):
        read(marian.folder)


def test_bart_with_merges_only_says_how_to_write_its_tokenizer(make_checkpoint: Callable[[str], Any]) -> None:
    bart = make_checkpoint("bart")
    (bart.folder / "merges.txt").write_text("")
    with pytest.raises(ExportError, match=r"no tokenizer\.json; write it with"):
        read(bart.folder)


def test_one_of_two_sentencepiece_models_is_refused(checkpoint: Any) -> None:
    (checkpoint.folder / "source.spm").write_bytes(b"")
    with pytest.raises(ExportError, match=r"only one of source\.spm and target\.spm"):
        read(checkpoint.folder)


def test_tokenizer_files_are_found(checkpoint: Any) -> None:
    (checkpoint.folder / "tokenizer.json").write_text("{}")
    (checkpoint.folder / "target_tokenizer.json").write_text("{}")
    found = read(checkpoint.folder)
    assert found.tokenizer_kind == "tokenizers"
    assert set(found.tokenizer_files) == {"tokenizer.json", "target_tokenizer.json"}


@pytest.mark.parametrize("width", [1, 5, 8])
def test_position_tables_follow_their_formulas(width: int) -> None:
    """The paper interleaves sines and cosines; Marian puts all sines first."""
    paper, marian = interleaved_positions(7, width), sinusoidal_positions(7, width)
    half = (width + 1) // 2
    for position in range(7):
        for i in range(width):
            angle = position / 10000 ** (2 * (i // 2) / width)
            expected = np.cos(angle) if i % 2 else np.sin(angle)
            assert paper[position, i] == pytest.approx(expected, abs=1e-6)
            assert marian[position, i // 2 + (half if i % 2 else 0)] == pytest.approx(expected, abs=1e-6)


def test_the_reference_is_built_from_the_file_alone(checkpoint: Any) -> None:
    """Not from the weights that are exported: a wrong name there must show."""
    family = detect(checkpoint.folder)
    read_once = family.read(checkpoint.folder)
    reference = family.reference(checkpoint.folder, read_once)
    before = reference.logprobs([4, 1], [[2, 5]])
    for array in read_once.weights.values():
        array.fill(0)
    assert (reference.logprobs([4, 1], [[2, 5]]) == before).all()
    assert np.exp(before).sum(-1) == pytest.approx(1, abs=1e-5)
    assert read_state_dict(checkpoint.folder)["generator.bias"].any()


TABLES = ("src_embed.weight", "tgt_embed.weight", "generator.weight")


@pytest.mark.parametrize("kept", TABLES)
def test_of_three_tied_tables_any_may_be_in_the_file(kept: str, checkpoint: Any) -> None:
    one = torch.rand(120, 32)
    checkpoint.tensors(lambda state: [[state.pop(name) for name in TABLES], state.update({kept: one})])
    checkpoint.config(source_vocab_size=120)
    with pytest.raises(ExportError, match='where one table serves as several, "tie_embeddings"'):
        read(checkpoint.folder)
    found = read(checkpoint.config(tie_embeddings="all"))
    for name in ("source_embedding", "target_embedding", "head.weight"):
        assert found.weights[name] is found.weights["source_embedding"]
        assert (found.weights[name] == one.numpy()).all()
    assert found.notices == ()


def test_of_three_tied_tables_that_differ_each_is_used_and_told(checkpoint: Any) -> None:
    checkpoint.tensors(lambda state: state.pop("src_embed.weight"))
    found = read(checkpoint.config(tie_embeddings="all", source_vocab_size=120))
    assert found.weights["source_embedding"] is found.weights["target_embedding"]
    assert found.notices == (
        'tie_embeddings is "all", but tgt_embed.weight and generator.weight differ in the file; each is used as it is',
    )
