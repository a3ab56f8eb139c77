"""`beamline load` as a user runs it, against a real server."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from beamline_client.load.report import RunReport, read_report
from beamline_server.process import BEAMLINE, ServerProcess

Load = Callable[..., "subprocess.CompletedProcess[str]"]

EXIT_OK, EXIT_INVALID = 0, 3


@pytest.fixture
def load(server: ServerProcess, tmp_path: Path) -> Load:
    """Runs the command against the shared server, its report in the test's folder."""
    metrics_port = server.log.wait_for("listening")["metrics_port"]
    fixed = ["--server", server.target, "--metrics", f"http://127.0.0.1:{metrics_port}/metrics", "-o", "report"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [str(BEAMLINE), "load", *fixed, *arguments]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)

    return run


def report(folder: Path) -> RunReport:
    read = read_report(folder / "report" / "report.json")
    assert isinstance(read, RunReport)
    return read


def test_a_mixed_load_is_answered_right_and_the_books_balance(load: Load, tmp_path: Path) -> None:
    mixture = ("--beam", "1:30%,4:70%", "--stream", "25%", "--cancel", "10%", "--lengths", "any:90%,30-40:10%")
    done = load("--rate", "20", "--duration", "6s", "--warm-up", "1s", *mixture, "--record-golden", "golden.jsonl")

    made = report(tmp_path)
    assert done.returncode == (EXIT_OK if made.verdict.valid else EXIT_INVALID), done.stdout
    assert sum(made.outcomes.values()) == made.configuration.requests
    assert made.outcomes["ok"] > 0
    assert made.outcomes["ok"] + made.outcomes["cancelled"] == made.configuration.requests
    assert made.books is not None
    assert made.books.mismatches == []
    assert made.quality is not None
    assert made.quality.inconsistent == 0
    assert made.quality.bleu is not None
    assert made.quality.bleu > 30
    assert made.server_samples
    assert any(sample.rows_per_step for sample in made.server_samples)
    lengths = ("any length", "30-40 words")
    assert {each.name for each in made.classes} == {
        f"beam {beam}, {length}, {kind}" for beam in (1, 4) for length in lengths for kind in ("unary", "stream")
    }
    assert made.server is not None
    assert made.server.precision == "int8"


def test_recorded_answers_are_the_answers_whatever_the_load(load: Load, tmp_path: Path) -> None:
    texts = ("Où est la gare ?", "Ai-je le choix ?", "Il fait beau aujourd'hui.")
    (tmp_path / "few.txt").write_text("\n".join(texts), encoding="utf-8")
    few = ("--sentences", "few.txt", "--duration", "1s", "--warm-up", "0s")

    assert load(*few, "--concurrency", "1", "--record-golden", "golden.jsonl").returncode in {EXIT_OK, EXIT_INVALID}
    assert load(*few, "--concurrency", "8", "--golden", "golden.jsonl").returncode in {EXIT_OK, EXIT_INVALID}

    quality = report(tmp_path).quality
    assert quality is not None
    assert quality.golden is not None
    assert (quality.golden.different, quality.golden.missing) == (0, 0)
    assert quality.golden.compared > 0


def test_a_golden_file_with_a_wrong_answer_fails(load: Load, tmp_path: Path) -> None:
    load("--concurrency", "2", "--duration", "1s", "--warm-up", "0s", "--record-golden", "golden.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "golden.jsonl").read_text().splitlines()]
    for line in lines:
        line["texts"][0] += " (wrong)"
    (tmp_path / "golden.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    done = load("--concurrency", "2", "--duration", "1s", "--warm-up", "0s", "--golden", "golden.jsonl")

    assert done.returncode == 1
    assert "FAILED" in done.stdout
