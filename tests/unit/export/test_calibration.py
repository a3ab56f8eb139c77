"""Calibration: which sentences are read, what is measured on them, and that it is what PyTorch's modules see."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from beamline_export.agreement import search_all
from beamline_export.build_graphs import build_graphs
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.calibration import (
    MOST_SENTENCES,
    RangeStore,
    bounded_search,
    calibration_search,
    encode_sentences,
    measure_ranges,
    read_sentences,
)
from beamline_export.families.registry import detect
from beamline_export.graph_writer import GraphWriter, WeightsFile
from beamline_export.parity import random_sources
from beamline_export.progress import Progress
from beamline_export.reference import HuggingFaceReference
from beamline_export.spec import ExportError
from beamline_export.testing import DECODER_START, EOS, write_hugging_face
from beamline_server.bundle import Bundle, load_bundle
from beamline_server.engine.ort.sessions import session_options
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.graphs import GraphSpec, TensorSpec
from beamline_server.manifest import WEIGHTS, FileEntry, GenerationDefaults
from beamline_server.models.load import build_backend, model_rules
from doubles.service import make_manifest, write_bundle

GREEDY = SearchOptions(1, 1, max_new_tokens=12)


@pytest.fixture
def calibration(tmp_path: Path) -> Callable[[bytes], Path]:
    """A calibration file of these bytes."""

    def write(content: bytes) -> Path:
        file = tmp_path / "sentences.txt"
        file.write_bytes(content)
        return file

    return write


@pytest.fixture
def without_tokenizer(tmp_path: Path) -> Bundle:
    """A bundle that takes ids below 300, at most 4 of them."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    sizes = {**make_manifest().dimensions.model_dump(), "source_vocabulary": 300, "max_source_tokens": 4}
    write_bundle(folder, dimensions=sizes)
    return load_bundle(folder)


def test_a_sentence_is_a_line_that_is_not_empty(calibration: Callable[[bytes], Path]) -> None:
    """Whatever ends the lines, and with the mark that some editors put in front."""
    sentences = read_sentences(calibration("\ufeffun \r\n\n \t\n deux\u2028trois\nquatre".encode()))
    assert sentences.lines == ((1, "un"), (4, "deux\u2028trois"), (5, "quatre"))
    assert not sentences.more


@pytest.mark.parametrize(("count", "more"), [(MOST_SENTENCES, False), (MOST_SENTENCES + 1, True)])
def test_the_first_sentences_are_used(count: int, more: bool, calibration: Callable[[bytes], Path]) -> None:
    sentences = read_sentences(calibration(b"oui\n" * count + b"\n"))
    assert len(sentences.lines) == MOST_SENTENCES
    assert sentences.more == more


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no sentences; give a few hundred"),
        (b" \n\n", "holds no sentences; give a few hundred"),
        ("oui\nété\n".encode("latin-1"), "line 2 is not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "line 1 is not UTF-8 text"),
    ],
    ids=["empty", "blank", "latin-1", "gzip"],
)
def test_a_file_without_sentences_is_refused(
    content: bytes, problem: str, calibration: Callable[[bytes], Path]
) -> None:
    with pytest.raises(ExportError, match=problem):
        read_sentences(calibration(content))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.txt cannot be read \(No such file or directory\)"):
        read_sentences(tmp_path / "none.txt")
    with pytest.raises(ExportError, match=r"is a folder, not a file; put a file in its place"):
        read_sentences(tmp_path)


def test_ids_are_sentences_of_a_model_without_tokenizer(
    calibration: Callable[[bytes], Path], without_tokenizer: Bundle
) -> None:
    sentences = read_sentences(calibration(b"3 4  256\n\n0 299 007 1\n"))
    assert encode_sentences(sentences, without_tokenizer) == [(3, 4, 256), (0, 299, 7, 1)]


def test_text_goes_through_the_bundles_tokenizer(calibration: Callable[[bytes], Path], fr_en_fp32: Bundle) -> None:
    (source,) = encode_sentences(read_sentences(calibration("Où est la gare ?".encode())), fr_en_fp32)
    assert source[-1] == fr_en_fp32.manifest.special_tokens.source_eos
    assert len(source) > 4


@pytest.mark.parametrize("word", ["bonjour", "300", "-1", "1.5", "\u0661", "1" * 5000])
def test_words_are_no_ids(word: str, calibration: Callable[[bytes], Path], without_tokenizer: Bundle) -> None:
    sentences = read_sentences(calibration(f"1 2\n3 {word}\n".encode()))
    with pytest.raises(ExportError, match=r"sentences\.txt: line 2: .* is no token id below 300") as caught:
        encode_sentences(sentences, without_tokenizer)
    assert len(str(caught.value)) < 400


def test_every_line_that_does_not_fit_is_told_but_for_the_last_of_many(
    calibration: Callable[[bytes], Path], without_tokenizer: Bundle
) -> None:
    sentences = read_sentences(calibration(b"1\n1 2 3 4 5\n1 2 3 4\n" + b"\n1 2 3 4 5 6" * 9))
    with pytest.raises(
        ExportError, match=r"txt: line 2 has 5 tokens \(the model takes 1 to 4\); line 5 has 6 .*; and 2 more$"
    ):
        encode_sentences(sentences, without_tokenizer)


def test_the_search_is_the_models_own_but_not_narrower_than_requests_may_be() -> None:
    own = GenerationDefaults(beam_size=1, length_penalty=0.6, early_stopping="never", max_new_tokens=30)
    assert calibration_search(own) == SearchOptions(
        4, 1, length_penalty=0.6, early_stopping=EarlyStopping.NEVER, max_new_tokens=30
    )
    assert calibration_search(GenerationDefaults(beam_size=6, max_new_tokens=30)).beam_size == 6


def test_a_range_is_the_largest_magnitude_of_a_products_input(tmp_path: Path) -> None:
    """Row by row; behind the ReLU where there is one, and at the head as well."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 8)).astype(np.float32)
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    x[1] = -np.abs(x[1])
    with WeightsFile(tmp_path / "weights.bin") as weights:
        g, store = GraphWriter(weights), RangeStore()
        hidden = store.linear(g, "x", "up", weight, None)
        hidden = store.linear(g, hidden, "down", weight, weight[0], rectify=True)
        g.output(store.head(g, hidden, "table", weight, None), "y")
    axes = ("N", 8)
    model = g.model("test", GraphSpec({"x": TensorSpec("float32", axes)}, {"y": TensorSpec("float32", axes)}))
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), session_options(1))
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"x": x}), strict=True))
    up = np.maximum(x @ weight.T, 0)
    down = up @ weight.T + weight[0]
    assert names == ["y", "range:up", "range:down", "range:table"]
    assert found["range:up"] == pytest.approx(np.abs(x).max(1))
    assert found["range:down"] == pytest.approx(up.max(1), rel=1e-5)
    assert found["range:table"] == pytest.approx(np.abs(down).max(1), rel=1e-5)
    assert found["y"] == pytest.approx(down @ weight.T, rel=1e-4, abs=1e-4)


def with_ranges(checkpoint: Path, target: Path) -> Bundle:
    """An fp32 bundle whose graphs tell the ranges."""
    bundle = export(checkpoint, target, ExportOptions(), Progress(io.StringIO()))
    read = detect(checkpoint).read(checkpoint)
    with WeightsFile(target / WEIGHTS) as weights:
        graphs = build_graphs(read, RangeStore(), "fp32", weights)
    for name, graph in graphs.items():
        (target / name).write_bytes(graph.SerializeToString())
    contents = {name: (target / name).read_bytes() for name in bundle.manifest.files}
    files = {n: FileEntry(sha256=hashlib.sha256(c).hexdigest(), bytes=len(c)) for n, c in contents.items()}
    return Bundle(target, bundle.manifest.model_copy(update={"files": files}), bundle.fingerprint)


class Inputs:
    """The largest magnitude in the input of each linear layer of a PyTorch model, by the names of products."""

    def __init__(self, model: Any) -> None:
        self.largest: dict[str, float] = {}
        for side, stack in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
            for i, layer in enumerate(stack.layers):
                name = f"{side}.{i}"
                self._attention(layer.self_attn, f"{name}.self_attention")
                self._watch(layer.self_attn.q_proj, f"{name}.self_attention.qkv")
                self._watch(layer.fc1, f"{name}.ffn.up")
                self._watch(layer.fc2, f"{name}.ffn.down")
                if side == "decoder":
                    self._attention(layer.encoder_attn, f"{name}.cross_attention")
                    self._watch(layer.encoder_attn.q_proj, f"{name}.cross_attention.query")
                    self._watch(layer.encoder_attn.k_proj, "cross_kv")
        self._watch(model.lm_head, "source_embedding")

    def _attention(self, attention: Any, name: str) -> None:
        # The graphs add the value bias behind this product, not before it.
        self._watch(attention.out_proj, f"{name}.output", attention.v_proj.bias)

    def _watch(self, layer: Any, name: str, offset: torch.Tensor | float = 0.0) -> None:
        def note(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            self.largest[name] = max(self.largest.get(name, 0.0), float((inputs[0] - offset).abs().max()))

        layer.register_forward_pre_hook(note)


def test_ranges_are_the_largest_inputs_of_pytorchs_own_layers(tmp_path: Path) -> None:
    """A greedy search computes its answer's prefix and nothing else, so PyTorch sees the same rows."""
    checkpoint = write_hugging_face(tmp_path / "marian", "marian", {"activation_function": "relu"}, {})
    bundle = with_ranges(checkpoint, tmp_path / "bundle")
    sources = random_sources(120, EOS, 20, count=24)
    ranges = measure_ranges(bundle, sources, GREEDY, Progress(io.StringIO()).iterate)
    reference = HuggingFaceReference("MarianMTModel", checkpoint)
    inputs = Inputs(reference.model)
    answers = search_all(
        build_backend(bundle, "cpu", threads=1), model_rules(bundle.manifest), [(source, GREEDY) for source in sources]
    )
    for source, answer in zip(sources, answers, strict=True):
        reference.logprobs(source, [[DECODER_START, *answer.hypotheses[0].tokens[:-1]]])
    assert ranges == pytest.approx(inputs.largest, rel=1e-4)
    assert len(ranges) == 2 * 4 + 1 + 2 * 6 + 1


def test_a_runaway_does_not_take_longer_than_all_others() -> None:
    """A model that never ends, as one of random weights, would go on to its limit for every sentence."""
    endless = SearchOptions(beam_size=4, min_new_tokens=400, max_new_tokens=512)
    assert bounded_search((5,) * 10, endless) == SearchOptions(beam_size=4, min_new_tokens=52, max_new_tokens=52)
    usual = SearchOptions(beam_size=4, max_new_tokens=40)
    assert bounded_search((5,) * 10, usual) == usual


def enlarged(weight: str) -> Callable[[Any], Path]:
    """Spoils a checkpoint by a weight that is finite itself."""
    return lambda checkpoint: checkpoint.tensors(lambda state: state[weight].mul_(1e38))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (enlarged("transformer.encoder.layers.0.linear1.weight"), r"not finite in fp32, at encoder\.0\.ffn\.down"),
        (enlarged("generator.weight"), "not finite in fp32, at its log-probabilities"),
    ],
    ids=["a-range", "log-probabilities"],
)
def test_a_model_whose_own_values_are_not_finite_is_refused(
    spoil: Callable[[Any], Path],
    problem: str,
    checkpoint: Any,
    calibration: Callable[[bytes], Path],
    tmp_path: Path,
    silent: Progress,
) -> None:
    options = ExportOptions("int8", calibrate=calibration(b"1 2 3\n"))
    with pytest.raises(ExportError, match=problem):
        export(spoil(checkpoint), tmp_path / "bundle", options, silent)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "sentences.txt"}


def test_what_is_no_file_of_sentences_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExportError, match=r"pipe is a pipe, not a file"):
        read_sentences(tmp_path / "pipe")
    (tmp_path / "long.txt").write_bytes(b"short\n" + b"x" * (1 << 21))
    with pytest.raises(ExportError, match=r"long\.txt: line 2 is longer than 1,048,576 bytes; leave it out"):
        read_sentences(tmp_path / "long.txt")
