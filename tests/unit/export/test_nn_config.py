"""The config.json of an nn.Transformer: what is misspelt, or without effect, is an error, and all of it at once."""

import re
from pathlib import Path
from typing import Any

import pytest

from beamline_export.families.nn_config import OTHER_NAMES, read_config
from beamline_export.families.registry import detect
from beamline_export.spec import ExportError, NormPlacement
from beamline_export.testing import nn_config

PAGE = (Path(__file__).parents[3] / "docs" / "bring-your-model.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"norm_frist": True}, r"norm_frist is not known \(did you mean norm_first\?\)"),
        ({"scale_embeddings": False}, r"scale_embeddings is not known \(did you mean scale_embedding\?\)"),
        ({"eos_token_ids": 1}, r"eos_token_ids is not known \(did you mean eos_token_id\?\)"),
        ({"num_beam": 4}, r"num_beam is not known \(did you mean num_beams\?\)"),
        ({"zzz": None}, "zzz is not known"),
        ({"num_heads": 4}, r"num_heads is not known \(did you mean nhead\?\)"),
        ({"num_attention_heads": 4}, r"num_attention_heads is not known \(did you mean nhead\?\)"),
        ({"hidden_size": 32}, r"hidden_size is not known \(did you mean d_model\?\)"),
        ({"dim_ff": 48}, r"dim_ff is not known \(did you mean dim_feedforward\?\)"),
        ({"num_layers": 2}, r"num_layers is not known \(did you mean num_encoder_layers and num_decoder_layers\?\)"),
        ({"layer_norm_eps": -1}, r"layer_norm_eps must be a number from 0 to 1e\+30, not -1"),
        ({"layer_norm_eps": -1e-9, "layout": "annotated_transformer"}, "layer_norm_eps must be a number from 0"),
        ({"decoder_start_token_id": None}, "names no decoder_start_token_id; add it$"),
        ({"tie_embeddings": "both"}, r'tie_embeddings \'both\' is not known \(known: false, true, "all"\)'),
        (
            {"tie_embeddings": "all"},
            r'tie_embeddings is "all", but source_vocab_size is 90 and target_vocab_size is 120; one table',
        ),
        ({"generation": {"num_beam": 4}}, r"generation: num_beam is not known \(did you mean num_beams\?\)"),
        ({"generation": {"norm_first": True}}, "generation: norm_first is not known"),
        ({"num_beams": 4, "generation": {"num_beams": 2}}, "num_beams is 4 at the top level and 2 in generation"),
        ({"layout": "pytorch"}, r"layout 'pytorch' is not known \(known: beamline, pytorch_tutorial, annotated"),
        ({"final_norm": "both"}, r'final_norm \'both\' is not known \(known: true, false, "encoder", "decoder"\)'),
        ({"layout": "annotated_transformer", "norm_first": False}, r"norm_first False is not supported \(only true"),
        ({"layout": "annotated_transformer", "final_norm": False}, "final_norm False is not supported"),
    ],
)
def test_what_config_json_may_not_say_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ExportError, match=rf"config\.json: .*{problem}"):
        read_config(nn_config(**changes))


def test_all_of_it_is_told_at_once() -> None:
    with pytest.raises(ExportError) as caught:
        read_config(nn_config(d_model="x", norm_frist=True, zzz=1, generation={"num_beam": 2, "length_penalty": "x"}))
    for name in ("d_model must be", "norm_frist", "zzz", "generation: num_beam", "length_penalty must be"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "x", "_notes": ["trained by me"], "architectures": ["A"], "transformers_version": "5"},
        {"dtype": "float32", "torch_dtype": "float32", "dropout": 0.1, "batch_first": True, "bias": True},
        {"num_beams": 4, "length_penalty": 0.6, "temperature": 0.7, "use_cache": True, "top_k": 5},
        {"num_beams": 4, "generation": {"num_beams": 4, "max_new_tokens": 9, "eos_token_id": 1}},
        {"layout": "annotated_transformer", "norm_first": True, "final_norm": True, "positions": "learned"},
        {"layer_norm_eps": 0},
        {"tie_embeddings": "all", "source_vocab_size": 120},
    ],
)
def test_what_changes_nothing_or_belongs_there_is_accepted(changes: dict[str, Any]) -> None:
    read_config(nn_config(**changes))


@pytest.mark.parametrize(
    ("final_norm", "expected"),
    [(True, (True, True)), (None, (True, True)), (False, (False, False)), ("encoder", (True, False)),
     ("decoder", (False, True))],
)  # fmt: skip
def test_final_norms_are_for_each_stack(final_norm: object, expected: tuple[bool, bool]) -> None:
    spec = read_config(nn_config(final_norm=final_norm)).spec
    assert (spec.encoder_final_norm, spec.decoder_final_norm) == expected


def test_the_annotated_transformer_is_pre_norm() -> None:
    config = read_config(nn_config(layout="annotated_transformer"))
    assert config.spec.norm_placement is NormPlacement.PRE
    assert config.norm_epsilon == 1e-6
    assert 0 < config.spec.norm_epsilon < 1e-12


def test_without_an_end_of_sequence_the_reader_is_told(checkpoint: Any) -> None:
    folder = checkpoint.config(eos_token_id=None)
    read = detect(folder).read(folder)
    assert read.special_tokens.eos == ()
    (notice,) = read.notices
    assert "names no eos_token_id" in notice
    assert "max_new_tokens" in notice


def test_the_page_has_every_key() -> None:
    config = set(re.findall(r"`(\w+)`", PAGE.split("## A plain torch")[1].split("| config.json |")[1].split("```")[0]))
    read = {"layout", "names", "final_norm", "positions", "tie_embeddings", "source_bos_token_id", "generation"}
    assert config >= read | set(nn_config()) - {"model_type"}


def test_settings_that_are_for_other_families_are_told(checkpoint: Any) -> None:
    folder = checkpoint.config()
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    (folder / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    read = detect(folder).read(folder)
    assert read.generation["beam_size"] == 1
    (notice,) = read.notices
    assert notice.startswith("generation_config.json, tokenizer_config.json: not read;")


def test_every_other_name_leads_to_keys_of_the_config() -> None:
    asked = set(nn_config())
    for meant in OTHER_NAMES.values():
        assert asked >= set(meant.split(" and "))
    assert not OTHER_NAMES.keys() & asked
