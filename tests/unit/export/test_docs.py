"""docs/bring-your-model.md: its program runs, and what it exports is the module that it shows."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from beamline_export.calibration import MOST_SENTENCES
from beamline_export.checkpoint import MOST_POSITIONS
from beamline_export.cli import main
from beamline_export.expectations import MOST_LINES, Line
from beamline_export.families.registry import FAMILIES
from beamline_export.parity import TOLERANCES, all_logprobs
from beamline_server.bundle import load_bundle
from beamline_server.models.load import build_backend

PAGE = (Path(__file__).parents[3] / "docs" / "bring-your-model.md").read_text("utf-8")


def test_the_program_exports_the_module_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (program,) = programs
    (tmp_path / "program.py").write_text(program, "utf-8")
    monkeypatch.chdir(tmp_path)
    (export,) = set(re.findall(r"^beamline export (translator .*)$", PAGE, re.MULTILINE))
    runpy.run_path("program.py")
    assert main(export.split()) == 0
    names = runpy.run_path("program.py")  # and again
    assert main(export.split()) == 0
    assert capsys.readouterr().out.count("your outputs       100 of 100 given in fp32") == 2
    bundle = load_bundle(tmp_path / "translator-bundle")
    assert bundle.manifest.generation_defaults.beam_size == 4
    source, target = [5, 8, 100, 1], [2, 7, 170, 3, 9]
    with torch.inference_mode():
        expected = names["model"].eval()(torch.tensor([source]), torch.tensor([target])).log_softmax(-1)[0].numpy()
    found = all_logprobs(build_backend(bundle, "cpu", threads=1), [source], np.array([target]), 180)[0]
    assert found == pytest.approx(expected, abs=1e-4)

    # What the page's loop writes of this module is what another config does not give.
    config = json.loads(Path("translator/config.json").read_text())
    Path("translator/config.json").write_text(json.dumps({**config, "norm_first": True}))
    assert main(["translator", "--expect", "expected.jsonl", "-o", "wrong"]) == 2
    assert "of 100 outputs are as expected; the first that differs is in line" in capsys.readouterr().err
    assert not Path("wrong").exists()


def test_the_page_tells_the_limits_of_the_code() -> None:
    assert f"at most {MOST_POSITIONS:,}" in PAGE
    assert f"the first {MOST_SENTENCES:,} are used" in PAGE
    assert f"at most {MOST_LINES:,} lines" in PAGE
    assert all(f"`{key}`" in PAGE for key in Line.model_fields)
    assert f"(known: {', '.join(FAMILIES)})" in PAGE
    assert all(f"`{family}`" in PAGE for family in FAMILIES)
    assert f"within {TOLERANCES['fp16'].logprob} of PyTorch's" in PAGE
