"""Checkpoint to bundle: builds in a folder beside the target, checks, renames. A bundle appears whole or not at all."""

import dataclasses
import json
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

import beamline_server
from beamline_export.build_graphs import build_graphs, contracts
from beamline_export.calibration import (
    MOST_SENTENCES,
    RangeStore,
    Sentences,
    calibration_search,
    encode_sentences,
    measure_ranges,
    read_sentences,
)
from beamline_export.checkpoint import check_file, weight_files_not_read
from beamline_export.comparison import compare, load_backend
from beamline_export.expectation_check import ExpectedOutputs
from beamline_export.expectations import Expectations, read_expectations
from beamline_export.families.registry import Family, detect
from beamline_export.graph_writer import WeightsFile
from beamline_export.known_settings import bounded
from beamline_export.precision import STORES, CalibratedInt8Store, PartlyFp32Store, WeightStore
from beamline_export.progress import Advance, Progress
from beamline_export.spec import Checkpoint, ExportError, TransformerSpec, check_weights
from beamline_export.stopping import SIGNALS
from beamline_export.stored_weights import check_stored_weights
from beamline_export.vocabularies import check_vocabularies
from beamline_server.bundle import Bundle, BundleError, checksum_line, digest, load_bundle, read_manifest
from beamline_server.manifest import (
    CHECKSUM,
    FORMAT_VERSION,
    MANIFEST,
    NAME_PATTERN,
    RELATIVE_BIAS,
    WEIGHTS,
    Activations,
)
from beamline_server.tokenizer import load_tokenizer

_GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "int8": 2e-2, "int4": 1e-1}
"""Between machines that compute alike: rounding of sums, and what it does to a quantized activation. In int4,
processors differ in how they quantize activations: not to do it moves the embedded model's figures by 0.034."""
_DRAFTED_GOLDEN = {"source": [0], "forced": [0], "top_logprob": [0.0]}
"""Stands in a draft, which nobody serves, until the answers are known."""
_TOKENIZER_FILES = (
    "source.spm", "target.spm", "vocab.json", "target_vocab.json", "tokenizer.json", "target_tokenizer.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export.

    Attributes:
        precision: fp32, fp16, int8 or int4.
        name: Name of the model as the server tells it; by default the checkpoint folder's.
        replace: Whether a bundle that is there already is replaced.
        calibrate: File of sentences to measure the ranges of activations with, for int8; None scales them per row.
        expect: File of outputs of the user's own model that the export has to give; None compares with the PyTorch
            model of the checkpoint alone.
        keep_fp32: Names of weights, as patterns, that stay in fp32 in an int8 or int4 bundle.
    """

    precision: str = "fp32"
    name: str | None = None
    replace: bool = False
    calibrate: Path | None = None
    expect: Path | None = None
    keep_fp32: tuple[str, ...] = ()


def export(source: Path, target: Path, options: ExportOptions, progress: Progress) -> Bundle:
    """Export a checkpoint folder as a bundle.

    Args:
        source: Folder with config.json and weights; not trusted.
        target: The bundle's folder; must not exist unless `options.replace`.
        options: How to export.
        progress: Shows what is going on.

    Raises:
        ExportError: the checkpoint is broken or not known, the file of sentences or of expected outputs is not usable,
            or the result does not agree with PyTorch or with what is expected. Nothing is left.
    """
    _check_arguments(target, options)
    return export_checkpoint(detect(source), source, target, options, progress)


def export_checkpoint(
    family: Family,
    source: Path,
    target: Path,
    options: ExportOptions,
    progress: Progress,
    store: WeightStore | None = None,
) -> Bundle:
    """As `export`, of a family that was chosen already; `store`, if given, instead of what the options ask for."""
    sentences = None if options.calibrate is None else read_sentences(options.calibrate)
    expectations = None if options.expect is None else read_expectations(options.expect)
    with progress.step("read the checkpoint"):
        for file in _TOKENIZER_FILES:  # whose readers would say no more than that they are broken
            check_file(source / file)
        checkpoint = family.read(source)
        unsupported = checkpoint.generation["not_supported"]
        assert isinstance(unsupported, dict)
        generation = {**checkpoint.generation, "not_supported": bounded(unsupported)}
        checkpoint = dataclasses.replace(checkpoint, generation=generation)
        # A step ends with a line, and of a checkpoint that is refused there is one line alone.
        with progress.bar("check the weights", sum(array.nbytes for array in checkpoint.weights.values())) as advance:
            check_weights(checkpoint, advance)
        if checkpoint.spec.decoder_only and options.precision == "fp16":
            raise ExportError(
                f"{checkpoint.spec.architecture} is a decoder without an encoder, which no graph for CUDA is yet; "
                "export it with --precision fp32, int8 or int4, for the CPU"
            )
        notices = [*weight_files_not_read(source), *checkpoint.notices, *check_vocabularies(checkpoint, source)]
    for notice in notices:
        progress.warn(notice)
    for setting, value in bounded(unsupported).items():
        progress.warn(f"setting not supported: {setting} = {value}")
    in_fp32 = None
    if expectations is not None and options.precision != "fp32":
        in_fp32 = _expected_in_fp32(checkpoint, source, target, expectations, progress)
    activations = Activations(scaled="per_row") if options.precision == "int8" else None
    if sentences is not None:
        activations = _calibrated(checkpoint, source, target, sentences, progress)
    with _folder_beside(target) as folder:
        plan = _Plan(store or _store(options, activations), options, activations)
        writing = _write(checkpoint, source, folder, plan, progress, "build the graphs")
        # From here on the weights are in the file; the PyTorch model needs the memory.
        checkpoint = writing.checkpoint
        draft = writing.manifest()
        expected = None if expectations is None else ExpectedOutputs(expectations, draft)
        promised = contracts(checkpoint.spec, options.precision, plan.store.cache)
        load_reference = partial(family.reference, source, checkpoint)
        figures, golden = compare(draft, promised, load_reference, expected, in_fp32, progress)
        if plan.store.probes:
            figures["stored_weights"] = {"count": len(plan.store.probes), "max_relative_error": writing.stored_error}
        writing.manifest(parity=figures, golden=golden)
        with progress.counting("verify the bundle", _bytes(folder)) as advance:
            bundle = _verified(folder, advance)
        SIGNALS.held += 1  # for good: what a signal would stop is done
        _appear(folder, target, replace=options.replace)
    return Bundle(target, bundle.manifest, bundle.fingerprint)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How graphs are written."""

    store: WeightStore
    options: ExportOptions = ExportOptions()
    activations: Activations | None = None


def _calibrated(
    checkpoint: Checkpoint, source: Path, target: Path, sentences: Sentences, progress: Progress
) -> Activations:
    """Measure ranges by fp32 graphs of their own, in a folder that is gone before the bundle is built."""
    if sentences.more:
        progress.warn(f"{sentences.file} holds more than {MOST_SENTENCES:,} sentences; the first ones are used")
    with _folder_beside(target) as folder:
        step = "build fp32 graphs to calibrate with"
        draft = _write(checkpoint, source, folder, _Plan(RangeStore()), progress, step).manifest()
        sources = encode_sentences(sentences, draft)
        search = calibration_search(draft.manifest.generation_defaults)
        ranges = measure_ranges(draft, sources, search, progress.iterate)
    return Activations(scaled="calibrated", sentences=len(sources), ranges=ranges)


def _expected_in_fp32(
    checkpoint: Checkpoint, source: Path, target: Path, expectations: Expectations, progress: Progress
) -> dict[str, Any]:
    """Compare expected outputs with fp32 graphs of their own: rounding changes some outputs of a right config."""
    with _folder_beside(target) as folder:
        step = "build fp32 graphs to compare outputs with"
        draft = _write(checkpoint, source, folder, _Plan(STORES["fp32"]()), progress, step).manifest()
        expected = ExpectedOutputs(expectations, draft)
        return expected.check(load_backend(draft), progress.iterate)


def _store(options: ExportOptions, activations: Activations | None) -> WeightStore:
    calibrated = activations is not None and activations.scaled == "calibrated"
    store = CalibratedInt8Store(activations.ranges) if activations and calibrated else STORES[options.precision]()
    return PartlyFp32Store(store, options.keep_fp32) if options.keep_fp32 else store


def _check_arguments(target: Path, options: ExportOptions) -> None:
    if options.precision not in STORES:
        raise ExportError(f"precision {options.precision!r} is not known; known: {', '.join(STORES)}")
    if options.calibrate is not None and options.precision != "int8":
        raise ExportError(
            f"calibration is for int8, not for {options.precision}; give --precision int8 with --calibrate"
        )
    if options.keep_fp32 and options.precision not in ("int8", "int4"):
        raise ExportError(
            f"--keep-fp32 is for int8 and int4, not for {options.precision}; give --precision int8 with it, or leave "
            "it out"
        )
    if options.name is not None and not re.fullmatch(NAME_PATTERN, options.name):
        raise ExportError(
            f"the name {options.name!r} is not usable; use up to 64 letters, digits, dots, dashes and underscores"
        )
    if target.exists() and not options.replace:
        raise ExportError(f"{target} exists already; choose another folder or give --replace")
    if target.exists() and not (target / MANIFEST).exists():
        raise ExportError(f"{target} exists and is no bundle; it is not replaced")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ExportError(f"{above} is no folder, so {target} cannot be made; choose another folder")


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A folder on the target's file system, gone at the end unless it was renamed; so are parents that it made."""
    parents = target.absolute().parents
    made = [parent for parent in parents if not parent.exists()]
    folder = parents[0] / f".{target.name}.{secrets.token_hex(8)}"
    try:
        parents[0].mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        folder.chmod(0o755)
        yield folder
    finally:
        SIGNALS.held += 1
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # one that holds the bundle stays, and those above it
            for parent in made:
                parent.rmdir()
        SIGNALS.release()


def _appear(folder: Path, target: Path, *, replace: bool) -> None:
    if not (replace and target.exists()):
        folder.rename(target)
        return
    with _folder_beside(target) as aside:
        old = target.rename(aside / target.name)
        try:
            folder.rename(target)
        except BaseException:
            old.rename(target)
            raise


def _write(
    checkpoint: Checkpoint,
    source: Path,
    folder: Path,
    plan: "_Plan",
    progress: Progress,
    step: str,
) -> "_Writing":
    """All files but the manifest."""
    store, options = plan.store, plan.options
    total = sum({id(array): array.nbytes for array in checkpoint.weights.values()}.values())
    with progress.counting(step, total) as advance, WeightsFile(folder / WEIGHTS, advance) as weights:
        graphs = build_graphs(checkpoint, store, options.precision, weights)
    if isinstance(store, PartlyFp32Store):
        store.check()
    stored = check_stored_weights(graphs, folder / WEIGHTS, store.probes)
    for file, graph in graphs.items():
        (folder / file).write_bytes(graph.SerializeToString(deterministic=True))
    if checkpoint.spec.relative_positions is not None and options.precision != "fp16":  # for the CPU's loops
        (folder / RELATIVE_BIAS).write_bytes(checkpoint.weights["decoder.relative_bias"].astype("<f4").tobytes())
    _copy_tokenizer(checkpoint, source, folder)
    weightless = dataclasses.replace(checkpoint, weights={})
    name = options.name or _plain_name(source)
    with progress.counting("compute checksums", _bytes(folder)) as advance:
        sums = _sums(folder, advance)
    return _Writing(weightless, folder, options, name, plan.activations, sums, stored)


def _copy_tokenizer(checkpoint: Checkpoint, source: Path, folder: Path) -> None:
    for name, file in checkpoint.tokenizer_files.items():
        shutil.copyfile(source / file, folder / name)
    for name, content in checkpoint.tokenizer_contents.items():
        (folder / name).write_bytes(content)


def _sums(folder: Path, advance: Advance) -> dict[str, dict[str, Any]]:
    """Checksum and size of every file."""
    result = {}
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        with file.open("rb") as stream:
            result[file.name] = {"sha256": digest(stream, size, advance), "bytes": size}
    return result


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@dataclass(frozen=True, slots=True)
class _Writing:
    """A bundle whose files are there, but for the manifest."""

    checkpoint: Checkpoint
    folder: Path
    options: ExportOptions
    name: str
    activations: Activations | None
    sums: dict[str, dict[str, Any]]
    stored_error: float

    def manifest(self, *, parity: dict[str, Any] | None = None, golden: list[dict[str, Any]] | None = None) -> Bundle:
        """Write the manifest, and read it as the server will.

        Raises:
            ExportError: the server would refuse it.
        """
        spec, languages = self.checkpoint.spec, self.checkpoint.languages
        told = self.activations
        data = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "architecture": spec.architecture,
            "precision": self.options.precision,
            "activations": None if told is None else told.model_dump(exclude_defaults=True),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "dimensions": {
                "d_model": spec.d_model,
                "decoder_layers": spec.decoder_layers,
                "decoder_heads": spec.decoder_heads,
                "source_vocabulary": spec.source_vocabulary,
                "target_vocabulary": spec.target_vocabulary,
                "max_source_tokens": spec.max_source_positions,
                "max_target_tokens": spec.max_target_positions,
                **_beside(spec),
            },
            "special_tokens": dataclasses.asdict(self.checkpoint.special_tokens),
            "generation_defaults": dict(self.checkpoint.generation),
            "tokenizer": {
                "kind": self.checkpoint.tokenizer_kind,
                "files": [*self.checkpoint.tokenizer_files, *self.checkpoint.tokenizer_contents],
                **self.checkpoint.tokenizer_settings,
            },
            # Left out where there are none: servers of before know no such field.
            **({} if languages is None else {"languages": languages.model_dump(exclude_defaults=True)}),
            "files": self.sums,
            "golden": golden or [_DRAFTED_GOLDEN],
            "golden_tolerance": _GOLDEN_TOLERANCE[self.options.precision],
            "spec": spec.told(),
            "parity": parity or {},
            "producers": {
                "beamline": beamline_server.__version__,
                "torch": version("torch"),
                "onnx": onnx.__version__,
                "python": platform.python_version(),
            },
        }
        raw = json.dumps(data, indent=2).encode() + b"\n"
        (self.folder / MANIFEST).write_bytes(raw)
        (self.folder / CHECKSUM).write_text(checksum_line(raw), "utf-8")
        try:
            manifest, fingerprint = read_manifest(self.folder)
            bundle = Bundle(self.folder, manifest, fingerprint)
            load_tokenizer(bundle)
        except BundleError as error:
            raise ExportError(f"the checkpoint's settings make no valid bundle: {error.problem}") from error
        return bundle


def _plain_name(source: Path) -> str:
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in source.resolve().name)
    return (name.lstrip("._-") or "model")[:64]


def _beside(spec: TransformerSpec) -> dict[str, Any]:
    """Dimensions that are left out where there is nothing to tell: servers of before know no such field."""
    told: dict[str, Any] = {
        "attention_width": None if spec.attention == spec.d_model else spec.attention,
        "key_value_heads": spec.key_value_heads,
        "decoder_only": spec.decoder_only or None,
        "rotary_positions": spec.rotary is not None or None,
    }
    if (relative := spec.relative_positions) is not None:
        layers = relative.layers(spec.decoder_layers)
        told["relative_positions"] = {"layers": layers, "distances": relative.decoder_reach + 1}
    return {name: value for name, value in told.items() if value is not None}


def _verified(folder: Path, advance: Advance) -> Bundle:
    try:
        return load_bundle(folder, advance)
    except BundleError as error:
        raise ExportError(f"the written bundle cannot be read: {error}") from error
