"""`beamline export`: one clear line and exit status 2 for what is wrong; nothing is left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beamline_export.cli import main, report
from beamline_export.parity import random_sources
from beamline_server.bundle import load_bundle
from beamline_server.inspect_cli import main as inspect

FR_EN = Path(__file__).parents[3] / "models" / "fr-en"
Break = Callable[[Any], object]


def cut(checkpoint: Any) -> None:
    checkpoint.weights.write_bytes(checkpoint.weights.read_bytes()[:5000])


def unlink(name: str) -> Break:
    return lambda checkpoint: (checkpoint.folder / name).unlink()


BROKEN: list[Any] = [
    pytest.param(unlink("config.json"), "config.json is missing", id="no-config"),
    pytest.param(unlink("model.safetensors"), "holds no weights", id="no-weights"),
    pytest.param(cut, "model.safetensors cannot be read as a weights file", id="truncated"),
    pytest.param(lambda c: c.config(model_type="perceiver"), "known: marian, bart, mbart", id="unknown-family"),
    pytest.param(lambda c: c.config(d_model="32", nhead=None), "d_model must be", id="types"),
    pytest.param(lambda c: c.config(eos_token_id=10**6), "outside the target vocabulary", id="ids"),
    pytest.param(
        lambda c: c.tensors(lambda s: s.update({"generator.bias": torch.full((120,), torch.nan)})),
        "not finite",
        id="nan",
    ),
    pytest.param(
        lambda c: c.tensors(lambda s: [weight.fill_(1e38) for weight in s.values()]), "no numbers in PyTorch", id="huge"
    ),
    pytest.param(
        lambda c: c.tensors(lambda s: s.update({"src_embed.weight": torch.ones(90, 16)})), "has shape", id="shape"
    ),
    pytest.param(lambda c: (c.folder / "tokenizer.json").write_text("[" * 99_999), "tokenizer", id="tokenizer"),
    pytest.param(lambda c: (c.folder / "tokenizer.json").mkdir(), "is a folder, not", id="tokenizer-is-a-folder"),
    pytest.param(lambda c: os.mkfifo(c.folder / "tokenizer.json"), "is a pipe, not", id="tokenizer-is-a-pipe"),
    pytest.param(lambda c: c.config(**{"\x1b[31m": 1}), r"\x1b[31m is not known", id="escapes"),
]


@pytest.mark.parametrize(("spoil", "problem"), BROKEN)
def test_what_is_wrong_is_one_line_and_status_2(
    spoil: Break, problem: str, checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(checkpoint)
    assert main([str(checkpoint.folder), "-o", str(tmp_path / "bundle")]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("  ")]
    assert len(errors) == 1, captured.err
    assert errors[0].startswith("beamline export: ")
    assert problem in errors[0]
    assert not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no"), "-o", str(tmp_path / "bundle")]) == 2
    assert capsys.readouterr().err == (
        f"beamline export: {tmp_path / 'no'} is not a folder; give the folder that holds config.json and the weights\n"
    )


def test_a_bundle_is_written_told_and_replaced(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "bundle"
    command = [str(checkpoint.folder), "-o", str(target), "--name", "tiny"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "compared with the PyTorch model (cpu)" in captured.out
    assert "check it with outputs of your own model: --expect FILE" in captured.out
    assert f"wrote {target}: fp32" in captured.out
    assert [line.split(":")[0].strip() for line in captured.err.splitlines()] == [
        "read the checkpoint",
        "build the graphs",
        "compute checksums",
        "load the exported model",
        "run the exported model",
        "load the PyTorch model",
        "forced decodes",
        "beam searches",
        "verify the bundle",
    ]
    assert main(command) == 2
    assert "give --replace" in capsys.readouterr().err
    assert main([*command, "--replace", "--precision", "int8"]) == 0
    assert load_bundle(target).manifest.precision == "int8"
    told = capsys.readouterr().out
    assert "stored weights     within 0." in told
    assert f"wrote {target}: int8, " in told
    megabytes = checkpoint.weights.stat().st_size / 1e6
    assert f"MB (the checkpoint: {megabytes:.1f} MB); for a CPU; weights are rounded to 8 bits" in told
    assert told.endswith(f"next: beamline serve {target}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]
    assert inspect([str(target), "--verify"]) == 0


def test_a_calibrated_bundle_is_written_and_told(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, file = tmp_path / "bundle", tmp_path / "sentences.txt"
    sources = random_sources(90, 1, 20, count=24)
    file.write_text("\n\n".join(" ".join(map(str, source)) for source in sources))
    command = [str(checkpoint.folder), "-o", str(target), "--precision", "int8", "--calibrate", str(file)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert f"wrote {target}: int8 (calibrated), " in captured.out
    assert [line.split(":")[0].strip() for line in captured.err.splitlines()][:5] == [
        "read the checkpoint",
        "build fp32 graphs to calibrate with",
        "compute checksums",
        "calibrate",
        "build the graphs",
    ]
    activations = load_bundle(target).manifest.activations
    assert activations is not None
    assert (activations.scaled, activations.sentences) == ("calibrated", 24)


@pytest.mark.parametrize(
    ("precision", "content", "problem"),
    [
        ("int8", None, "sentences.txt cannot be read (No such file or directory)"),
        ("int8", b"\n", "sentences.txt holds no sentences"),
        ("int8", b"\xff", "sentences.txt: line 1 is not UTF-8 text"),
        ("int8", b"1\nune phrase\n", "line 2: 'une' is no token id below 90"),
        ("int8", b"1 " * 49, "line 1 has 49 tokens (the model takes 1 to 48)"),
        ("fp32", b"1 2", "calibration is for int8, not for fp32; give --precision int8 with --calibrate"),
    ],
    ids=["missing", "empty", "bytes", "words", "too-long", "fp32"],
)
def test_sentences_that_are_not_usable_are_one_line_and_status_2(
    precision: str,
    content: bytes | None,
    problem: str,
    checkpoint: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "sentences.txt"
    if content is not None:
        file.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    command = [str(checkpoint.folder), "-o", str(tmp_path / "bundle"), "--precision", precision]
    assert main([*command, "--calibrate", str(file)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("  ")]
    assert len(errors) == 1
    assert errors[0].startswith("beamline export: ")
    assert problem in errors[0]
    assert sorted(tmp_path.iterdir()) == before


FORCED = {"sources": 12, "steps": 12, "relative_rms": 0.0, "same_top_token": 1.0, "max_difference": 0.0}


@pytest.mark.parametrize(
    ("precision", "same", "told"),
    [
        ("int8", 1, "1 of 6 identical; int8 need not be: "),
        ("fp16", 5, "5 of 6 identical; fp16 need not be: "),
        ("fp32", 5, "5 of 6 identical, 1 parted at a near-tie"),
        ("fp32", 6, "6 of 6 identical"),
    ],
)
def test_searches_that_differ_are_explained(precision: str, same: int, told: str) -> None:
    search = {"same": same, "searches": 6, "parted_beyond_near_ties": 0, "max_score_difference": 0.0}
    lines = report({"device": "cpu", "forced_decode": FORCED, "beam_search": search}, precision).splitlines()
    assert lines[-1].split(maxsplit=2)[2].startswith(told)
    assert lines[-1].endswith(told if precision == "fp32" else "its rounding decides between close choices")
    limit = {
        "fp32": "at most 0.0e+00 (allowed: 1e-03)",
        "fp16": "at most 0.0e+00 (allowed: 2e-02)",
        "int8": "0.0% of their spread (allowed: 10%)",
    }
    assert f"differ by {limit[precision]}, over 12 steps each" in lines[1]


@pytest.mark.parametrize(
    ("precision", "expected", "told"),
    [
        ("fp32", {"examples": 9, "same": 9, "near_ties": 0}, "9 of 9 given in fp32"),
        ("fp32", {"examples": 9, "same": 8, "near_ties": 1}, "8 of 9 given in fp32, 1 but for a near-tie"),
        (
            "int8",
            {"examples": 9, "same": 9, "near_ties": 0, "same_in_int8": 8},
            "9 of 9 given in fp32; 8 in int8, which rounds",
        ),
    ],
)
def test_expected_outputs_are_told(precision: str, expected: dict[str, int], told: str) -> None:
    search = {"same": 6, "searches": 6, "parted_beyond_near_ties": 0, "max_score_difference": 0.0}
    figures = {"device": "cpu", "forced_decode": FORCED, "beam_search": search, "expected": expected}
    assert report(figures, precision).splitlines()[-1] == f"  your outputs       {told}"


@pytest.mark.parametrize("arguments", [[], ["folder"], ["folder", "-o", "x", "--precision", "int2"]])
def test_wrong_arguments_are_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "beamline export: error: " in capsys.readouterr().err


def test_an_impossible_place_is_one_line(checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint.folder), "-o", str(tmp_path / ("x" * 300))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("check the folder and the free space")


def test_a_process_says_no_more_than_that(checkpoint: Any, tmp_path: Path) -> None:
    """No traceback, warning or advice of a library."""
    checkpoint.config(dim_feedforward=7)
    code = "import sys; from beamline_export.cli import main, report; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(checkpoint.folder), "-o", str(tmp_path / "bundle")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("beamline export: the checkpoint does not fit its config: ")


@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by SIGTERM")], ids=["int", "term"]
)
def test_a_stopped_process_says_so_and_leaves_nothing(
    number: signal.Signals, told: str, checkpoint: Any, tmp_path: Path
) -> None:
    code = "import sys; from beamline_export.cli import main, report; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(FR_EN), "-o", str(tmp_path / "bundle")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:  # until half of the work is done, and a folder is there
            if line.startswith("  load the exported model"):
                break
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        last = process.stderr.read().splitlines()[-1]
    assert (process.returncode, last) == (128 + number, f"beamline export: {told}; nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
