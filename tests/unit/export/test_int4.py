"""Weights of 4 bits: what is stored, what the graph makes of it, and that a row's answer is its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from beamline_export.blocks import BLOCK, quantize_blocks
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.cli import main
from beamline_export.graph_writer import GraphWriter, WeightsFile
from beamline_export.precision import Int4Store, PartlyFp32Store
from beamline_export.progress import Progress
from beamline_export.spec import Array
from beamline_server.bundle import Bundle
from beamline_server.engine.ort.cpu import ROWS_MULTIPLE
from beamline_server.engine.ort.sessions import session_options
from beamline_server.graphs import DECODER_STEP, GraphSpec, TensorSpec

Product = Callable[[Array], NDArray[np.float32]]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(
    folder: Path,
    weight: Array,
    bias: Array | None = None,
    *,
    rectify: bool = False,
    threads: int = 1,
    store: Int4Store | PartlyFp32Store | None = None,
) -> Product:
    """The product of the store, ready to run."""
    with WeightsFile(folder / "weights.bin") as weights:
        g = GraphWriter(weights)
        g.output((store or Int4Store()).linear(g, "x", "w", weight, bias, rectify=rectify), "y")
    spec = GraphSpec(
        {"x": TensorSpec("float32", ("N", weight.shape[1]))}, {"y": TensorSpec("float32", ("N", weight.shape[0]))}
    )
    (folder / "graph.onnx").write_bytes(g.model("test", spec).SerializeToString())
    session = onnxruntime.InferenceSession(str(folder / "graph.onnx"), session_options(threads))
    return lambda x: np.asarray(session.run(["y"], {"x": np.ascontiguousarray(x)})[0])


def spread(found: Array, expected: Array) -> float:
    """The root mean square of the differences, over that of what is expected."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("inputs", [1, 24, 32, 33, 64, 100, 160])
def test_a_weight_is_in_blocks_that_stand_for_it(inputs: int) -> None:
    """The last block may be short, and zeros may end with half a byte."""
    weight = normal(7, inputs)
    blocks, count = quantize_blocks(weight), -(-inputs // BLOCK)
    assert blocks.steps.shape == (7, count, BLOCK // 2)
    assert (blocks.scales.shape, blocks.zeros.shape) == ((7, count), (7, (count + 1) // 2))
    assert blocks.weight(inputs).shape == weight.shape
    assert spread(blocks.weight(inputs), weight) < 0.09


def test_what_has_sixteen_evenly_spaced_values_is_exact() -> None:
    weight = np.stack([np.arange(-5, 11), np.arange(16), np.arange(-15, 1)]).astype(np.float32).repeat(2, axis=1)
    blocks = quantize_blocks(weight * np.float32(0.25))
    assert blocks.scales.ravel().tolist() == [0.25] * 3
    assert blocks.weight(32).tolist() == (weight * 0.25).tolist()


def test_a_block_of_zeros_is_zero_and_others_do_not_lose_by_it() -> None:
    weight = np.zeros((2, 3 * BLOCK), np.float32)
    weight[1, BLOCK : 2 * BLOCK] = normal(BLOCK)
    weight[0, 0] = 1e-42  # of which no scale can be made
    found = quantize_blocks(weight).weight(3 * BLOCK)
    assert np.abs(found[0]).max() < 1e-40
    assert not found[1, :BLOCK].any()
    assert not found[1, 2 * BLOCK :].any()
    assert spread(found[1], weight[1]) < 0.12


def test_steps_are_where_the_error_is_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """One large number does not make all others coarse if letting it saturate costs less."""
    weight = normal(200, BLOCK)
    found = spread(quantize_blocks(weight).weight(BLOCK), weight)
    monkeypatch.setattr("beamline_export.blocks._RANGES", (1.0,))
    assert found < 0.99 * spread(quantize_blocks(weight).weight(BLOCK), weight)


def test_large_weights_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(10, 70)
    whole = quantize_blocks(weight)
    monkeypatch.setattr("beamline_export.blocks._NUMBERS_AT_ONCE", 300)
    parts = quantize_blocks(weight)
    assert (whole.weight(70) == parts.weight(70)).all()
    assert (whole.zeros == parts.zeros).all()


@pytest.mark.parametrize("bias", [False, True], ids=["without-bias", "with-bias"])
@pytest.mark.parametrize("rectify", [False, True], ids=["both-signs", "rectified"])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 32), (40, 24), (96, 100), (17, 33)])
def test_a_graph_computes_with_what_the_blocks_stand_for(
    outputs: int, inputs: int, rectify: bool, bias: bool, tmp_path: Path
) -> None:
    """Within the 8-bit steps that the kernel takes of its input."""
    weight, x = normal(outputs, inputs), normal(20, inputs, seed=2)
    addend = normal(outputs, seed=1) if bias else np.zeros(outputs, np.float32)
    found = product(tmp_path, weight, addend if bias else None, rectify=rectify)(x)
    stored = quantize_blocks(weight).weight(inputs)
    read = np.maximum(x, 0) if rectify else x
    assert spread(found - addend, read @ stored.T) < 0.01
    assert spread(found - addend, read @ weight.T) < 0.12


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 96), (300, 64), (40, 24)])
def test_a_row_is_the_same_in_every_even_number_of_rows(
    outputs: int, inputs: int, threads: int, tmp_path: Path
) -> None:
    """Bit for bit, at the beginning as elsewhere, and beside rows of any size: what the engine relies on."""
    assert ROWS_MULTIPLE["int4"] == 2
    run = product(tmp_path, normal(outputs, inputs), normal(outputs, seed=1), threads=threads)
    x = normal(300, inputs, seed=2) * np.logspace(-3, 6, 300, dtype=np.float32)[:, None]
    together = run(x)
    for count in (2, 4, 6, 16, 30, 64, 126, 128, 130, 256, 258):
        for first in (0, 1, 300 - count):
            assert np.array_equal(run(x[first : first + count]), together[first : first + count])


def test_a_bundle_is_smaller_than_in_int8_and_for_the_cpu_alone(
    pristine: Path, tmp_path: Path, silent: Progress
) -> None:
    made: dict[str, Bundle] = {}
    for precision in ("int8", "int4"):
        made[precision] = export(pristine / "bart", tmp_path / precision, ExportOptions(precision), silent)
    manifest = made["int4"].manifest
    assert (manifest.precision, manifest.activations) == ("int4", None)
    assert DECODER_STEP not in manifest.files
    sizes = [made[precision].manifest.files["weights.bin"].bytes for precision in ("int4", "int8")]
    assert sizes == sorted(set(sizes))


def test_patterns_keep_weights_in_fp32(tmp_path: Path) -> None:
    weight, x = normal(40, 64), normal(6, 64, seed=1)
    kept = product(tmp_path, weight, store=PartlyFp32Store(Int4Store(), ["w"]))(x)
    assert kept == pytest.approx(x @ weight.T, abs=1e-4)
    other = product(tmp_path, weight, store=PartlyFp32Store(Int4Store(), ["v"]))(x)
    assert 0.02 < spread(other, x @ weight.T) < 0.12


def test_kept_weights_cost_their_size(pristine: Path, tmp_path: Path, silent: Progress) -> None:
    sizes: list[int] = []
    for patterns in ((), ("cross_kv",), ("*",)):
        options = ExportOptions("int4", keep_fp32=patterns)
        bundle = export(pristine / "bart", tmp_path / f"bundle{len(sizes)}", options, silent)
        sizes.append(bundle.manifest.files["weights.bin"].bytes)
    assert sizes == sorted(set(sizes))


def test_it_takes_no_sentences(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sentences.txt").write_text("5 6 7 1\n")
    command = [str(pristine / "bart"), "-o", str(tmp_path / "bundle"), "--precision", "int4"]
    assert main([*command, "--calibrate", str(tmp_path / "sentences.txt")]) == 2
    told = capsys.readouterr().err
    assert "calibration is for int8, not for int4; give --precision int8 with --calibrate" in told
    assert not (tmp_path / "bundle").exists()


def test_what_says_int4_has_no_scaled_activations(pristine: Path, tmp_path: Path, silent: Progress) -> None:
    bundle = export(pristine / "bart", tmp_path / "bundle", ExportOptions("int4"), silent)
    data = json.loads((bundle.path / "manifest.json").read_text())
    assert data["activations"] is None
    wrong = type(bundle.manifest).model_validate({**data, "activations": {"scaled": "per_row"}})
    assert "activations: how they are scaled belongs to int8 bundles, and to no others" in list(wrong.problems())
