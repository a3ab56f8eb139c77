"""A bundle is verified before it is served; what is wrong is named, with its file."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beamline_server.bundle import (
    DECODER_STEP,
    MANIFEST,
    BundleError,
    decoder_graphs,
    decoder_pieces,
    load_bundle,
    read_manifest,
)
from doubles.service import make_manifest, write_bundle

CALIBRATED = {"scaled": "calibrated", "sentences": 400, "ranges": {"head.weight": 8.5, "cross_kv": 0.0}}
FILES = ["encoder.onnx", *decoder_graphs("fp32", 1), "weights.bin"]


def scale(activations: object) -> Callable[[Any], object]:
    """Makes it an int8 bundle that tells this."""
    return lambda data: data.update(precision="int8", activations=activations)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(folder)
    return folder


@pytest.fixture
def edit(bundle: Path) -> Callable[..., Path]:
    """Change the manifest by a function."""

    def change(change: Callable[[Any], object]) -> Path:
        file = bundle / MANIFEST
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))
        return bundle

    return change


def refused(bundle: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle)
    assert str(caught.value) == f"{caught.value.path}: {caught.value.problem}"
    return caught.value


def test_a_whole_bundle_is_read(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.path == bundle
    assert loaded.manifest == read_manifest(bundle)[0]
    assert loaded.fingerprint == read_manifest(bundle)[1]
    assert loaded.file("weights.bin") == bundle / "weights.bin"
    with pytest.raises(BundleError, match="is not listed in the manifest"):
        loaded.file("other.bin")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
def test_one_changed_byte_is_found(name: str, at: int, bundle: Path) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[at] ^= 1
    (bundle / name).write_bytes(content)
    error = refused(bundle)
    assert (error.path.name, error.problem) == (name, "does not match its checksum; copy the bundle again")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(name: str, bundle: Path) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes()[:-1])
    error = refused(bundle)
    assert error.path.name == name
    assert "bytes, the manifest says" in error.problem


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    assert (refused(bundle).path.name, "is missing" in refused(bundle).problem) == (name, True)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_link_is_followed(name: str, bundle: Path) -> None:
    """Stores keep the content elsewhere; what counts is that it is the manifest's."""
    shutil.move(bundle / name, bundle.parent / name)
    (bundle / name).symlink_to(bundle.parent / name)
    loaded = load_bundle(bundle)
    assert name == MANIFEST or loaded.read(name) == (bundle.parent / name).read_bytes()
    with (bundle.parent / name).open("ab") as stream:
        stream.write(b"}")
    assert refused(bundle).path.name == name


def test_a_bundle_may_be_a_link_itself(bundle: Path) -> None:
    link = bundle.parent / "current"
    link.symlink_to(bundle, target_is_directory=True)
    assert load_bundle(link).fingerprint == load_bundle(bundle).fingerprint


@pytest.mark.parametrize("target", ["nothing", "pipe", "folder", "/dev/zero"])
def test_a_link_to_no_file_is_found(target: str, bundle: Path) -> None:
    """None of them is opened: a pipe would wait, a device never ends."""
    os.mkfifo(bundle.parent / "pipe")
    (bundle.parent / "folder").mkdir()
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to(bundle.parent / target)
    error = refused(bundle)
    assert (error.path.name, error.problem) == ("weights.bin", "is missing or no file; copy the bundle again")


@pytest.mark.parametrize("content", [b"weights.bjn", b"weights", None], ids=["changed", "cut", "gone"])
def test_what_has_changed_since_it_was_verified_is_not_read(content: bytes | None, bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.read("weights.bin") == b"weights.bin"
    (bundle / "weights.bin").unlink()
    if content is not None:
        (bundle / "weights.bin").write_bytes(content)
    with pytest.raises(BundleError, match="copy the bundle again"):
        loaded.read("weights.bin")
    with pytest.raises(BundleError, match="is not listed in the manifest"):
        loaded.read("other.bin")


def test_a_folder_in_place_of_a_file_is_found(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").mkdir()
    assert refused(bundle).path.name == "weights.bin"


def test_what_is_not_listed_is_told_and_left_alone(bundle: Path) -> None:
    """But for the bookkeeping of volumes, which is expected."""
    assert load_bundle(bundle).foreign_files() == []
    (bundle / "notes.txt").write_bytes(b"")
    (bundle / "lost+found").mkdir()
    (bundle / "dangling").symlink_to("nowhere")
    (bundle / "..data").mkdir()
    assert load_bundle(bundle).foreign_files() == ["dangling", "lost+found", "notes.txt"]


@pytest.mark.parametrize(
    "name", ["../weights.bin", "/etc/passwd", "a/b", "a/", "", ".", "..", "a\\b", "C:x", "a\0b", "a\nb", MANIFEST]
)
def test_names_cannot_lead_out_of_the_folder(name: str, edit: Callable[..., Path]) -> None:
    entry = {"sha256": "0" * 64, "bytes": 0}
    error = refused(edit(lambda data: data["files"].update({name: entry})))
    assert error.path.name == MANIFEST
    assert error.problem == f"files: {name!r} is not a plain file name"


def test_tokenizer_files_must_be_listed(edit: Callable[..., Path]) -> None:
    error = refused(edit(lambda data: data["tokenizer"].update(kind="tokenizers", files=["../../tokenizer.json"])))
    assert error.problem == "files: '../../tokenizer.json' is not listed"


@pytest.mark.parametrize("version", [0, 1, 2, 4, "3", None, 1.5, [1], ...])
def test_another_format_version_asks_for_another_export(version: object, edit: Callable[..., Path]) -> None:
    def change(data: dict[str, object]) -> None:
        data.pop("format_version")
        if version is not ...:
            data["format_version"] = version

    error = refused(edit(change))
    assert error.path.name == MANIFEST
    assert error.problem.startswith("format version ")
    assert error.problem.endswith("this server reads 3: export the model again")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"format_version": 2'])
def test_a_manifest_that_is_no_json_is_named(content: bytes, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(content)
    error = refused(bundle)
    assert (error.path.name, error.problem.startswith("is not JSON")) == (MANIFEST, True)


@pytest.mark.parametrize("target", ["pipe", "folder", "/dev/zero"])
def test_a_manifest_that_is_no_file_is_found(target: str, bundle: Path) -> None:
    os.mkfifo(bundle.parent / "pipe")
    (bundle.parent / "folder").mkdir()
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).symlink_to(bundle.parent / target)
    error = refused(bundle)
    assert (error.path.name, error.problem.startswith("is no file; is this a bundle?")) == (MANIFEST, True)


def test_a_manifest_of_any_length_is_not_read(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(b" " * (16 * 1024 * 1024 + 1))
    assert refused(bundle).problem.startswith("is longer than 16,777,216 bytes")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"x"', b"{}"])
def test_json_that_is_no_manifest_is_named(content: bytes, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert "format version None" in refused(bundle).problem


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert (error.path.name, "is this a bundle?" in error.problem) == (MANIFEST, True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(flavour="x"), "flavour"),
        (lambda d: d["dimensions"].update(heads=4), "dimensions.heads"),
        (lambda d: d["dimensions"].update(d_model=0), "dimensions.d_model"),
        (lambda d: d["dimensions"].update(d_model="8 or so"), "dimensions.d_model"),
        (lambda d: d["dimensions"].update(decoder_layers=10**9), "dimensions.decoder_layers"),
        (lambda d: d["dimensions"].pop("decoder_heads"), "dimensions.decoder_heads"),
        (lambda d: d["special_tokens"].update(eos=[-1]), "special_tokens.eos.0"),
        (lambda d: d["special_tokens"].update(pad=-1), "special_tokens.pad"),
        (lambda d: d["generation_defaults"].update(beam_size=17), "generation_defaults.beam_size"),
        (lambda d: d["generation_defaults"].update(length_penalty=float("nan")), "generation_defaults.length_penalty"),
        (lambda d: d["generation_defaults"].update(length_penalty=11), "generation_defaults.length_penalty"),
        (lambda d: d["files"]["weights.bin"].update(sha256="xyz"), "files.weights.bin.sha256"),
        (lambda d: d["files"]["weights.bin"].update(bytes=-1), "files.weights.bin.bytes"),
        (lambda d: d.update(name="../model"), "name"),
        (lambda d: d.update(precision="fp8"), "precision"),
        (lambda d: d.update(golden_tolerance=float("inf")), "golden_tolerance"),
        (lambda d: d.update(golden_tolerance=0), "golden_tolerance"),
        (lambda d: d.update(activations={"scaled": "by hand"}), "activations.scaled"),
        (lambda d: d.update(activations={**CALIBRATED, "sentences": 0}), "activations.sentences"),
        (lambda d: d.update(activations={**CALIBRATED, "ranges": {"x": -1.0}}), "activations.ranges.x"),
        (lambda d: d.update(activations={**CALIBRATED, "ranges": {"x": float("inf")}}), "activations.ranges.x"),
        (lambda d: d["tokenizer"].update(kind="words"), "tokenizer.kind"),
        (lambda d: d["tokenizer"].update(special=[-1]), "tokenizer.special.0"),
        (lambda d: d["generation_defaults"].update(n_best=0), "generation_defaults.n_best"),
        (lambda d: d.pop("parity"), "parity"),
    ],
)
def test_an_invalid_field_is_named(change: Callable[[Any], object], field: str, edit: Callable[..., Path]) -> None:
    error = refused(edit(change))
    assert error.path.name == MANIFEST
    assert error.problem.startswith(f"{field}: ")
    assert "\n" not in str(error)


def test_all_invalid_fields_are_named_at_once(edit: Callable[..., Path]) -> None:
    problem = refused(edit(lambda data: data.update(flavour="x", precision="y", golden_tolerance=-1))).problem
    assert [part.split(":")[0] for part in problem.split("; ")] == ["precision", "golden_tolerance", "flavour"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d["special_tokens"].update(eos=[300]), "special_tokens: 300 is outside the target vocabulary"),
        (lambda d: d["special_tokens"].update(banned=[3, 400]), "special_tokens: 400 is outside the target vocabulary"),
        (lambda d: d["special_tokens"].update(source_eos=500), "special_tokens: 500 is outside the source vocabulary"),
        (lambda d: d["generation_defaults"].update(min_new_tokens=200), "generation_defaults: min_new_tokens 200"),
        (lambda d: d["generation_defaults"].update(max_new_tokens=300), "generation_defaults: min_new_tokens 0, max"),
        (lambda d: d["generation_defaults"].update(n_best=5), "generation_defaults: n_best 5 is more than beam_size 4"),
        (lambda d: d.update(activations={"scaled": "per_row"}), "activations: how they are scaled belongs to int8 bu"),
        (scale(None), "activations: how they are scaled belongs to int8 bundles, and to no others"),
        (scale({"scaled": "calibrated"}), "activations: ranges, and how many sentences"),
        (scale({**CALIBRATED, "ranges": {}}), "activations: ranges, and how many sentences"),
        (scale({**CALIBRATED, "scaled": "per_row"}), "activations: ranges, and how many sentences"),
        (lambda d: d["files"].pop("decoder_step.onnx"), "files: 'decoder_step.onnx' is not listed"),
        (lambda d: d["files"].pop("decoder_piece_2.onnx"), "files: 'decoder_piece_2.onnx' is not listed"),
        (lambda d: d["dimensions"].update(decoder_layers=2), "files: 'decoder_piece_3.onnx' is not listed"),
        (lambda d: d["dimensions"].update(decoder_heads=3), "dimensions: decoder_heads 3 does not divide d_model 8"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_named(
    change: Callable[[Any], object], problem: str, edit: Callable[..., Path]
) -> None:
    assert refused(edit(change)).problem.startswith(problem)


@pytest.mark.parametrize(("precision", "unused"), [("fp16", decoder_pieces(1)), ("int8", [DECODER_STEP])])
def test_graphs_that_no_device_of_a_precision_runs_need_not_be_there(
    precision: str, unused: list[str], edit: Callable[..., Path]
) -> None:
    def change(data: dict[str, Any]) -> None:
        data.update(precision=precision, activations={"scaled": "per_row"} if precision == "int8" else None)
        for name in unused:
            data["files"].pop(name)

    bundle = load_bundle(edit(change))
    assert set(bundle.manifest.files) == {"encoder.onnx", *decoder_graphs(precision, 1), "weights.bin"}


def test_how_activations_are_scaled_is_read(edit: Callable[..., Path]) -> None:
    for told in ({"scaled": "per_row"}, CALIBRATED):
        activations = load_bundle(edit(scale(told))).manifest.activations
        assert activations is not None
        assert activations.model_dump(exclude_defaults=True) == told


def test_a_file_that_nobody_reads_is_verified_all_the_same(bundle: Path) -> None:
    content = b"from elsewhere"
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"]["notes.txt"] = entry
    (bundle / MANIFEST).write_text(json.dumps(data))
    assert refused(bundle).problem.startswith("is missing")
    (bundle / "notes.txt").write_bytes(content[::-1])
    assert refused(bundle).problem.startswith("does not match its checksum")
    (bundle / "notes.txt").write_bytes(content)
    assert "notes.txt" in load_bundle(bundle).manifest.files


GOLDEN = {"source": [1, 2], "forced": [0, 5], "top_logprob": [-1.0, -0.5]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"top_logprob": [-1.0]}, "golden: forced and top_logprob differ in length"),
        ({"source": []}, "golden: [] is nothing that this model reads"),
        ({"source": [1, 9999]}, "golden: [1, 9999] is nothing that this model reads"),
        ({"forced": [0, 9999]}, "golden: [0, 9999] is nothing that this model reads"),
        ({"source": [1] * 600}, "golden: [1, 1,"),
    ],
)
def test_golden_inputs_must_be_readable(change: dict[str, Any], problem: str | None) -> None:
    """They run at warm-up, where nobody validates them any more."""
    problems = list(make_manifest(golden=[{**GOLDEN, **change}]).problems())
    assert (problem is None) == (not problems)
    assert problem is None or problems[0].startswith(problem)


def test_no_flipped_byte_of_a_manifest_passes_for_the_same_bundle(bundle: Path) -> None:
    """Either it is refused, or its fingerprint tells that it is another."""
    file = bundle / MANIFEST
    original = file.read_bytes()
    fingerprint = load_bundle(bundle).fingerprint
    refusals = 0
    for at in range(0, len(original), 3):
        changed = bytearray(original)
        changed[at] ^= 1
        file.write_bytes(changed)
        try:
            assert load_bundle(bundle).fingerprint != fingerprint
        except BundleError:
            refusals += 1
    assert refusals > 50
