"""`beamline inspect`: a bundle for people and for programs."""

import json
from pathlib import Path

import pytest

from beamline_server.inspect_cli import aligned, main
from doubles.service import write_bundle


def test_it_tells_what_is_in_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_bundle(
        tmp_path,
        parity={"device": "cpu", "largest": {"logits": 1e-5}, "lengths": [1, 2]},
        producers={"torch": "2.13.0"},
        generation_defaults={"max_new_tokens": 9, "not_supported": {"num_beam_groups": "has no effect"}},
    )
    assert main([str(tmp_path)]) == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {
        "name test-model",
        "architecture marian",
        "precision fp32",
        "d_model 8",
        "max_source_tokens 512",
        "eos 256",
        "max_new_tokens 9",
        "num_beam_groups has no effect",
        "logits 1e-05",
        "lengths 1 2",
        "torch 2.13.0",
        f"encoder.onnx {manifest.files['encoder.onnx'].bytes:,} bytes",
        f"{sum(file.bytes for file in manifest.files.values()):,} bytes in all",
        "files verified no; --verify",
    } <= lines


def test_it_tells_how_activations_are_scaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In two lines: a model has some hundred ranges."""
    activations = {"scaled": "calibrated", "sentences": 400, "ranges": {"encoder.0.ffn.up": 5.5, "cross_kv": 7.5}}
    write_bundle(tmp_path, precision="int8", activations=activations)
    assert main([str(tmp_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    at = lines.index("activations")
    assert lines[at + 1 : at + 3] == ["scaled calibrated", "sentences 400"]
    assert "cross_kv" not in " ".join(lines)
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["activations"] == activations


def test_values_are_in_one_column() -> None:
    assert aligned([("a", "1"), ("longer", "2"), ("heading", "")]) == "a        1\nlonger   2\nheading\n"


def test_json_is_the_manifest_with_its_fingerprint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_bundle(tmp_path)
    assert main([str(tmp_path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content.pop("fingerprint")) == 64
    assert content == manifest.model_dump(mode="json")


def test_verifying_reads_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path)
    assert main([str(tmp_path), "--verify"]) == 0
    assert capsys.readouterr().out.endswith("yes\n")
    (tmp_path / "weights.bin").write_bytes(b"weights.bjn")
    assert main([str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([str(tmp_path), "--verify"]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"beamline inspect: {tmp_path / 'weights.bin'}: does not match its checksum; copy the bundle again"


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert "is this a bundle?" in line


@pytest.mark.parametrize("flags", [[], ["--verify"]])
def test_what_is_no_part_of_the_bundle_is_told_on_the_side(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path)
    (tmp_path / "lost+found").mkdir()
    assert main([str(tmp_path), "--json", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == "beamline inspect: no part of the bundle, ignored: 'lost+found'\n"
    assert json.loads(captured.out)["name"] == "test-model"
    for i in range(10):
        (tmp_path / f"note {i}\n").write_bytes(b"")
    assert main([str(tmp_path), *flags]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("'note 6\\n' and 3 more")


def test_it_tells_the_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = {"fra": {"token": 3, "target": True, "source": True}, "eng": {"token": 4, "target": True}}
    languages = {"codes": codes, "source_marked": "source_after", "target_begins": "forced_first"}
    write_bundle(tmp_path, languages={**languages, "default_source": "fra"})
    assert main([str(tmp_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    at = lines.index("languages")
    assert lines[at + 1 : at + 7] == [
        "source marked source_after",
        "target begins forced_first",
        "source fra",
        "default source fra",
        "target fra eng",
        "default target none; required",
    ]
