"""Relative positions (T5 and its kin) on every backend: forced decodes and whole searches beside PyTorch.

The backend for GPUs runs on the CPU here, with the same graphs and the same moves.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from beamline_export.agreement import Tokens, search_all
from beamline_export.bundle_writer import ExportOptions, export, export_checkpoint
from beamline_export.families.registry import Family, detect
from beamline_export.generate_oracle import GenerateOracle
from beamline_export.parity import random_sources
from beamline_export.progress import Progress
from beamline_export.reference import HuggingFaceReference
from beamline_export.spec import Checkpoint, ExportError
from beamline_export.testing import DECODER_START, EOS, HUGGING_FACE_CLASSES, write_hugging_face
from beamline_server.bundle import Bundle, BundleError, checksum_line, load_bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.ort.cpu import CpuBackend
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.manifest import CHECKSUM, MANIFEST
from beamline_server.models.forced import forced_rows
from beamline_server.models.load import choose_device, model_rules

pytestmark = pytest.mark.parity

FAMILIES = ["t5", "mt5", "umt5"]
BACKENDS: dict[str, Callable[[Bundle], Backend]] = {
    "cpu": lambda bundle: CpuBackend(bundle, threads=1),
    "whole-step": lambda bundle: CudaBackend(bundle, device="cpu"),
}
SEARCHES = [
    SearchOptions(1, 1, max_new_tokens=16),
    SearchOptions(4, 4, max_new_tokens=40, early_stopping=EarlyStopping.WHEN_FULL),
    SearchOptions(4, 4, max_new_tokens=14, early_stopping=EarlyStopping.HEURISTIC, length_penalty=0.6),
    SearchOptions(5, 2, max_new_tokens=30, min_new_tokens=20, early_stopping=EarlyStopping.NEVER, length_penalty=2.0),
]
FP16_MAX = 65504


def written(folder: Path, family: str, seed: int, sharpness: float = 1.0, **config: Any) -> Path:
    return write_hugging_face(folder / "checkpoint", family, config, {}, seed=seed, sharpness=sharpness)


def exported(checkpoint: Path, precision: str = "fp32") -> Bundle:
    target = checkpoint.with_name(f"{checkpoint.name}-{precision}")
    return export(checkpoint, target, ExportOptions(precision), Progress(io.StringIO()))


def sources_of(seed: int) -> Sequence[Tokens]:
    return random_sources(120, EOS, 20, count=8, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_distances_reach_beyond_what_has_numbers_of_its_own(family: str, backend: str, tmp_path: Path) -> None:
    """Targets many times as long as the greatest distance, of all rows at once and fed in parts."""
    checkpoint = written(tmp_path, family, 8, relative_attention_max_distance=9)
    bundle = exported(checkpoint)
    family_of = detect(checkpoint)
    reference = family_of.reference(checkpoint, family_of.read(checkpoint))
    computing = BACKENDS[backend](bundle)
    rng = np.random.default_rng(0)
    sources = [tuple(rng.integers(4, 120, length).tolist()) for length in (1, 7, 48)]
    targets = [[DECODER_START, *rng.integers(4, 120, 44).tolist()] for _ in sources]
    expected = [reference.logprobs(source, [target])[0] for source, target in zip(sources, targets, strict=True)]
    for part in (1, 16):
        seen = 0
        for index, position, row in forced_rows(computing, sources, targets, logprobs=True, part=part):
            assert row.logprob == pytest.approx(expected[index][position], abs=1e-4)
            seen += 1
        assert seen == sum(map(len, targets))


@pytest.mark.parametrize("family", FAMILIES)
def test_searches_by_the_whole_step_equal_generate(family: str, tmp_path: Path) -> None:
    """All in one batch, which buckets of other widths take over; the CPU's loops are in test_families.py."""
    checkpoint = written(tmp_path, family, 10, relative_attention_max_distance=9)
    bundle = exported(checkpoint)
    rules, backend = model_rules(bundle.manifest), BACKENDS["whole-step"](bundle)
    oracle = GenerateOracle(HuggingFaceReference(HUGGING_FACE_CLASSES[family], checkpoint).model, rules)
    for options in SEARCHES:
        comparisons = list(oracle.compare(backend, sources_of(10), options))
        assert all(c.agrees for c in comparisons), [c.parting for c in comparisons if not c.agrees]
        assert max(c.score_difference for c in comparisons) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_same_alone_and_in_any_batch(family: str, backend: str, tmp_path: Path) -> None:
    """With searches of all widths that reuse slots beside each other; other shapes may have other last bits."""
    bundle = exported(written(tmp_path, family, 9))
    rules, computing = model_rules(bundle.manifest), BACKENDS[backend](bundle)
    searches = [(source, SEARCHES[i % len(SEARCHES)]) for i, source in enumerate([*sources_of(9)] * 2)]
    together = search_all(computing, rules, searches)
    for search, answer in zip(searches, together, strict=True):
        (alone,) = search_all(computing, rules, [search])
        if backend == "cpu":
            assert alone.hypotheses == answer.hypotheses
        assert [h.tokens for h in alone.hypotheses] == [h.tokens for h in answer.hypotheses]
        assert [h.score for h in alone.hypotheses] == pytest.approx([h.score for h in answer.hypotheses], abs=1e-5)


def with_large_feed_forward(checkpoint: Path) -> Path:
    """Let what feed-forward layers compute be beyond fp16, as that of large T5 checkpoints is."""
    state = load_file(checkpoint / "model.safetensors")
    for name in state:
        if name.endswith("DenseReluDense.wo.weight"):
            state[name] *= 4e4 / state[name].abs().max()
        elif ".DenseReluDense.wi" in name:
            state[name] *= 300
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def largest_numbers(family: str, checkpoint: Path) -> dict[str, float]:
    """The largest numbers in PyTorch that the last product of a feed-forward layer takes, and that it gives."""
    model = HuggingFaceReference(HUGGING_FACE_CLASSES[family], checkpoint).model
    largest = {"taken": 0.0, "given": 0.0}

    def note(_: object, taken: tuple[torch.Tensor], given: torch.Tensor) -> None:
        largest["taken"] = max(largest["taken"], float(taken[0].abs().max()))
        largest["given"] = max(largest["given"], float(given.abs().max()))

    for name, module in model.named_modules():
        if name.endswith("DenseReluDense.wo"):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, EOS]]), decoder_input_ids=torch.tensor([[DECODER_START, 8, 9]]))
    return largest


@pytest.mark.parametrize("family", FAMILIES)
def test_what_overflows_fp16_is_in_fp32(family: str, tmp_path: Path) -> None:
    """What gated layers multiply as well; the gate compares log-probabilities with PyTorch's in fp32."""
    checkpoint = with_large_feed_forward(written(tmp_path, family, 3, sharpness=0.5))
    largest = largest_numbers(family, checkpoint)
    assert largest["given"] > 100 * FP16_MAX
    assert (largest["taken"] > FP16_MAX) == (family != "t5")
    forced: Any = exported(checkpoint, "fp16").manifest.parity["forced_decode"]
    assert forced["max_difference"] < 2e-2
    assert forced["same_top_token"] > 0.9


def test_a_residual_in_fp16_would_overflow(tmp_path: Path) -> None:
    """The same checkpoint, if its family did not say what it needs: nothing is left to choose from."""
    checkpoint = with_large_feed_forward(written(tmp_path, "t5", 3, sharpness=0.5))
    family = detect(checkpoint)

    def read(folder: Path) -> Checkpoint:
        checkpoint = family.read(folder)
        return dataclasses.replace(checkpoint, spec=dataclasses.replace(checkpoint.spec, fp32_residual=False))

    other = Family(read, family.reference)
    with pytest.raises(ExportError, match="its log-probabilities are not finite"):
        export_checkpoint(other, checkpoint, tmp_path / "bundle", ExportOptions("fp16"), Progress(io.StringIO()))


def test_every_precision_has_what_its_devices_need(tmp_path: Path) -> None:
    """The numbers for the CPU's loops beside the pieces, and the whole step where there is a graph for CUDA."""
    checkpoint = written(tmp_path, "t5", 0, sharpness=0.5)
    files = {precision: set(exported(checkpoint, precision).manifest.files) for precision in ("fp32", "fp16", "int8")}
    assert files["fp16"] == {"encoder.onnx", "decoder_step.onnx", "weights.bin"}
    assert {"decoder_step.onnx", "decoder_piece_0.onnx", "relative_bias.bin"} < files["fp32"]
    assert "decoder_step.onnx" not in files["int8"]
    assert "relative_bias.bin" in files["int8"]
    # Nothing but a missing GPU is in the way.
    assert choose_device("auto", "fp32") in ("cpu", "cuda")


def test_a_bundle_of_before_there_was_a_whole_step_is_to_be_exported_again(tmp_path: Path) -> None:
    folder = exported(written(tmp_path, "t5", 0)).path
    told = json.loads((folder / MANIFEST).read_text("utf-8"))
    del told["files"]["decoder_step.onnx"]
    raw = json.dumps(told).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / CHECKSUM).write_text(checksum_line(raw), "utf-8")
    with pytest.raises(BundleError, match=r"files: 'decoder_step\.onnx' is not listed; export the model again"):
        load_bundle(folder)
