"""An export whose graphs multiply by something else than its weights makes no bundle, however little that shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.graph_writer import Make, WeightsFile
from beamline_export.progress import Progress
from beamline_export.spec import ExportError
from beamline_export.stored_weights import MOST_ERROR, probe
from beamline_export.testing import nn_config, write_hugging_face, write_nn_transformer
from beamline_server.bundle import Bundle

SENTENCES = "".join(f"{a} {b} {a} 1\n" for a in range(4, 24) for b in (30, 60, 80))


def options(precision: str, folder: Path) -> ExportOptions:
    """`calibrated` is int8 with ranges."""
    if precision != "calibrated":
        return ExportOptions(precision)
    (folder / "sentences.txt").write_text(SENTENCES)
    return ExportOptions("int8", calibrate=folder / "sentences.txt")


def change_what_is_stored(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> list[str]:
    """Make the file of weights hold another array of this name; returns what has been changed."""
    store, changed = WeightsFile.store, []

    def other(file: WeightsFile, stored: str, make: Make) -> Any:
        if stored != name:
            return store(file, stored, make)
        changed.append(stored)
        return store(file, stored, lambda: change(make()).astype(make().dtype))

    monkeypatch.setattr(WeightsFile, "store", other)
    return changed


@pytest.mark.parametrize("factor", [2, 0.5])
@pytest.mark.parametrize("precision", ["int8", "calibrated", "int4"])
@pytest.mark.parametrize("name", ["encoder.0.ffn.up", "decoder.0.self_attention.qkv", "cross_kv"])
def test_a_scale_that_is_wrong_by_two_is_refused(
    name: str, precision: str, factor: float, pristine: Path, tmp_path: Path, silent: Progress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    changed = change_what_is_stored(monkeypatch, f"{name}.scale", lambda scales: scales * factor)
    message = rf"1 weights are not stored as they are \({name} by (0\.[45]|1|0\.9).* of their size; allowed: 0.25\)"
    with pytest.raises(ExportError, match=message):
        export(pristine / "bart", tmp_path / "bundle", options(precision, tmp_path), silent)
    assert changed
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("decoder.0.ffn.down", lambda steps: steps >> 4 | steps << 4),
        ("decoder.0.ffn.down", lambda steps: steps[::-1]),
        ("decoder.0.ffn.down.zero", lambda zeros: zeros + 1),
        ("decoder.0.ffn.down.scale", lambda scales: scales * np.nan),
    ],
    ids=["halves-of-bytes", "rows", "zeros", "no-numbers"],
)
def test_other_damage_of_four_bits_is_refused(
    name: str, change: Any, pristine: Path, tmp_path: Path, silent: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_what_is_stored(monkeypatch, name, change)
    with pytest.raises(ExportError, match=r"decoder\.0\.ffn\.down by"):
        export(pristine / "bart", tmp_path / "bundle", ExportOptions("int4"), silent)


def test_a_head_of_its_own_is_looked_at_too(tmp_path: Path, silent: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_hugging_face(tmp_path / "checkpoint", "bart", {"tie_word_embeddings": False}, {})
    change_what_is_stored(monkeypatch, "head.weight.scale", lambda scales: scales * 2)
    with pytest.raises(ExportError, match=r"head\.weight by 1"):
        export(checkpoint, tmp_path / "bundle", ExportOptions("int4"), silent)


@pytest.mark.parametrize("precision", ["int8", "calibrated", "int4"])
@pytest.mark.parametrize("family", ["marian", "bart", "t5", "nn_transformer"])
def test_an_honest_export_is_far_within(family: str, precision: str, tmp_path: Path, silent: Progress) -> None:
    if family == "nn_transformer":
        checkpoint = write_nn_transformer(tmp_path / "checkpoint", nn_config(), sharpness=0.5)
    else:
        checkpoint = write_hugging_face(tmp_path / "checkpoint", family, {}, {}, sharpness=0.5)
    bundle: Bundle = export(checkpoint, tmp_path / "bundle", options(precision, tmp_path), silent)
    stored: Any = bundle.manifest.parity["stored_weights"]
    assert stored["count"] > 8
    assert 0.001 < stored["max_relative_error"] < (0.13 if precision == "int4" else 0.02) < MOST_ERROR / 1.9


def test_precisions_that_do_not_quantize_have_nothing_to_tell(pristine: Path, tmp_path: Path, silent: Progress) -> None:
    bundle = export(pristine / "bart", tmp_path / "bundle", ExportOptions("fp32"), silent)
    assert "stored_weights" not in bundle.manifest.parity


def test_weights_with_the_worst_outliers_are_within_the_bound() -> None:
    """One number that is far larger than all others of its block, or its column, decides the size of a step."""
    from beamline_export.blocks import quantize_blocks
    from beamline_export.precision import column_scales, quantize_columns

    weight = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
    for outlier in (10, 100, 1000):
        weight[:, 5] = outlier
        stored = quantize_columns(weight) * column_scales(weight)[:, None]
        for found in (stored, quantize_blocks(weight).weight(4096)):
            error = np.linalg.norm(probe(found) - probe(weight)) / np.linalg.norm(probe(weight))
            assert error < 0.6 * MOST_ERROR


def test_probes_tell_weights_apart() -> None:
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    assert probe(weight).shape == (48, 4)
    assert (probe(weight) == probe(weight.copy())).all()
    assert np.linalg.norm(probe(weight[::-1]) - probe(weight)) > np.linalg.norm(probe(weight))
