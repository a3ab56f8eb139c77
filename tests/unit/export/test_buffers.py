"""Buffers of a module: position tables are known by their values, under any name; another table is an error."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beamline_export.families.positions import FORMULAS, interleaved_positions
from beamline_export.families.registry import detect
from beamline_export.spec import Checkpoint as Read
from beamline_export.spec import ExportError, check_weights


def read(folder: Path) -> Read:
    checkpoint = detect(folder).read(folder)
    check_weights(checkpoint)
    return checkpoint


def table(rows: int, width: int = 32) -> torch.Tensor:
    """As most modules compute it, in fp32."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(rows)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def holding(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.update({name: tensor.contiguous()})


@pytest.mark.parametrize("name", ["pos_encoding.pe", "positional_encoding.pos_embedding", "src_embed.pe", "buf.xyz"])
@pytest.mark.parametrize(
    "shape",
    [(48, 32), (1, 48, 32), (48, 1, 32), (9, 1, 32), (1, 5000, 32), (1, 1, 32)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_the_papers_table_is_known_under_any_name_and_shape(name: str, shape: tuple[int, ...], checkpoint: Any) -> None:
    plain = read(checkpoint.folder)
    buffered = read(checkpoint.tensors(holding(name, table(max(shape[:-1])).reshape(shape))))
    assert buffered.weights["source_positions"] is buffered.weights["target_positions"]
    assert buffered.weights["source_positions"] == pytest.approx(plain.weights["source_positions"], abs=1e-5)
    assert buffered.notices == ()


def test_the_papers_table_is_no_reason_where_the_embeddings_have_other_names(checkpoint: Any) -> None:
    checkpoint.tensors(lambda state: state.update({"table": table(40), "in_tok.weight": state.pop("src_embed.weight")}))
    with pytest.raises(ExportError) as caught:
        read(checkpoint.folder)
    assert "not part of the model: in_tok.weight [90, 32]; missing: " in str(caught.value)
    assert "sinusoidal" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_in_half_precision_is_used_as_it_is(dtype: torch.dtype, checkpoint: Any) -> None:
    """As the model itself reads it: rounding included, where the file has it; the other rows are computed."""
    half = table(20).to(dtype)
    found = read(checkpoint.tensors(holding("pe", half))).weights["source_positions"]
    assert (found[:20] == half.float().numpy()).all()
    assert (found[20:] == interleaved_positions(48, 32)[20:]).all()


def test_a_long_table_that_fp32_computed_is_known(checkpoint: Any) -> None:
    """Angles of thousands are rounded more coarsely."""
    checkpoint.config(max_positions=5000)
    read(checkpoint.tensors(holding("pe", table(5000))))


@pytest.mark.parametrize(
    ("text", "formula"), [item for item in FORMULAS.items() if "sine at even and c" not in item[0]]
)
@pytest.mark.parametrize("name", ["pos_encoding.pe", "positional_encoding.pos_embedding", "src_embed.1.pe"])
def test_another_table_is_refused_by_its_formula(name: str, text: str, formula: Any, checkpoint: Any) -> None:
    other = torch.from_numpy(formula(np.arange(48), 32))[:, None]
    with pytest.raises(ExportError) as caught:
        read(checkpoint.tensors(holding(name, other)))
    assert f"not part of the model: {name} [48, 1, 32] (a sinusoidal table, but {text}; to use it" in str(caught.value)
    # What the message advises works.
    found = read(checkpoint.config(positions="learned", names={name: "positions.weight"})).weights
    assert (found["source_positions"] == other[:, 0].numpy()).all()
    assert found["target_positions"] is found["source_positions"]


def test_a_table_that_begins_elsewhere_is_refused(checkpoint: Any) -> None:
    with pytest.raises(ExportError, match="odd features, from position 1 on; to use it as it is"):
        read(checkpoint.tensors(holding("pe", table(49)[1:])))


@pytest.mark.parametrize("name", ["pe", "pos_embedding", "position_embeddings.weight", "encoder_pos.sinusoid"])
@pytest.mark.parametrize("tensor", [torch.zeros(1, 48, 32), torch.ones(48, 16), torch.ones(3)], ids=str)
def test_anything_else_that_is_called_a_table_is_refused(name: str, tensor: torch.Tensor, checkpoint: Any) -> None:
    with pytest.raises(ExportError, match=rf"model: {name} \[.*\] \(not the sinusoidal table that the config asks for"):
        read(checkpoint.tensors(holding(name, tensor)))


MASKS = {
    "infinite": torch.nn.Transformer.generate_square_subsequent_mask(9),
    "boolean": torch.ones(9, 9, dtype=torch.bool).triu(1),
    "allowed": torch.ones(1, 1, 9, 9).tril(),
    "large": torch.ones(9, 9).triu(1) * -1e9,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_causal_mask_is_left_out_and_told(mask: torch.Tensor, checkpoint: Any) -> None:
    plain = read(checkpoint.folder)
    masked = read(checkpoint.tensors(holding("transformer.tgt_mask", mask)))
    assert set(masked.weights) == set(plain.weights)
    assert masked.notices == ("transformer.tgt_mask is a causal mask, which every decoder has; it is left out",)


def test_a_numbering_of_positions_is_left_out_and_told(checkpoint: Any) -> None:
    numbered = read(checkpoint.tensors(holding("position_ids", torch.arange(48)[None])))
    assert numbered.notices == ("position_ids only numbers positions; it is left out",)


@pytest.mark.parametrize("mask", [torch.ones(9, 9), torch.eye(9), torch.ones(9, 9).triu(), torch.ones(4, 9).tril()])
def test_other_squares_are_no_masks(mask: torch.Tensor, checkpoint: Any) -> None:
    with pytest.raises(ExportError, match=r"not part of the model: tgt_mask \["):
        read(checkpoint.tensors(holding("tgt_mask", mask)))


def test_counters_are_told_as_such(checkpoint: Any) -> None:
    with pytest.raises(ExportError, match=r"bn\.num_batches_tracked \[\] \(a single number, as counters are\)"):
        read(checkpoint.tensors(holding("bn.num_batches_tracked", torch.tensor(5))))


@pytest.mark.parametrize(
    ("source", "target"),
    [("src_pos.pe", "tgt_pos.pe"), ("encoder.pos_enc.pe", "decoder.pos_enc.pe"), ("source_pe.pos", "target_pe.pos")],
)
def test_of_two_tables_each_is_advised_for_its_side(source: str, target: str, checkpoint: Any) -> None:
    first, second = (torch.flip(table(48), [1]) * factor for factor in (1, 0.5))
    checkpoint.tensors(lambda state: state.update({source: first.contiguous(), target: second.contiguous()}))
    advised = {source: "src_positions.weight", target: "tgt_positions.weight"}
    with pytest.raises(ExportError) as caught:
        read(checkpoint.folder)
    for name, meant in advised.items():
        assert f'"names": {{"{name}": "{meant}"}}' in str(caught.value)
    weights = read(checkpoint.config(positions="learned", names=advised)).weights
    assert (weights["source_positions"] == first.numpy()).all()
    assert (weights["target_positions"] == second.numpy()).all()


def test_of_one_side_that_has_the_papers_table_the_other_is_told_as_its_own(checkpoint: Any) -> None:
    checkpoint.tensors(lambda state: state.update({"src_pos.pe": table(48), "tgt_pos.pe": torch.zeros(48, 32)}))
    with pytest.raises(ExportError, match=r'"names": \{"tgt_pos\.pe": "tgt_positions\.weight"\}'):
        read(checkpoint.folder)


@pytest.mark.parametrize("names", [("a.pe", "b.pe"), ("src_a.pe", "src_b.pe"), ("src_tgt.pe", "tgt.pe")])
def test_of_two_tables_whose_names_tell_no_side_both_are_advised(names: tuple[str, str], checkpoint: Any) -> None:
    checkpoint.tensors(lambda state: state.update({name: torch.zeros(48, 32) for name in names}))
    with pytest.raises(ExportError) as caught:
        read(checkpoint.folder)
    for name in names:
        wanted = f'"names": {{"{name}": "src_positions.weight"}}, or "tgt_positions.weight" if it is the target\'s'
        assert wanted in str(caught.value)


def test_beside_two_tables_what_is_only_called_one_is_told_as_well(checkpoint: Any) -> None:
    tables = {"src_pos.pe": torch.zeros(48, 32), "tgt_pos.pe": torch.ones(48, 32), "pe": torch.ones(3)}
    checkpoint.tensors(lambda state: state.update(tables))
    with pytest.raises(ExportError, match=r"model: pe \[3\] \(not the sinusoidal table that the config asks for"):
        read(checkpoint.folder)
