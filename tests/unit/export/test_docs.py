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
from beamline_export.parity import TOLERANCES, all_logprobs, random_sources
from beamline_server.bundle import load_bundle
from beamline_server.engine.build import build_runner

PAGE = (Path(__file__).parents[3] / "docs" / "bring-your-model.md").read_text("utf-8")


def test_the_program_exports_the_module_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (program,) = (text for text in programs if "export(" in text)
    (expected_lines,) = (text for text in programs if "def expected_lines(" in text)
    (tmp_path / "program.py").write_text(program, "utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("program.py")
    bundle = load_bundle(tmp_path / "translator-bundle")
    assert bundle.manifest.generation_defaults.beam_size == 4
    source, target = [5, 8, 100, 1], [2, 7, 170, 3, 9]
    with torch.inference_mode():
        expected = names["model"].eval()(torch.tensor([source]), torch.tensor([target])).log_softmax(-1)[0].numpy()
    found = all_logprobs(build_runner(bundle, "cpu", threads=1), [source], np.array([target]), 180)[0]
    assert found == pytest.approx(expected, abs=1e-4)

    # What the page's loop writes of this module is what --expect takes, and what another config does not give.
    exec(expected_lines, names)
    lines = names["expected_lines"](names["model"], [list(source) for source in random_sources(200, 1, 30, count=20)])
    (tmp_path / "expected.jsonl").write_text("".join(lines))
    command = ["translator", "--expect", "expected.jsonl", "-o"]
    assert main([*command, "checked"]) == 0
    assert "your outputs       20 of 20 given in fp32" in capsys.readouterr().out
    config = json.loads(Path("translator/config.json").read_text())
    Path("translator/config.json").write_text(json.dumps({**config, "norm_first": True}))
    assert main([*command, "wrong"]) == 2
    assert "of 20 outputs are as expected; the first that differs is in line" in capsys.readouterr().err
    assert not Path("wrong").exists()


def test_the_page_tells_the_limits_of_the_code() -> None:
    assert f"at most {MOST_POSITIONS:,}" in PAGE
    assert f"the first {MOST_SENTENCES:,} are used" in PAGE
    assert f"at most {MOST_LINES:,} lines" in PAGE
    assert all(f"`{key}`" in PAGE for key in Line.model_fields)
    assert f"(known: {', '.join(FAMILIES)})" in PAGE
    assert all(f"`{family}`" in PAGE for family in FAMILIES)
    assert f"within {TOLERANCES['fp16'].logprob} of PyTorch's" in PAGE
