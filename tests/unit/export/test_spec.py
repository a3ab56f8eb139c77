"""A checkpoint is compared with its config, and all that is wrong is told at once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from beamline_export.families.registry import detect
from beamline_export.spec import Checkpoint, ExportError, check_weights, required_weights
from beamline_export.testing import HUGGING_FACE_CLASSES


@pytest.fixture
def read(pristine: Path) -> Checkpoint:
    folder = pristine / "nn_transformer"
    return detect(folder).read(folder)


def with_weights(checkpoint: Checkpoint, change: Callable[[dict[str, object]], object]) -> Checkpoint:
    weights = dict(checkpoint.weights)
    change(weights)  # type: ignore[arg-type]
    return dataclasses.replace(checkpoint, weights=weights)


def test_every_family_reads_exactly_what_its_spec_requires(pristine: Path) -> None:
    for family in (*HUGGING_FACE_CLASSES, "nn_transformer"):
        checkpoint = detect(pristine / family).read(pristine / family)
        assert set(checkpoint.weights) == set(required_weights(checkpoint.spec))
        check_weights(checkpoint)


def test_all_problems_are_told_at_once_by_the_checkpoints_own_names(read: Checkpoint) -> None:
    def spoil(weights: dict[str, np.ndarray]) -> None:
        del weights["encoder.0.ffn.up.weight"]
        weights["head.weight"] = np.zeros((3, 4), np.float32)
        weights["decoder.0.ffn_norm.bias"] = np.full(32, np.nan, np.float32)
        weights["source_embedding"] = np.where(weights["source_embedding"] > 0, np.inf, 0).astype(np.float32)

    spoilt = with_weights(read, spoil)  # type: ignore[arg-type]
    with pytest.raises(ExportError) as caught:
        check_weights(dataclasses.replace(spoilt, foreign={"stray.weight": "[1]"}, advice="do something"))
    assert str(caught.value) == (
        "the checkpoint does not fit its config: "
        "not part of the model: stray.weight [1]; "
        "missing: transformer.encoder.layers.0.linear1.weight; "
        "src_embed.weight holds values that are not finite; "
        "generator.weight has shape [3, 4], the config says [120, 32]; "
        "transformer.decoder.layers.0.norm3.bias holds values that are not finite; "
        "do something"
    )


def test_many_problems_are_cut_and_counted(read: Checkpoint) -> None:
    with pytest.raises(ExportError, match=r"missing: src_embed\.weight, .*, and \d+ more"):
        check_weights(with_weights(read, lambda weights: weights.clear()))


def test_layers_that_miss_the_same_are_told_once(read: Checkpoint) -> None:
    names = {f"decoder.layers.{i}.attention.gate.{kind}": "[4]" for i in range(12) for kind in ("weight", "bias")}
    with pytest.raises(ExportError) as caught:
        check_weights(dataclasses.replace(read, foreign=names))
    assert "not part of the model: decoder.layers.N.attention.gate.weight [4] (12 times), decoder" in str(caught.value)


def test_an_impossible_spec_is_told_with_the_rest(read: Checkpoint) -> None:
    spec = dataclasses.replace(read.spec, encoder_heads=5, max_target_positions=0, decoder_layers=0)
    problems = list(spec.problems())
    assert problems == [
        "encoder_heads 5 does not divide d_model 32",
        "decoder_layers is 0; it must be at least 1",
        "max_target_positions is 0; it must be at least 1",
    ]
