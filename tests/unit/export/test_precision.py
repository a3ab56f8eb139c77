"""Weights at each precision: what is stored, how often, and that a row's answer is its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from beamline_export.graph_writer import GraphWriter, WeightsFile
from beamline_export.precision import (
    STORES,
    CalibratedInt8Store,
    Fp16Store,
    Fp32Store,
    Int8Store,
    WeightStore,
    column_scales,
    quantize_columns,
    quantize_rows,
)
from beamline_export.spec import Array, ExportError
from beamline_server.engine.ort.sessions import session_options
from beamline_server.graphs import GraphSpec, TensorSpec, row_parts

Build = Callable[[GraphWriter], dict[str, str]]


def run(folder: Path, build: Build, inputs: dict[str, NDArray[Any]], *, fp16: bool = False) -> dict[str, NDArray[Any]]:
    """Build a graph, run it on the CPU; `build` returns the names and types of its outputs."""
    types = {"float32": "float32", "int64": "int64", "float16": "float16"}
    with WeightsFile(folder / "weights.bin") as weights:
        g = GraphWriter(weights)
        outputs = build(g)
    axes = {name: tuple(f"{name}{i}" for i in range(array.ndim)) for name, array in inputs.items()}
    spec = GraphSpec(
        {name: TensorSpec(types[str(array.dtype)], axes[name]) for name, array in inputs.items()},  # type: ignore[arg-type]
        {name: TensorSpec(kind, (f"{name}0", f"{name}1")) for name, kind in outputs.items()},  # type: ignore[arg-type]
    )
    (folder / "graph.onnx").write_bytes(g.model("test", spec).SerializeToString())
    session = onnxruntime.InferenceSession(str(folder / "graph.onnx"), session_options(1))
    return dict(zip(outputs, session.run(list(outputs), inputs), strict=True))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_columns_are_quantized_to_their_own_largest_value() -> None:
    weight = np.array([[1.27, -0.635, 0.0], [0.0, 0.0, 0.0], [-2.54, 0.02, 1.0]], np.float32)
    assert column_scales(weight)[[0, 2]] == pytest.approx([0.01, 0.02])
    assert quantize_columns(weight).tolist() == [[127, -64, 0], [0, 0, 0], [-127, 1, 50]]


@pytest.mark.parametrize("part", [1, 40, 64])
def test_a_weight_is_quantized_the_same_in_parts_of_any_size(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((17, 8)).astype(np.float32)
    scales, steps = column_scales(weight), quantize_columns(weight)
    monkeypatch.setattr("beamline_export.precision._PART", part)
    assert np.array_equal(column_scales(weight), scales)
    assert np.array_equal(quantize_columns(weight), steps)


@pytest.mark.parametrize(
    ("rectify", "steps", "units"),
    [
        (False, [[255, 65, 129], [255, 1, 128], [255, 64, 128]], 127),
        (True, [[255, 0, 2], [255, 0, 0], [255, 0, 0]], 255),
    ],
    ids=["both-signs", "rectified"],
)
def test_rows_are_quantized_to_their_own_largest_value(
    rectify: bool, steps: list[list[int]], units: int, tmp_path: Path
) -> None:
    """Behind a ReLU the negative half needs no steps: the rest is twice as fine."""
    x = np.array([[1.27, -0.63, 0.01], [1e-3, -1e-3, 0], [1e6, -5e5, 1]], np.float32)

    def build(g: GraphWriter) -> dict[str, str]:
        quantized, scale, _ = quantize_rows(g, "x", rectify=rectify)
        g.output(g.one("Cast", quantized, to=1), "steps")
        g.output(scale, "scale")
        return {"steps": "float32", "scale": "float32"}

    found = run(tmp_path, build, {"x": x})
    assert found["steps"].tolist() == steps
    assert found["scale"][:, 0] == pytest.approx(np.array([1.27, 1e-3, 1e6]) / units)


@pytest.mark.parametrize("store", [Int8Store(), CalibratedInt8Store({"w": 3.0})], ids=["per-row", "calibrated"])
@pytest.mark.parametrize("rectify", [False, True], ids=["both-signs", "rectified"])
def test_a_row_without_size_gives_the_bias(store: Int8Store, rectify: bool, tmp_path: Path) -> None:
    """A row of zeros has no scale of its own, and a rectified row of negative numbers nothing left."""
    bias = normal(8, seed=1)
    x = np.stack([np.zeros(16, np.float32), normal(16, seed=2), -np.abs(normal(16, seed=3)) * rectify])

    def build(g: GraphWriter) -> dict[str, str]:
        g.output(store.linear(g, "x", "w", normal(8, 16), bias, rectify=rectify), "y")
        return {"y": "float32"}

    found = run(tmp_path, build, {"x": x})["y"]
    assert (found[[0, 2]] == bias).all()
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "store", [Int8Store(), CalibratedInt8Store({"w": 4.0}), Fp32Store()], ids=lambda s: type(s).__name__
)
def test_a_product_may_rectify_its_input(store: WeightStore, tmp_path: Path) -> None:
    weight, x = normal(8, 64), normal(20, 64, seed=2)

    def build(g: GraphWriter) -> dict[str, str]:
        g.output(store.linear(g, "x", "w", weight, None, rectify=True), "y")
        return {"y": "float32"}

    tolerance = 1e-5 if isinstance(store, Fp32Store) else 0.15
    assert run(tmp_path, build, {"x": x})["y"] == pytest.approx(np.maximum(x, 0) @ weight.T, abs=tolerance)


def test_what_lies_beyond_the_calibrated_range_saturates(tmp_path: Path) -> None:
    """And a row's answer is its own, as with one scale per row."""
    weight, x = np.eye(16, dtype=np.float32), np.linspace(-4, 4, 48, dtype=np.float32).reshape(3, 16)

    def build(g: GraphWriter) -> dict[str, str]:
        g.output(CalibratedInt8Store({"w": 2.0}).linear(g, "x", "w", weight, None), "y")
        return {"y": "float32"}

    together = run(tmp_path, build, {"x": x})["y"]
    assert together == pytest.approx(np.clip(x, -2 * 128 / 127, 2), abs=0.02)
    assert all((run(tmp_path, build, {"x": x[i : i + 1]})["y"][0] == together[i]).all() for i in range(3))


@pytest.mark.parametrize("product", ["linear", "head"])
@pytest.mark.parametrize("store", [Int8Store(), CalibratedInt8Store({"w": 1.0})], ids=["per-row", "calibrated"])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_int8_products_do_not_overflow(store: Int8Store, product: str, rows: int, tmp_path: Path) -> None:
    """Two products of the largest steps exceed 16 bits, in which processors without VNNI add neighbours."""
    x, weight = np.ones((rows, 64), np.float32), np.ones((48, 64), np.float32)

    def build(g: GraphWriter) -> dict[str, str]:
        g.output(getattr(store, product)(g, "x", "w", weight, None), "y")
        return {"y": "float32"}

    assert run(tmp_path, build, {"x": x})["y"] == pytest.approx(np.full((rows, 48), 64), rel=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["without-bias", "with-bias"])
@pytest.mark.parametrize("product", ["linear", "head"])
def test_an_int8_row_does_not_depend_on_its_neighbours(product: str, bias: bool, tmp_path: Path) -> None:
    """The kernel takes one scale per row, which nothing documents: bit for bit, alone or beside far larger rows."""
    weight, addend = normal(48, 32), normal(48, seed=1) if bias else None
    x = normal(24, 32, seed=2) * np.logspace(-3, 6, 24, dtype=np.float32)[:, None]

    def build(g: GraphWriter) -> dict[str, str]:
        g.output(getattr(STORES["int8"](), product)(g, "x", "w", weight, addend), "y")
        return {"y": "float32"}

    together = run(tmp_path, build, {"x": x})["y"]
    for i in (0, 1, 11, 23):
        assert (run(tmp_path, build, {"x": x[i : i + 1]})["y"][0] == together[i]).all()
        assert (run(tmp_path, build, {"x": x[[5, i, 2]]})["y"][1] == together[i]).all()
    exact = x @ weight.T + (0 if addend is None else addend)
    assert np.abs(together - exact).max(1) == pytest.approx(0, abs=0.05 * float(np.abs(exact).max()))
    error = np.abs(together - exact).max(1) / np.abs(x).max(1)
    assert error.max() < 0.15, "relative to its own row, every row is equally exact"


@pytest.mark.parametrize("precision", STORES)
def test_a_tied_embedding_is_stored_once(precision: str, tmp_path: Path) -> None:
    """Embedding and head share one table; both give what numpy gives."""
    table = normal(50, 32)
    store: WeightStore = STORES[precision]()
    cache = store.cache

    def build(g: GraphWriter) -> dict[str, str]:
        g.output(store.embedding(g, "ids", "table", table), "rows")
        g.output(store.head(g, "x", "table", table, None), "logits")
        return {"rows": cache, "logits": "float32"}

    x = normal(3, 32, seed=1).astype(cache)
    found = run(tmp_path, build, {"ids": np.array([4, 0, 49]), "x": x})
    tolerance = {"fp32": 1e-5, "fp16": 2e-2, "int8": 0.4, "int4": 0.4}[precision]
    assert found["rows"] == pytest.approx(table[[4, 0, 49]], abs=tolerance)
    assert found["logits"] == pytest.approx(x.astype(np.float32) @ table.T, abs=tolerance)
    stored = (tmp_path / "weights.bin").stat().st_size
    width = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 1}[precision]
    assert table.size * width <= stored < table.size * width + 64


def test_a_name_is_written_once_and_its_array_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> Array:
        made.append(1)
        return normal(64, 64)

    with WeightsFile(tmp_path / "weights.bin") as weights:
        for graph in (GraphWriter(weights), GraphWriter(weights)):
            graph.weight("w", make)
            graph.weight("w", make)
    assert len(made) == 1
    assert (tmp_path / "weights.bin").stat().st_size == 64 * 64 * 4


def test_weights_begin_at_aligned_offsets(tmp_path: Path) -> None:
    with WeightsFile(tmp_path / "weights.bin") as weights:
        tensors = [weights.store(f"w{i}", lambda: normal(17, 33)) for i in range(3)]
    offsets = [int(next(e.value for e in t.external_data if e.key == "offset")) for t in tensors]
    assert [offset % 64 for offset in offsets] == [0, 0, 0]
    assert len(set(offsets)) == 3


def test_a_weights_file_is_written_inside_its_context(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="context manager"):
        WeightsFile(tmp_path / "weights.bin").store("w", lambda: normal(1))


def test_what_is_once_in_a_graph_is_new_in_the_next(tmp_path: Path) -> None:
    """Quantized rows are names of one graph's nodes."""
    with WeightsFile(tmp_path / "weights.bin") as weights:
        for _ in range(2):
            graph = GraphWriter(weights)
            STORES["int8"]().linear(graph, "x", "w", normal(4, 4), None)
            kinds = [node.op_type for node in graph.model("test", GraphSpec({}, {})).graph.node]
            assert kinds.count("QuantizeLinear") == 1
            STORES["int8"]().linear(graph, "x", "v", normal(4, 4), None)
            kinds = [node.op_type for node in graph.model("test", GraphSpec({}, {})).graph.node]
            assert (kinds.count("QuantizeLinear"), kinds.count("MatMulIntegerToFloat")) == (1, 2)


@pytest.mark.parametrize("width", [32, 12])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rows_are_written_into_their_slots(precision: str, width: int, tmp_path: Path) -> None:
    """In parts or whole, the pool is what it was but for the slots that were named."""
    store = STORES[precision]()
    half = precision == "fp16"
    pool, rows = normal(3, 5, width).astype(store.cache), normal(2, width, seed=1).astype(store.cache)
    slot = np.array([[2, 4], [0, 1]])
    shape = (3, 5, *row_parts(width)) if half else pool.shape

    def build(g: GraphWriter) -> dict[str, str]:
        after = store.write(g, "pool", "rows", width)
        g.output(g.one("Reshape", after, g.constant([15, width], np.int64)), "after")
        return {"after": str(np.dtype(store.cache))}

    named_slots = np.concatenate([slot, np.zeros((2, 1), np.int64)], axis=1)[:, None] if half else slot
    after = run(tmp_path, build, {"pool": pool.reshape(shape), "rows": rows, "slot": named_slots})["after"]

    pool[2, 4], pool[0, 1] = rows
    assert np.array_equal(after, pool.reshape(15, width))


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with (
        WeightsFile(tmp_path / "weights.bin") as weights,
        pytest.raises(ExportError, match="w holds values beyond fp16's range; export it as fp32 or int8"),
    ):
        Fp16Store().linear(GraphWriter(weights), "x", "w", np.full((2, 2), 1e5, np.float32), None)
