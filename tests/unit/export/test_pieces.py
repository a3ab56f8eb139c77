"""The decoder's pieces, with attention over plain rows between them, compute what PyTorch and the whole step do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from beamline_export.build_graphs import build_graphs, contracts
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.calibration import RangeStore
from beamline_export.families.registry import detect
from beamline_export.graph_writer import WeightsFile
from beamline_export.parity import TOLERANCES, check_contract, random_sources
from beamline_export.precision import CalibratedInt8Store, Fp16Store, Fp32Store, Int8Store, WeightStore
from beamline_export.progress import Progress
from beamline_export.spec import Array, ExportError, TransformerSpec
from beamline_export.testing import EOS, nn_config, write_hugging_face, write_nn_transformer
from beamline_server.engine.ort.sessions import session_options
from beamline_server.graphs import (
    DECODER_STEP,
    ENCODER,
    GraphSizes,
    GraphSpec,
    TensorSpec,
    decoder_piece_graph,
    decoder_pieces,
)
from beamline_server.manifest import WEIGHTS

Values = Mapping[str, NDArray[Any]]
Write = Callable[[Path, float], Path]

STEPS, CANDIDATES = 9, 5
RANGE = "range:"


def nn_transformer(**changes: Any) -> Write:
    return lambda folder, sharpness: write_nn_transformer(folder, nn_config(**changes), sharpness=sharpness)


def hugging_face(family: str, **changes: Any) -> Write:
    return lambda folder, sharpness: write_hugging_face(folder, family, changes, {}, sharpness=sharpness)


PRE_NORM = {"norm_first": True, "activation": "gelu", "source_vocab_size": 120, "tie_embeddings": "all"}
MODELS = {
    "post-norm, relu, untied": nn_transformer(),
    "pre-norm, gelu, tied": nn_transformer(**PRE_NORM, num_decoder_layers=3),
    "pre-norm, relu, a prime vocabulary": nn_transformer(norm_first=True, target_vocab_size=113, num_decoder_layers=1),
    "marian, swish, scaled embeddings": hugging_face("marian", scale_embedding=True, activation_function="swish"),
    "bart, gelu, a norm after the embeddings": hugging_face("bart", activation_function="gelu"),
}


@pytest.fixture(params=MODELS)
def write(request: pytest.FixtureRequest) -> Write:
    """Writes a small random checkpoint, as sharp as told."""
    return MODELS[request.param]


def attention(query: Array, keys: Sequence[Array], values: Sequence[Array], heads: int) -> Array:
    """Multi-head attention of one query, (D), over rows of keys and values, (D) each."""
    q, k, v = (np.reshape(x, (-1, heads, len(query) // heads)) for x in (query, keys, values))
    weights = np.exp(np.einsum("qhd,khd->hk", q, k) / q.shape[-1] ** 0.5)
    result: Array = np.einsum("hk,khd->hd", weights / weights.sum(axis=1, keepdims=True), v).reshape(-1)
    return result


@dataclass
class Answers:
    """What the whole step gives after each token of some targets: log-probabilities, (N, T, V), the best, (N, T, C)."""

    logprob: Array
    top_logprob: Array
    top_token: NDArray[np.int64]


def log_softmax(logits: Array) -> Array:
    """Log-probabilities, as they are defined."""
    above = logits - logits.max(axis=-1, keepdims=True)
    result: Array = above - np.log(np.exp(above).sum(axis=-1, keepdims=True))
    return result


@dataclass
class Graphs:
    """The graphs of a bundle in plain sessions, and the ranges that they told."""

    folder: Path
    spec: TransformerSpec
    ranges: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files = self.folder.glob("*.onnx")
        self.sessions = {f.name: onnxruntime.InferenceSession(str(f), session_options(1)) for f in files}

    def run(self, name: str, feeds: Values) -> dict[str, NDArray[Any]]:
        """Outputs by name; those that tell ranges are noted."""
        names = [value.name for value in self.sessions[name].get_outputs()]
        found = dict(zip(names, self.sessions[name].run(names, feeds), strict=True))
        for output in [output for output in names if output.startswith(RANGE)]:
            rows, product = found.pop(output), output.removeprefix(RANGE)
            self.ranges[product] = max(self.ranges.get(product, 0.0), float(rows.max()))
        return found

    def encode(self, source: Sequence[int]) -> list[NDArray[Any]]:
        """Cross-attention keys and values of one source, (R, D) each: k_0, v_0, k_1, …."""
        every = np.arange(len(source))
        feeds = {"ids": np.array(source), "positions": every, "row_of": every[None], "back": every}
        found = self.run(ENCODER, {**feeds, "source_length": np.array([len(source)])})
        return [found[f"cross_{kind}_{i}"][0] for i in range(self.spec.decoder_layers) for kind in ("k", "v")]

    def by_pieces(self, sources: Sequence[Sequence[int]], targets: NDArray[np.int64]) -> Array:
        """All log-probabilities after each token of a target for each source, (N, T, V).

        Targets are fed token by token; keys and values are lists of rows.
        """
        memories = [self.encode(source) for source in sources]
        pasts: list[list[list[Array]]] = [[[] for _ in memory] for memory in memories]
        steps = [self._step(targets[:, t], np.full(len(sources), t), pasts, memories) for t in range(targets.shape[1])]
        return log_softmax(np.stack(steps, axis=1))

    def _step(self, ids: NDArray[np.int64], positions: NDArray[np.int64], pasts: Any, memories: Any) -> Array:
        pieces, layers = decoder_pieces(self.spec.graph_sizes), range(self.spec.decoder_layers)
        found = self.run(pieces[0], {"ids": ids, "positions": positions})
        for i in layers:
            query, key, value = np.split(found["query_key_value"], 3, axis=1)
            for n, past in enumerate(pasts):
                past[2 * i].append(key[n])
                past[2 * i + 1].append(value[n])
            found = self._after(pieces[2 * i + 1], query, [past[2 * i : 2 * i + 2] for past in pasts], found)
            cross = [memory[2 * i : 2 * i + 2] for memory in memories]
            found = self._after(pieces[2 * i + 2], found["query"], cross, found)
        return found["logits"]

    def _after(self, piece: str, query: Array, keys_values: Any, before: Values) -> dict[str, NDArray[Any]]:
        heads = self.spec.decoder_heads
        attended = np.stack([attention(q, k, v, heads) for q, (k, v) in zip(query, keys_values, strict=True)])
        return self.run(piece, {"attended": attended, "residual_in": before["residual"]})

    def by_whole_steps(self, sources: Sequence[Sequence[int]], targets: NDArray[np.int64]) -> Answers:
        """As `by_pieces`, by the graph that computes attention itself."""
        count, steps = targets.shape
        memories = [self.encode(source) for source in sources]
        lengths = np.array([len(source) for source in sources])
        every = np.arange(count)
        caches: dict[str, NDArray[Any]] = {}
        for t, name in enumerate(name for name in self._inputs() if name.startswith("cross")):
            caches[name] = np.zeros((count, lengths.max(), self.spec.d_model), np.float32)
            caches[name.replace("cross", "self")] = np.zeros((count, steps, self.spec.d_model), np.float32)
            for n, memory in enumerate(memories):
                caches[name][n, : lengths[n]] = memory[t]
        fixed = {
            "row_of": every[:, None],
            "back": every,
            "source_length": lengths,
            "candidates": np.array([CANDIDATES]),
        }
        results = []
        for t in range(steps):
            place = {"positions": np.full(count, t), "slot": np.stack([every, np.full(count, t)], axis=1)}
            seen = np.broadcast_to(np.arange(steps) <= t, (count, 1, 1, steps))
            found = self.run(DECODER_STEP, {"ids": targets[:, t], "ancestors": seen, **place, **fixed, **caches})
            caches |= {name.removesuffix("_out"): found[name] for name in found if name.startswith("self")}
            results.append(found)
        return Answers(*(np.stack([found[name] for found in results], axis=1) for name in Answers.__annotations__))

    def _inputs(self) -> list[str]:
        return [value.name for value in self.sessions[DECODER_STEP].get_inputs()]


def built(checkpoint: Path, folder: Path, store: WeightStore, precision: str) -> Graphs:
    """The graphs of a checkpoint in a folder."""
    read = detect(checkpoint).read(checkpoint)
    folder.mkdir()
    with WeightsFile(folder / WEIGHTS) as weights:
        graphs = build_graphs(read, store, precision, weights)
    for name, graph in graphs.items():
        (folder / name).write_bytes(graph.SerializeToString())
    return Graphs(folder, read.spec)


def probe(spec: TransformerSpec) -> tuple[tuple[tuple[int, ...], ...], NDArray[np.int64]]:
    """Sources of several lengths, and a random target for each."""
    sources = random_sources(spec.source_vocabulary, EOS, 20, count=6)
    return sources, np.random.default_rng(1).integers(0, spec.target_vocabulary, (len(sources), STEPS))


def by_pytorch(checkpoint: Path, sources: Sequence[Sequence[int]], targets: NDArray[np.int64]) -> Array:
    """Log-probabilities as PyTorch computes them, (N, T, V)."""
    family = detect(checkpoint)
    reference = family.reference(checkpoint, family.read(checkpoint))
    return np.stack([reference.logprobs(s, [t.tolist()])[0] for s, t in zip(sources, targets, strict=True)])


def check_candidates(answers: Answers) -> None:
    """The candidates are the best of all log-probabilities."""
    best = np.argsort(-answers.logprob, axis=-1, kind="stable")[..., :CANDIDATES]
    assert (answers.top_logprob == np.take_along_axis(answers.logprob, best, -1)).all()
    assert (np.take_along_axis(answers.logprob, answers.top_token, -1) == answers.top_logprob).all()


def relative_error(found: Array, expected: Array) -> float:
    """As the export's gate has it: root mean square of the differences, over what there is to tell apart."""
    kept = np.isfinite(expected)
    error: float = np.sqrt(np.square(found[kept] - expected[kept]).mean()) / expected[kept].std()
    return error


def test_fp32_pieces_compute_what_pytorch_does(write: Write, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", 1.0)
    graphs = built(checkpoint, tmp_path / "graphs", Fp32Store(), "fp32")
    sources, targets = probe(graphs.spec)
    expected = by_pytorch(checkpoint, sources, targets)
    found = graphs.by_pieces(sources, targets)
    assert found == pytest.approx(expected, abs=1e-4)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_the_whole_step_computes_what_its_parts_do(write: Write, tmp_path: Path) -> None:
    graphs = built(write(tmp_path / "checkpoint", 1.0), tmp_path / "graphs", Fp32Store(), "fp32")
    sources, targets = probe(graphs.spec)
    whole, pieces = graphs.by_whole_steps(sources, targets), graphs.by_pieces(sources, targets)
    check_candidates(whole)
    assert whole.logprob == pytest.approx(pieces, abs=1e-4)
    assert (whole.top_token[..., 0] == pieces.argmax(-1)).all()


def calibrated_store(checkpoint: Path, folder: Path) -> WeightStore:
    """Ranges from the pieces that measure them, on the sources and targets of the test."""
    graphs = built(checkpoint, folder, RangeStore(), "int8")
    graphs.by_pieces(*probe(graphs.spec))
    return CalibratedInt8Store(graphs.ranges)


@pytest.mark.parametrize("calibrated", [False, True], ids=["per-row", "calibrated"])
def test_int8_pieces_are_as_close_to_pytorch_as_int8_may_be(calibrated: bool, write: Write, tmp_path: Path) -> None:
    """And a row's answer does not depend on who is computed with it, to the last bit."""
    checkpoint = write(tmp_path / "checkpoint", 0.5)
    store = calibrated_store(checkpoint, tmp_path / "ranges") if calibrated else Int8Store()
    graphs = built(checkpoint, tmp_path / "graphs", store, "int8")
    sources, targets = probe(graphs.spec)
    found = graphs.by_pieces(sources, targets)
    assert 1e-5 < relative_error(found, by_pytorch(checkpoint, sources, targets)) < TOLERANCES["int8"].relative
    for n in (0, 3):
        alone = graphs.by_pieces(sources[n : n + 1], targets[n : n + 1])
        assert (alone[0] == found[n]).all()


@pytest.mark.parametrize("store", [Fp32Store(), Int8Store(), RangeStore()], ids=["fp32", "int8", "ranges"])
def test_pieces_have_no_weights_of_their_own(store: WeightStore, write: Write, tmp_path: Path) -> None:
    """Pieces, whole step or both: the file of weights is the same. In the graphs is nothing but small constants."""
    checkpoint = write(tmp_path / "checkpoint", 1.0)
    only_whole, only_pieces, both = (
        built(checkpoint, tmp_path / name, store, name).folder for name in ("fp16", "int8", "fp32")
    )
    sizes = {(folder / WEIGHTS).stat().st_size for folder in (only_whole, only_pieces, both)}
    assert len(sizes) == 1
    for file in only_pieces.glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        assert all(len(tensor.raw_data) < 1024 for tensor in graph.initializer)


@pytest.mark.parametrize(
    ("precision", "store", "whole", "pieces"),
    [("fp32", Fp32Store, True, True), ("fp16", Fp16Store, True, False), ("int8", Int8Store, False, True)],
)
def test_a_precision_has_the_graphs_that_its_devices_run(
    precision: str, store: Callable[[], WeightStore], whole: bool, pieces: bool, tmp_path: Path
) -> None:
    checkpoint = nn_transformer(num_decoder_layers=3)(tmp_path / "checkpoint", 1.0)
    graphs = built(checkpoint, tmp_path / "graphs", store(), precision)
    wanted = [ENCODER, *([DECODER_STEP] if whole else []), *(decoder_pieces(graphs.spec.graph_sizes) if pieces else [])]
    assert sorted(graphs.sessions) == sorted(wanted)
    assert list(contracts(graphs.spec, precision, store().cache)) == wanted


def test_every_product_tells_its_range_in_exactly_one_piece(tmp_path: Path) -> None:
    checkpoint = nn_transformer(num_decoder_layers=3)(tmp_path / "checkpoint", 1.0)
    graphs = built(checkpoint, tmp_path / "graphs", RangeStore(), "int8")
    told = {
        name: [value.name for value in s.get_outputs() if RANGE in value.name] for name, s in graphs.sessions.items()
    }
    every = [output for outputs in told.values() for output in outputs]
    assert len(every) == len(set(every)) == 2 * 4 + 1 + 3 * 6 + 1
    assert told["decoder_piece_0.onnx"] == [f"{RANGE}decoder.0.self_attention.qkv"]
    assert told["decoder_piece_3.onnx"] == [
        f"{RANGE}decoder.1.self_attention.output",
        f"{RANGE}decoder.1.cross_attention.query",
    ]


FIRST, AFTER_SELF, AFTER_CROSS, LAST = (f"decoder_piece_{number}.onnx" for number in (0, 1, 2, 4))


def with_output(contract: GraphSpec, name: str, tensor: TensorSpec) -> GraphSpec:
    return GraphSpec(contract.inputs, {**contract.outputs, name: tensor})


def test_pieces_that_break_their_contract_are_named(tmp_path: Path, silent: Progress) -> None:
    checkpoint = write_nn_transformer(tmp_path / "checkpoint", nn_config())
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(), silent)
    sizes = GraphSizes(2, 32, 120)
    right = {name: decoder_piece_graph(number, sizes) for number, name in enumerate(decoder_pieces(sizes))}
    check_contract(bundle, right)
    half = TensorSpec("float16", ("N", 32))
    for piece, wrong, named in (
        (FIRST, right[AFTER_CROSS], "attended, ids, positions, residual_in"),
        (AFTER_SELF, right[AFTER_CROSS], "query, query_key_value"),
        (
            AFTER_CROSS,
            decoder_piece_graph(2, replace(sizes, width=16)),
            "attended, query_key_value, residual, residual_in",
        ),
        (AFTER_SELF, with_output(right[AFTER_SELF], "residual", half), "residual"),
        (LAST, right[AFTER_CROSS], "logits, query_key_value, residual"),
        (LAST, decoder_piece_graph(4, GraphSizes(2, 32, 121)), "logits"),
    ):
        with pytest.raises(ExportError, match=rf"{piece} does not meet its contract in {named}$"):
            check_contract(bundle, {**right, piece: wrong})
