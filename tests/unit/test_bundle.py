"""A bundle is verified before it is served; what is wrong is named, with its file."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beamline_server.bundle import BundleError, checksum_line, digest, load_bundle, read_manifest
from beamline_server.graphs import DECODER_STEP, GraphSizes, decoder_pieces, graph_files
from beamline_server.manifest import CHECKSUM, MANIFEST
from doubles.service import VOCABULARY, make_manifest, write_bundle, write_manifest

CALIBRATED = {"scaled": "calibrated", "sentences": 400, "ranges": {"head.weight": 8.5, "cross_kv": 0.0}}
REMEDIES = ("copy the bundle again", "export the model again", "is this a bundle? `beamline export` writes one")
NO_FILE = {"sha256": "0" * 64, "bytes": 0}
OF_ONE, OF_TWO = GraphSizes(1, 8, VOCABULARY), GraphSizes(2, 8, VOCABULARY)
FILES_OF_TWO = [*graph_files("fp32", OF_TWO), "weights.bin"]
FILES = [*graph_files("fp32", OF_ONE), "weights.bin"]


def relative(layers: int, listed: int | None = None) -> Callable[[Any], None]:
    """A manifest of relative positions: five distances, and a file of them if it has so many bytes."""

    def change(manifest: Any) -> None:
        manifest["dimensions"]["relative_positions"] = {"layers": layers, "distances": 5}
        if listed is not None:
            manifest["files"]["relative_bias.bin"] = {"sha256": "0" * 64, "bytes": listed}

    return change


def decoder_only(**sizes: object) -> Callable[[Any], None]:
    """A manifest of a model without an encoder; its graphs are those of one that has one."""

    def change(manifest: Any) -> None:
        manifest["dimensions"] |= {"decoder_only": True, "max_source_tokens": 255, **sizes}

    return change


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
    """Change the manifest by a function; its checksum fits."""

    def change(change: Callable[[Any], object]) -> Path:
        data = json.loads((bundle / MANIFEST).read_text())
        change(data)
        write_manifest(bundle, data)
        return bundle

    return change


def refused(bundle: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle)
    line, told = str(caught.value), f"{caught.value.path}: {caught.value.problem}; "
    assert line.isprintable()
    assert line.startswith(told)
    assert line.endswith(REMEDIES)
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
    assert (error.path.name, error.problem) == (name, "does not match its checksum")


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


@pytest.mark.parametrize("name", [*FILES, MANIFEST, CHECKSUM])
def test_a_link_is_followed(name: str, bundle: Path) -> None:
    """Stores keep the content elsewhere; what counts is that it is the manifest's."""
    shutil.move(bundle / name, bundle.parent / name)
    (bundle / name).symlink_to(bundle.parent / name)
    loaded = load_bundle(bundle)
    assert name in (MANIFEST, CHECKSUM) or loaded.read(name) == (bundle.parent / name).read_bytes()
    with (bundle.parent / name).open("ab") as stream:
        stream.write(b" ")
    assert refused(bundle).path.name == name


def test_a_bundle_may_be_a_link_itself(bundle: Path) -> None:
    link = bundle.parent / "current"
    link.symlink_to(bundle, target_is_directory=True)
    assert load_bundle(link).fingerprint == load_bundle(bundle).fingerprint


@pytest.mark.parametrize("name", ["weights.bin", "encoder.onnx", MANIFEST, CHECKSUM])
@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("pipe", "cannot be read (no regular file)"),
        ("socket", "cannot be read (no regular file)"),
        ("folder", "cannot be read (no regular file)"),
        ("/dev/zero", "cannot be read (no regular file)"),
        ("nothing", None),
        ("itself", "cannot be read (Too many levels of symbolic links)"),
        ("file/below", "cannot be read (Not a directory)"),
        ("x" * 300, "cannot be read (File name too long)"),
    ],
)
def test_a_link_to_no_file_is_found(name: str, target: str, problem: str | None, bundle: Path) -> None:
    """None of them is opened: a pipe would wait, a device never ends."""
    os.mkfifo(bundle.parent / "pipe")
    (bundle.parent / "folder").mkdir()
    (bundle.parent / "file").write_bytes(b"")
    (bundle / name).unlink()
    (bundle / name).symlink_to(bundle / name if target == "itself" else bundle.parent / target)
    with socket.socket(socket.AF_UNIX) as opened, contextlib.chdir(bundle.parent):
        opened.bind("socket")
        error = refused(bundle)
    gone = "is missing" if name in FILES else "cannot be read (No such file or directory)"
    assert (error.path.name, error.problem) == (name, problem or gone)


def test_no_more_is_read_than_the_manifest_says(bundle: Path) -> None:
    """A file that grows while it is read is no reason to go on reading."""
    loaded = load_bundle(bundle)
    size = loaded.manifest.files["weights.bin"].bytes
    stream = io.BytesIO(b"weights.bin and so on without an end")
    assert digest(stream, size) == loaded.manifest.files["weights.bin"].sha256
    assert stream.tell() == size
    with (bundle / "weights.bin").open("ab") as growing:
        growing.write(b"more")
    assert refused(bundle).problem == f"has {size + 4} bytes, the manifest says {size}"


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


@pytest.mark.parametrize("content", [b"weights.bim", b"Weights.bin"])
@pytest.mark.parametrize("read", [0, 4, 11])
def test_what_has_changed_is_found_at_the_end_of_a_stream(content: bytes, read: int, bundle: Path) -> None:
    """However much of it was looked at."""
    loaded, memory = load_bundle(bundle), bytearray(read)
    with loaded.streamed("weights.bin") as stream:
        stream.fill(memoryview(memory))
    assert memory == b"weights.bin"[:read]
    (bundle / "weights.bin").write_bytes(content)
    with pytest.raises(BundleError, match="does not match its checksum"), loaded.streamed("weights.bin") as stream:
        stream.fill(memoryview(memory))


def test_what_is_summed_is_told(bundle: Path) -> None:
    told: list[int] = []
    loaded = load_bundle(bundle, told.append)
    assert sum(told) == sum(entry.bytes for entry in loaded.manifest.files.values())


def test_a_folder_in_place_of_a_file_is_found(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").mkdir()
    assert refused(bundle).path.name == "weights.bin"


def test_what_is_not_listed_is_told_and_left_alone(bundle: Path) -> None:
    """But for what Kubernetes keeps in its volumes, which is expected; a hidden file is told like any other."""
    assert load_bundle(bundle).foreign_files() == []
    (bundle / "notes.txt").write_bytes(b"")
    (bundle / "lost+found").mkdir()
    (bundle / "dangling").symlink_to("nowhere")
    (bundle / "..2026_01_01_00_00_00.123").mkdir()
    (bundle / "..data").symlink_to("..2026_01_01_00_00_00.123", target_is_directory=True)
    (bundle / ".weights.bin").write_bytes(b"")
    (bundle / "..weights.bin").write_bytes(b"")
    hidden = ["..weights.bin", ".weights.bin"]
    assert load_bundle(bundle).foreign_files() == [*hidden, "dangling", "lost+found", "notes.txt"]


@pytest.mark.parametrize(
    "name",
    [
        *("../weights.bin", "/etc/passwd", "a/b", "a/", "", ".", "..", "a\\b", "C:x", "a\0b", "a\nb", ".a", "é"),
        *("x" * 300, MANIFEST, CHECKSUM),
    ],
)
def test_names_cannot_lead_out_of_the_folder(name: str, edit: Callable[..., Path]) -> None:
    entry = {"sha256": "0" * 64, "bytes": 0}
    error = refused(edit(lambda data: data["files"].update({name: entry})))
    assert error.path.name == MANIFEST
    assert error.problem == f"files: {name[:100]!r} is not a plain file name"


def test_tokenizer_files_must_be_listed(edit: Callable[..., Path]) -> None:
    error = refused(edit(lambda data: data["tokenizer"].update(kind="tokenizers", files=["../../tokenizer.json"])))
    assert error.problem == "files: '../../tokenizer.json' is not listed"


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, "4", None, 1.5, 4.0, [1], 10**40, "4\n" * 1000, ...])
def test_another_format_version_asks_for_another_export(version: object, edit: Callable[..., Path]) -> None:
    def change(data: dict[str, object]) -> None:
        data.pop("format_version")
        if version is not ...:
            data["format_version"] = version

    error = refused(edit(change))
    assert error.path.name == MANIFEST
    assert error.problem.startswith("is of format version ")
    assert error.problem.endswith(", this server reads 4")
    assert str(error).endswith("; export the model again")
    assert len(error.problem) < 80


def test_a_bundle_from_before_the_checksum_asks_for_another_export(bundle: Path) -> None:
    (bundle / CHECKSUM).unlink()
    assert (refused(bundle).path.name, refused(bundle).problem) == (CHECKSUM, "is missing")
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**data, "format_version": 3}))
    error = refused(bundle)
    assert str(error) == (f"{bundle / MANIFEST}: is of format version 3, this server reads 4; export the model again")


def test_the_checksum_is_what_sha256sum_writes_and_checks(bundle: Path) -> None:
    written = subprocess.run(["sha256sum", MANIFEST], cwd=bundle, capture_output=True, check=True, text=True).stdout
    assert written == (bundle / CHECKSUM).read_text() == checksum_line((bundle / MANIFEST).read_bytes())
    assert written.split()[0] == load_bundle(bundle).fingerprint


def test_an_edited_manifest_is_told_from_the_one_that_was_exported(bundle: Path) -> None:
    file = bundle / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    assert str(refused(bundle)) == (
        f"{file}: does not match manifest.sha256; copy the bundle again; if it was edited, export the model again"
    )


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"format_version": 2'])
def test_a_manifest_that_is_no_json_is_named(content: bytes, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(content)
    (bundle / CHECKSUM).write_text(checksum_line(content))
    error = refused(bundle)
    assert (error.path.name, error.problem.startswith("is not JSON")) == (MANIFEST, True)


@pytest.mark.parametrize(("name", "most"), [(MANIFEST, 4 * 1024 * 1024), (CHECKSUM, 80)])
def test_a_manifest_of_any_length_is_not_read(name: str, most: int, bundle: Path) -> None:
    with (bundle / name).open("r+b") as stream:
        stream.truncate(1 << 40)
    assert (refused(bundle).path.name, refused(bundle).problem) == (
        name,
        f"has 1,099,511,627,776 bytes, more than {most:,}",
    )


@pytest.mark.parametrize("content", [b"[]", b"null", b'"x"', b"{}"])
def test_json_that_is_no_manifest_is_named(content: bytes, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(content)
    (bundle / CHECKSUM).write_text(checksum_line(content))
    assert "format version None" in refused(bundle).problem


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert str(error).startswith(
        f"{tmp_path / MANIFEST}: cannot be read (No such file or directory); is this a bundle?"
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(flavour="x"), "flavour"),
        (lambda d: d["dimensions"].update(heads=4), "dimensions.heads"),
        (lambda d: d["dimensions"].update(d_model=0), "dimensions.d_model"),
        (lambda d: d["dimensions"].update(d_model="8 or so"), "dimensions.d_model"),
        (lambda d: d["dimensions"].update(decoder_layers=10**7), "dimensions.decoder_layers"),
        (lambda d: d["dimensions"].update(d_model=2**31), "dimensions.d_model"),
        (lambda d: d["dimensions"].update(d_model=True), "dimensions.d_model"),
        (lambda d: d["dimensions"].update(d_model=8.0), "dimensions.d_model"),
        (lambda d: d["dimensions"].update(decoder_heads=2**31), "dimensions.decoder_heads"),
        (lambda d: d["dimensions"].update(source_vocabulary=2**31), "dimensions.source_vocabulary"),
        (lambda d: d["dimensions"].update(target_vocabulary=2**63), "dimensions.target_vocabulary"),
        (lambda d: d["dimensions"].update(target_vocabulary=1), "dimensions.target_vocabulary"),
        (lambda d: d["dimensions"].update(max_source_tokens=2**64), "dimensions.max_source_tokens"),
        (lambda d: d["dimensions"].update(max_target_tokens=10**400), "dimensions.max_target_tokens"),
        (lambda d: d["special_tokens"].update(decoder_start=2**63), "special_tokens.decoder_start"),
        (lambda d: d["special_tokens"].update(eos=[1] * 65), "special_tokens.eos"),
        (lambda d: d["special_tokens"].update(banned=[1] * 4097), "special_tokens.banned"),
        (lambda d: d["special_tokens"].update(banned_at_start=[1] * 4097), "special_tokens.banned_at_start"),
        (lambda d: d["generation_defaults"].update(max_new_tokens=2**63), "generation_defaults.max_new_tokens"),
        (lambda d: d["generation_defaults"].update(min_new_tokens=-1), "generation_defaults.min_new_tokens"),
        (lambda d: d["generation_defaults"].update(not_supported={"x" * 301: ""}), "generation_defaults.not_supported"),
        (lambda d: d["dimensions"].pop("decoder_heads"), "dimensions.decoder_heads"),
        (lambda d: d["special_tokens"].update(eos=[-1]), "special_tokens.eos.0"),
        (lambda d: d["special_tokens"].update(pad=-1), "special_tokens.pad"),
        (lambda d: d["generation_defaults"].update(beam_size=17), "generation_defaults.beam_size"),
        (lambda d: d["generation_defaults"].update(length_penalty=float("nan")), "generation_defaults.length_penalty"),
        (lambda d: d["generation_defaults"].update(length_penalty=11), "generation_defaults.length_penalty"),
        (lambda d: d["files"]["weights.bin"].update(sha256="xyz"), "files.weights.bin.sha256"),
        (lambda d: d["files"]["weights.bin"].update(bytes=-1), "files.weights.bin.bytes"),
        (lambda d: d["files"]["weights.bin"].update(bytes=2**63), "files.weights.bin.bytes"),
        (lambda d: d["files"].update({f"f{i}": d["files"]["weights.bin"] for i in range(2064)}), "files"),
        (lambda d: d.update(name="x" * 300), "name"),
        (lambda d: d.update(architecture="x" * 301), "architecture"),
        (lambda d: d.update(created="x" * 301), "created"),
        (lambda d: d["producers"].update(torch="x" * 301), "producers.torch"),
        (lambda d: d["spec"].update(d_model=2**63), "spec"),
        (lambda d: d["spec"].update(norm_epsilon=float("inf")), "spec"),
        (lambda d: d["parity"].update(figures={"worst": [float("nan")]}), "parity"),
        (lambda d: d["parity"].update({"x" * 301: 0}), "parity"),
        (lambda d: d["parity"].update(a={"b": {"c": {"d": {}}}}), "parity"),
        (lambda d: d.update(golden=[]), "golden"),
        (lambda d: d["golden"][0].update(source=[2**63]), "golden.0.source.0"),
        (lambda d: d["golden"][0].update(top_logprob=[1e308]), "golden.0.top_logprob.0"),
        (lambda d: d.update(golden_tolerance=1e308), "golden_tolerance"),
        (lambda d: d.update(golden_tolerance=0.11), "golden_tolerance"),
        (lambda d: d.update(name="../model"), "name"),
        (lambda d: d.update(precision="fp8"), "precision"),
        (lambda d: d.update(golden_tolerance=float("inf")), "golden_tolerance"),
        (lambda d: d.update(golden_tolerance=0), "golden_tolerance"),
        (lambda d: d.update(activations={"scaled": "by hand"}), "activations.scaled"),
        (lambda d: d.update(activations={**CALIBRATED, "sentences": 0}), "activations.sentences"),
        (lambda d: d.update(activations={**CALIBRATED, "ranges": {"x": -1.0}}), "activations.ranges.x"),
        (lambda d: d.update(activations={**CALIBRATED, "ranges": {"x": float("inf")}}), "activations.ranges.x"),
        (lambda d: d.update(activations={**CALIBRATED, "ranges": {"x": 1e39}}), "activations.ranges.x"),
        (lambda d: d.update(activations={**CALIBRATED, "sentences": 2**63}), "activations.sentences"),
        (lambda d: d["tokenizer"].update(kind="words"), "tokenizer.kind"),
        (lambda d: d["tokenizer"].update(special=[-1]), "tokenizer.special.0"),
        (lambda d: d["generation_defaults"].update(n_best=0), "generation_defaults.n_best"),
        (lambda d: d.pop("parity"), "parity"),
    ],
)
def test_an_invalid_field_is_named(change: Callable[[Any], object], field: str, edit: Callable[..., Path]) -> None:
    error = refused(edit(change))
    assert error.path.name == MANIFEST
    assert error.problem.startswith(f"{field}: ") or error.problem.startswith(f"{field}.")
    assert len(error.problem) < 500


def test_all_invalid_fields_are_named_at_once(edit: Callable[..., Path]) -> None:
    problem = refused(edit(lambda data: data.update(flavour="x", precision="y", golden_tolerance=-1))).problem
    assert [part.split(":")[0] for part in problem.split("; ")] == ["precision", "golden_tolerance", "flavour"]


def test_of_many_invalid_fields_some_are_named(edit: Callable[..., Path]) -> None:
    problem = refused(edit(lambda data: data.update({f"more\n{i}" + "x" * 1000: i for i in range(100)}))).problem
    assert problem.endswith("; and 92 more")
    assert len(problem.split("; ")) == 9
    assert len(problem) < 2000


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d["special_tokens"].update(eos=[300]), "special_tokens: 300 is outside the target vocabulary"),
        (lambda d: d["special_tokens"].update(banned=[3, 400]), "special_tokens: 400 is outside the target vocabulary"),
        (lambda d: d["special_tokens"].update(source_eos=500), "special_tokens: 500 is outside the source vocabulary"),
        (
            lambda d: d["special_tokens"].update(banned=[*range(258)]),
            "special_tokens: nothing can be generated first: ",
        ),
        (
            lambda d: d["special_tokens"].update(banned=[*range(256)], banned_at_start=[257]),
            "special_tokens: nothing can",
        ),
        (
            lambda d: d["files"]["encoder.onnx"].update(bytes=2**31),
            "files: 'encoder.onnx' has 2147483648 bytes, more th",
        ),
        (lambda d: d["golden"].append({"source": [1] * 512, "forced": [0], "top_logprob": [0]}), None),
        (
            lambda d: d.update(golden=[{"source": [1] * 512, "forced": [0], "top_logprob": [0]}] * 8),
            "golden: 4104 tokens",
        ),
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
        (
            lambda d: d["dimensions"].update(attention_width=9),
            "dimensions: decoder_heads 2 does not divide attention_width 9",
        ),
        (lambda d: d["dimensions"].update(rotary_positions=True), "dimensions: key_value_heads and rotary_positions b"),
        (decoder_only(key_value_heads=3), "dimensions: key_value_heads 3 does not divide decoder_heads 2"),
        (decoder_only(source_vocabulary=300), "dimensions: a model without an encoder has one vocabulary"),
        (decoder_only(max_source_tokens=256), "dimensions: a prompt of max_source_tokens leaves no room"),
        (lambda d: (decoder_only()(d), d.update(precision="fp16")), "dimensions: graphs of fp16 have an encoder"),
        (
            decoder_only(relative_positions={"layers": 1, "distances": 5}),
            "files: 'relative_bias.bin' is not listed; dimensions: relative_positions are not in graphs without",
        ),
        (
            lambda d: (decoder_only()(d), d["golden"][0].update(source=[1] * 255, forced=[0, 0], top_logprob=[0, 0])),
            "golden: source and forced have 257 tokens together",
        ),
        (relative(layers=1), "files: 'relative_bias.bin' is not listed"),
        (relative(layers=3, listed=120), "dimensions: relative_positions of 3 layers, the decoder has 1"),
        (relative(layers=1, listed=9), "files: 'relative_bias.bin' has 9 bytes, by the dimensions 40"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_named(
    change: Callable[[Any], object], problem: str | None, edit: Callable[..., Path]
) -> None:
    bundle = edit(change)
    if problem is None:
        load_bundle(bundle)
    else:
        assert refused(bundle).problem.startswith(problem)


def test_a_token_that_is_left_is_enough(edit: Callable[..., Path]) -> None:
    load_bundle(edit(lambda d: d["special_tokens"].update(banned=[*range(256)])))


@pytest.mark.parametrize(
    ("change", "file", "problem"),
    [
        (
            {"d_model": 16},
            "encoder.onnx",
            "its cross_k_0 is float32[S, R, 8], by the manifest's dimensions float32[S, R, ",
        ),
        (
            {"target_vocabulary": 259},
            "decoder_step.onnx",
            "its logprob is float32[N, 258], by the manifest's dimensions ",
        ),
        (
            {"source_vocabulary": 1 << 22},
            "encoder.onnx",
            "its table of embedding has 258 rows, by the manifest's dimensio",
        ),
        (
            {"max_source_tokens": 1 << 20},
            "encoder.onnx",
            "its table of positions has 512 rows, by the manifest's dimensi",
        ),
        (
            {"max_target_tokens": 255},
            "decoder_step.onnx",
            "its table of positions has 256 rows, by the manifest's dimens",
        ),
    ],
)
def test_dimensions_that_are_not_those_of_the_graphs_are_named(
    change: dict[str, int], file: str, problem: str, edit: Callable[..., Path]
) -> None:
    """Whoever made the manifest's checksum fit: nothing is built in a size that the files do not have."""
    error = refused(edit(lambda data: data["dimensions"].update(change)))
    assert error.path.name == file
    assert error.problem.startswith(problem)


def test_layers_that_are_not_those_of_the_graphs_are_named(tmp_path: Path) -> None:
    """With all files that so many layers ask for."""
    two = {**make_manifest().dimensions.model_dump(), "decoder_layers": 2}
    manifest = write_bundle(tmp_path, dimensions=two, files=dict.fromkeys(FILES_OF_TWO, NO_FILE))
    load_bundle(tmp_path)
    data = manifest.model_dump(mode="json")
    data["dimensions"]["decoder_layers"] = 1
    write_manifest(tmp_path, data)
    error = refused(tmp_path)
    assert (error.path.name, error.problem) == (
        "encoder.onnx",
        "its cross_k_1 is float32[S, R, 8], by the manifest's dimensions not there",
    )


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"encoder.onnx", b"\x3a\x7f"])
def test_what_is_no_graph_is_named(content: bytes, bundle: Path) -> None:
    (bundle / "encoder.onnx").write_bytes(content)
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"]["encoder.onnx"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_manifest(bundle, data)
    assert refused(bundle).path.name == "encoder.onnx"


@pytest.mark.parametrize("content", [b"weights.bi", b"weights.bin.", b""])
def test_weights_that_the_graphs_do_not_take_are_named(content: bytes, bundle: Path) -> None:
    (bundle / "weights.bin").write_bytes(content)
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"]["weights.bin"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_manifest(bundle, data)
    error = refused(bundle)
    assert (error.path.name, error.problem) == ("weights.bin", f"has {len(content)} bytes, the graphs take 11 of it")


@pytest.mark.parametrize(("precision", "unused"), [("fp16", decoder_pieces(OF_ONE)), ("int8", [DECODER_STEP])])
def test_graphs_that_no_device_of_a_precision_runs_need_not_be_there(
    precision: str, unused: list[str], tmp_path: Path
) -> None:
    names = [*graph_files(precision, OF_ONE), "weights.bin"]
    activations = {"scaled": "per_row"} if precision == "int8" else None
    write_bundle(tmp_path, precision=precision, activations=activations, files=dict.fromkeys(names, NO_FILE))
    assert set(load_bundle(tmp_path).manifest.files) == {*names}
    assert not {*names} & {*unused}


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
    write_manifest(bundle, data)
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


@pytest.mark.parametrize(("name", "stride"), [(MANIFEST, 31), (CHECKSUM, 1)])
def test_no_changed_bit_of_a_manifest_passes(name: str, stride: int, bundle: Path) -> None:
    """Every bit of a byte in turn, in every fourth byte of the manifest and in all of its checksum's file."""
    file = bundle / name
    original = file.read_bytes()
    for bit in range(0, 8 * len(original), stride):
        changed = bytearray(original)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        assert refused(bundle).problem == "does not match manifest.sha256", f"bit {bit}"
    file.write_bytes(original)
    load_bundle(bundle)
