"""A bundle appears whole, small and once - or not at all."""

import dataclasses
import gc
import io
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from safetensors import safe_open

from beamline_export.bundle_writer import ExportOptions, export, export_checkpoint
from beamline_export.families.registry import Family, detect
from beamline_export.graph_writer import GraphWriter
from beamline_export.parity import check_contract, random_sources
from beamline_export.precision import Fp32Store
from beamline_export.progress import Progress
from beamline_export.reference import Reference
from beamline_export.spec import Array, Checkpoint, ExportError
from beamline_export.stopping import SIGNALS, Stopped
from beamline_server.bundle import Bundle, load_bundle
from beamline_server.engine.ort.c_api import NativeSession
from beamline_server.graphs import DECODER_STEP, ENCODER, GraphSizes, decoder_pieces
from beamline_server.manifest import MANIFEST, WEIGHTS

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class WrongStore(Fp32Store):
    """Loses the sign of one projection."""

    def linear(
        self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None, *, rectify: bool = False
    ) -> str:
        """As its base, but for one name."""
        weight = -weight if name == "decoder.0.ffn.down" else weight
        return super().linear(g, x, name, weight, bias, rectify=rectify)


class ForgettingStore(Fp32Store):
    """Writes no keys and values into the pools: only the whole step, which CUDA runs, has pools."""

    def write(self, g: GraphWriter, pool: str, rows: str, width: int) -> str:
        """As its base, but zeros."""
        return super().write(g, pool, g.one("Sub", rows, rows), width)


@dataclasses.dataclass
class Spoiled:
    """A reference whose answers are spoiled."""

    inner: Reference
    spoil: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As the inner one, spoiled."""
        return self.spoil(self.inner.logprobs(source, targets))


def spoiled(family: Family, spoil: Callable[[Any], Any]) -> Family:
    return Family(family.read, lambda folder, checkpoint: Spoiled(family.reference(folder, checkpoint), spoil))


def interrupted(_: object) -> object:
    raise KeyboardInterrupt


def test_a_wrong_weight_fails_the_gate_and_leaves_nothing(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    before = left_in(tmp_path)
    with pytest.raises(
        ExportError, match=r"does not agree with PyTorch: log-probabilities differ by .* beam searches differ"
    ):
        export_checkpoint(
            detect(checkpoint.folder), checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent, WrongStore()
        )
    assert left_in(tmp_path) == before


def test_a_whole_step_that_is_wrong_fails_the_gate_though_the_pieces_are_right(
    checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    family, target = detect(checkpoint.folder), tmp_path / "bundle"
    with pytest.raises(ExportError, match=r"does not agree with PyTorch: log-probabilities differ by [^;]*;[^;]*error"):
        export_checkpoint(family, checkpoint.folder, target, ExportOptions(), silent, ForgettingStore())


def test_what_only_a_gpu_runs_is_compared_as_well(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    for precision, compared in (("fp32", True), ("int8", False)):
        bundle = export(checkpoint.folder, tmp_path / precision, ExportOptions(precision), silent)
        assert ("whole_step" in bundle.manifest.parity) == compared


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        pytest.param(lambda rows: rows + 2e-3, "log-probabilities differ by 0.002", id="shifted"),
        pytest.param(lambda rows: rows * np.nan, "no numbers in PyTorch itself", id="nan"),
        pytest.param(lambda rows: np.where(rows > -9, rows, -np.inf), "not finite", id="infinite"),
    ],
)
def test_a_reference_that_differs_fails_the_gate(
    spoil: Callable[[Any], Any], problem: str, checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    before = left_in(tmp_path)
    family = spoiled(detect(checkpoint.folder), spoil)
    with pytest.raises(ExportError, match=problem):
        export_checkpoint(family, checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent, Fp32Store())
    assert left_in(tmp_path) == before


def test_an_interrupt_leaves_nothing(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    before = left_in(tmp_path)
    family = spoiled(detect(checkpoint.folder), interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(family, checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent, Fp32Store())
    assert left_in(tmp_path) == before


def terminated(_: object) -> object:
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("it goes on")


def test_a_signal_leaves_nothing(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    before = left_in(tmp_path)
    family = spoiled(detect(checkpoint.folder), terminated)
    with pytest.raises(Stopped) as caught, SIGNALS.as_exceptions():
        export_checkpoint(family, checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent, Fp32Store())
    assert caught.value.signal is signal.SIGTERM
    assert left_in(tmp_path) == before


def test_a_signal_after_the_bundle_has_appeared_is_too_late(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    with SIGNALS.as_exceptions():
        export(checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent)
        signal.raise_signal(signal.SIGTERM)
    assert load_bundle(tmp_path / "bundle").manifest.precision == "fp32"


def test_an_interrupted_replacement_leaves_the_old_bundle(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    target = tmp_path / "bundle"
    old = export(checkpoint.folder, target, ExportOptions(), silent)
    family = spoiled(detect(checkpoint.folder), interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(family, checkpoint.folder, target, ExportOptions(replace=True), silent, Fp32Store())
    assert load_bundle(target).fingerprint == old.fingerprint
    assert left_in(tmp_path) == {"checkpoint", "bundle"}


def test_an_existing_target_is_replaced_only_on_demand(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    target = tmp_path / "bundle"
    export(checkpoint.folder, target, ExportOptions(name="first"), silent)
    with pytest.raises(ExportError, match="exists already; choose another folder or give --replace"):
        export(checkpoint.folder, target, ExportOptions(name="second"), silent)
    assert load_bundle(target).manifest.name == "first"
    bundle = export(checkpoint.folder, target, ExportOptions("int8", "second", replace=True), silent)
    assert bundle.path == target
    assert load_bundle(target).manifest.name == "second"
    assert load_bundle(target).fingerprint == bundle.fingerprint
    assert left_in(tmp_path) == {"checkpoint", "bundle"}


@pytest.mark.parametrize("content", [(), ("notes.txt",)], ids=["empty", "with-files"])
def test_a_folder_that_is_no_bundle_is_never_replaced(
    content: tuple[str, ...], checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    for name in content:
        (target / name).write_text("dear")
    with pytest.raises(ExportError, match="is no bundle; it is not replaced"):
        export(checkpoint.folder, target, ExportOptions(replace=True), silent)
    assert left_in(target) == set(content)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (ExportOptions("int2"), "precision 'int2' is not known"),
        (ExportOptions("fp32", calibrate=Path("sentences.txt")), "calibration is for int8, not for fp32"),
        (ExportOptions("fp16", calibrate=Path("sentences.txt")), "calibration is for int8, not for fp16"),
        (ExportOptions(name="../x"), "name '../x' is not usable"),
        (ExportOptions(name=""), "name '' is not usable"),
        (ExportOptions(name="x" * 65), "is not usable"),
    ],
)
def test_invalid_options_are_told_before_anything_is_read(
    options: ExportOptions, problem: str, tmp_path: Path, silent: Progress
) -> None:
    with pytest.raises(ExportError, match=problem):
        export(tmp_path / "nowhere", tmp_path / "bundle", options, silent)


def test_parents_of_the_target_are_made_and_gone_again_if_the_export_fails(
    checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    target = tmp_path / "no" / "such" / "bundle"
    with pytest.raises(ExportError, match="does not agree"):
        export_checkpoint(detect(checkpoint.folder), checkpoint.folder, target, ExportOptions(), silent, WrongStore())
    assert left_in(tmp_path) == {"checkpoint"}
    assert export(checkpoint.folder, target, ExportOptions(), silent).path == target
    assert left_in(target.parent) == {"bundle"}
    assert load_bundle(target).manifest.precision == "fp32"


def test_a_parent_that_is_a_file_is_named_before_anything_is_read(tmp_path: Path, silent: Progress) -> None:
    (tmp_path / "file").write_text("dear")
    with pytest.raises(ExportError, match=r"/file is no folder, so .* cannot be made; choose another folder"):
        export(tmp_path / "nowhere", tmp_path / "file" / "a" / "bundle", ExportOptions(), silent)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("my model!", "my-model-"), (".hidden", "hidden"), ("_", "model"), ("é", "model"), ("a" * 90, "a" * 64)],
)
def test_the_name_comes_from_the_folder(
    folder: str, name: str, checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    source = checkpoint.folder.rename(tmp_path / folder)
    bundle = export(source, tmp_path / "bundle", ExportOptions(), silent)
    assert bundle.manifest.name == (name if folder != "é" else "model")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"eos_token_id": [1, 500]},
            r"config\.json .*: eos_token_id 500 is outside the target vocabulary of 120 \(0 to",
        ),
        ({"pad_token_id": 120}, "pad_token_id 120 is outside"),
        ({"source_eos_token_id": 100}, "source_eos_token_id 100 is outside the source vocabulary of 90"),
        ({"bad_words_ids": [[3], [777]]}, "bad_words_ids or suppress_tokens 777 is outside"),
        ({"min_length": 40, "max_length": 20}, r"config\.json: min_length 40 is more than max_length 20; lower"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps must be a number from 0 to"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    changes: dict[str, Any], problem: str, checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    with pytest.raises(ExportError, match=problem):
        export(checkpoint.config(**changes), tmp_path / "bundle", ExportOptions(), silent)
    assert left_in(tmp_path) == {"checkpoint"}


def test_a_model_without_numbers_is_told_as_one(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    folder = checkpoint.tensors(lambda state: state["generator.weight"].mul_(1e38))
    with pytest.raises(ExportError, match="the model gives no numbers in PyTorch itself"):
        export(folder, tmp_path / "bundle", ExportOptions(), silent)


@pytest.mark.parametrize(
    ("family", "files", "pointer"),
    [
        ("nn_transformer", [], "tokenizer.json"),
        ("nn_transformer", ["source.spm"], "target.spm"),
        ("marian", ["source.spm", "target.spm"], "vocab.json"),
        ("marian", ["source.spm", "vocab.json"], "target.spm"),
        ("bart", [], "tokenizer.json"),
        ("bart", ["tokenizer.json"], "tokenizer_config.json"),
    ],
)
def test_a_git_lfs_pointer_in_place_of_a_tokenizer_file_is_told_as_one(
    family: str, files: list[str], pointer: str, make_checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    folder = make_checkpoint(family).folder
    for name in files:
        (folder / name).write_bytes(b"{}")
    (folder / pointer).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n")
    with pytest.raises(ExportError, match=rf"/{pointer} is a Git LFS pointer.*run `git lfs pull`"):
        export(folder, tmp_path / "bundle", ExportOptions(), silent)


def test_weights_that_are_not_read_are_told(checkpoint: Any, tmp_path: Path) -> None:
    """A file of yesterday in the folder must not win over today's without a word."""
    told = io.StringIO()
    (checkpoint.folder / "model.pt").write_bytes(b"")
    export(checkpoint.folder, tmp_path / "bundle", ExportOptions(), Progress(told))
    assert "warning: the weights are those of model.safetensors; not read: model.pt\n" in told.getvalue()


def test_weights_of_another_name_are_named(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    (checkpoint.folder / "model.safetensors").rename(checkpoint.folder / "mine.safetensors")
    with pytest.raises(ExportError, match=r"; if mine\.safetensors holds them, call it model\.safetensors$"):
        export(checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent)


def test_settings_without_effect_are_told_in_short(make_checkpoint: Any, tmp_path: Path) -> None:
    """They are in the manifest, in the log at every start and in every GetInfo."""
    folder = make_checkpoint("marian").folder
    odd = {f"unknown_{number:03}": "x" * 10_000 for number in range(100)}
    generation = {"decoder_start_token_id": 2, "eos_token_id": 1, "forced_decoder_ids": [[1, 2]] * 100_000}
    (folder / "generation_config.json").write_text(json.dumps({**generation, **odd}))
    told = io.StringIO()
    bundle = export(folder, tmp_path / "bundle", ExportOptions(), Progress(told))
    ignored = bundle.manifest.generation_defaults.not_supported
    assert ignored["forced_decoder_ids"].startswith("[[1, 2], [1, 2]")
    assert max(map(len, ignored.values())) == 200
    assert len(ignored) == 65
    assert ignored["…"] == "and 37 more"
    assert len(told.getvalue()) < 20_000


def test_notices_about_a_checkpoint_are_told(checkpoint: Any, tmp_path: Path) -> None:
    told = io.StringIO()
    export(checkpoint.config(tie_embeddings=True), tmp_path / "bundle", ExportOptions(), Progress(told))
    assert "warning: tie_embeddings is true, but tgt_embed.weight and generator.weight differ" in told.getvalue()


def test_a_broken_tokenizer_is_named(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    (checkpoint.folder / "tokenizer.json").write_text('{"model": null}')
    with pytest.raises(ExportError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        export(checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent)


def test_unsupported_settings_are_warned_about_and_recorded(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint.config(generation={"no_repeat_ngram_size": 3, "num_beams": 4})
    bundle = export(source, tmp_path / "bundle", ExportOptions(), Progress())
    assert "warning: setting not supported: no_repeat_ngram_size = 3" in capsys.readouterr().err
    assert bundle.manifest.generation_defaults.not_supported == {"no_repeat_ngram_size": "3"}
    assert bundle.manifest.generation_defaults.beam_size == 4


def test_the_manifest_tells_how_the_bundle_came_to_be(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    manifest = export(checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent).manifest
    assert set(manifest.producers) == {"beamline", "torch", "onnx", "python"}
    assert manifest.spec["norm_placement"] == "post"
    assert manifest.parity["device"] == "cpu"
    assert len(manifest.golden) == 3
    assert {ENCODER, DECODER_STEP, *decoder_pieces(GraphSizes(1, 32, 120)), WEIGHTS} == manifest.files.keys()
    assert (manifest.dimensions.decoder_layers, manifest.dimensions.decoder_heads) == (1, 4)


def test_graphs_that_break_their_contract_are_named(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    from beamline_server.graphs import decoder_step_graph

    bundle = export(checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent)
    check_contract(bundle, {DECODER_STEP: decoder_step_graph(1, 32, 120, "float32")})
    with pytest.raises(
        ExportError, match=r"decoder_step\.onnx does not meet its contract in cross_k_1, cross_v_1, self_k_1"
    ):
        check_contract(bundle, {DECODER_STEP: decoder_step_graph(2, 32, 120, "float32")})
    with pytest.raises(ExportError, match="does not meet its contract in ancestors, cross_k_0"):
        check_contract(bundle, {DECODER_STEP: decoder_step_graph(1, 32, 120, "float16")})


def test_weights_are_given_up_before_the_reference_is_loaded(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    """Two copies of a large model need not be in memory at once."""
    family = detect(checkpoint.folder)
    held: list[int] = []

    def reference(folder: Path, read: Checkpoint) -> Reference:
        held.append(len(read.weights))
        return family.reference(folder, read)

    export_checkpoint(
        Family(family.read, reference), checkpoint.folder, tmp_path / "bundle", ExportOptions(), silent, Fp32Store()
    )
    assert held == [0]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A calibration file for the small checkpoints."""
    file = tmp_path / "sentences.txt"
    sources = random_sources(90, 1, 20, count=24)
    file.write_text("".join(f"{' '.join(map(str, source))}\n" for source in sources))
    return file


def test_a_calibrated_bundle_tells_its_ranges(
    make_checkpoint: Callable[[str], Any], sentences: Path, tmp_path: Path, silent: Progress
) -> None:
    """And an int8 bundle that is not, that each row has its own; the others have nothing to tell."""
    checkpoint = make_checkpoint("marian").folder
    told: dict[str, Any] = {}
    for name, options in {
        "calibrated": ExportOptions("int8", calibrate=sentences),
        "int8": ExportOptions("int8"),
        "fp32": ExportOptions(),
    }.items():
        export(checkpoint, tmp_path / name, options, silent)
        told[name] = json.loads((tmp_path / name / MANIFEST).read_text()).get("activations")
    assert (told["fp32"], told["int8"]) == (None, {"scaled": "per_row"})
    activations = load_bundle(tmp_path / "calibrated").manifest.activations
    assert activations is not None
    assert activations.model_dump() == told["calibrated"]
    assert (activations.scaled, activations.sentences) == ("calibrated", 24)
    assert {"cross_kv", "encoder.0.ffn.up", "decoder.0.cross_attention.query"} < activations.ranges.keys()
    assert all(value > 0 for value in activations.ranges.values())


def test_nothing_is_measured_while_a_calibrated_bundle_serves(
    checkpoint: Any, sentences: Path, tmp_path: Path, silent: Progress
) -> None:
    """One node quantizes, one multiplies; the ranges are in the graphs."""
    bundle = export(checkpoint.folder, tmp_path / "bundle", ExportOptions("int8", calibrate=sentences), silent)
    graphs = [ENCODER, *decoder_pieces(GraphSizes(1, 32, 120))]
    kinds = [node.op_type for name in graphs for node in onnx.load(bundle.file(name)).graph.node]
    assert bundle.manifest.activations is not None
    products = len(bundle.manifest.activations.ranges)
    assert kinds.count("QuantizeLinear") == kinds.count("MatMulIntegerToFloat") == products


def test_sentences_that_are_too_alike_fail_the_gate(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    """Most of what other sentences bring is beyond such ranges."""
    file = tmp_path / "sentences.txt"
    file.write_text("5\n" * 10)
    with pytest.raises(ExportError, match=r"relative error is .*; other or more sentences to calibrate with may help"):
        export(checkpoint.folder, tmp_path / "bundle", ExportOptions("int8", calibrate=file), silent)
    assert left_in(tmp_path) == {"checkpoint", "sentences.txt"}


def test_more_sentences_than_are_used_are_warned_about(
    checkpoint: Any, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences.write_text(sentences.read_text() * 42)
    checkpoint.config(generation={"max_new_tokens": 4})
    options = ExportOptions("int8", calibrate=sentences)
    bundle = export(checkpoint.folder, tmp_path / "bundle", options, Progress())
    warning = f"warning: {sentences} holds more than 1,000 sentences; the first ones are used\n"
    assert warning in capsys.readouterr().err
    assert bundle.manifest.activations is not None
    assert bundle.manifest.activations.sentences == 1000


def test_a_calibration_file_is_read_before_the_checkpoint(checkpoint: Any, tmp_path: Path, silent: Progress) -> None:
    """What can be told at once is not told minutes later."""
    checkpoint.weights.unlink()
    with pytest.raises(ExportError, match=r"none\.txt cannot be read"):
        export(checkpoint.folder, tmp_path / "bundle", ExportOptions("int8", calibrate=tmp_path / "none.txt"), silent)


@pytest.mark.parametrize("content", ["1 2 x", "5 " * 49], ids=["no-ids", "too-long"])
def test_sentences_that_the_model_cannot_read_leave_nothing(
    content: str, checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    file = tmp_path / "sentences.txt"
    file.write_text(f"1 2 3\n{content}\n")
    before = left_in(tmp_path)
    with pytest.raises(ExportError, match=r"sentences\.txt: line 2"):
        export(checkpoint.folder, tmp_path / "bundle", ExportOptions("int8", calibrate=file), silent)
    assert left_in(tmp_path) == before


class InterruptedWhile(Progress):
    """Somebody who loses patience during a step."""

    def __init__(self, step: str) -> None:
        super().__init__(io.StringIO())
        self._step = step

    def iterate(self, name: str, count: int) -> Iterator[int]:
        """As its base, but for the one step."""
        for i in super().iterate(name, count):
            if name == self._step:
                raise KeyboardInterrupt
            yield i


def test_an_interrupted_calibration_leaves_nothing(checkpoint: Any, sentences: Path, tmp_path: Path) -> None:
    before = left_in(tmp_path)
    options = ExportOptions("int8", calibrate=sentences)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint.folder, tmp_path / "bundle", options, InterruptedWhile("calibrate"))
    assert left_in(tmp_path) == before


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_sessions_are_gone_before_the_reference_is_loaded(
    precision: str, checkpoint: Any, tmp_path: Path, silent: Progress
) -> None:
    """The exported model and PyTorch's are in memory one after the other."""
    family = detect(checkpoint.folder)
    alive: list[int] = []

    def sessions() -> int:
        gc.collect()
        return sum(issubclass(type(thing), (NativeSession, InferenceSession)) for thing in gc.get_objects())

    def reference(folder: Path, read: Checkpoint) -> Reference:
        alive.append(sessions())
        return family.reference(folder, read)

    before = sessions()
    options = ExportOptions(precision)
    export_checkpoint(Family(family.read, reference), checkpoint.folder, tmp_path / "bundle", options, silent)
    assert alive == [before]


def test_fp32_graphs_are_gone_before_the_reference_is_loaded(
    checkpoint: Any, sentences: Path, tmp_path: Path, silent: Progress
) -> None:
    """Neither on disk nor in memory do they stand beside what comes after."""
    family = detect(checkpoint.folder)
    sizes: list[list[int]] = []

    def reference(folder: Path, read: Checkpoint) -> Reference:
        sizes.append([file.stat().st_size for file in tmp_path.glob(f".*/{WEIGHTS}")])
        return family.reference(folder, read)

    options = ExportOptions("int8", calibrate=sentences)
    bundle = export_checkpoint(Family(family.read, reference), checkpoint.folder, tmp_path / "bundle", options, silent)
    assert sizes == [[bundle.file(WEIGHTS).stat().st_size]]
    assert left_in(tmp_path) == {"checkpoint", "sentences.txt", "bundle"}


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
def test_a_bundle_is_hardly_larger_than_its_parameters(
    precision: str, export_fr_en: Callable[[str], Bundle], request: pytest.FixtureRequest
) -> None:
    """Every weight once, at most 5 % for scales, positions, graphs and manifest; the tokenizer comes on top."""
    bundle = export_fr_en("fp16") if precision == "fp16" else request.getfixturevalue(f"fr_en_{precision}")
    model = Path(__file__).parents[3] / "models" / "fr-en" / "model.safetensors"
    with safe_open(model, "np") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    tokenizer = set(bundle.manifest.tokenizer.files)
    size = sum(file.stat().st_size for file in bundle.path.iterdir() if file.name not in tokenizer)
    assert size <= 1.05 * parameters * BYTES[precision]


@pytest.mark.parametrize("longest", [1, 2, 3, 40])
@pytest.mark.parametrize("eos", [None, 0, 7])
def test_probe_sources_fit_the_model(longest: int, eos: int | None) -> None:
    sources = random_sources(10, eos, longest, seed=longest)
    assert len(sources) == 12
    assert {1, longest} <= {len(source) for source in sources}
    assert all(1 <= len(source) <= longest and max(source) < 10 for source in sources)
    assert eos is None or all(source[-1] == eos for source in sources)
