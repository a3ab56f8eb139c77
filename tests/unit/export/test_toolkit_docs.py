"""docs/from-other-toolkits.md: its programs write the files that the families read."""

import argparse
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from beamline_export.checkpoint import read_state_dict
from beamline_export.families import fairseq, marian_npz, opennmt_py, tensor2tensor, toolkit
from beamline_export.families.registry import OWN_SETTINGS
from beamline_export.npz_file import read_npz

PAGE = (Path(__file__).parents[3] / "docs" / "from-other-toolkits.md").read_text("utf-8")
FAIRSEQ, OPENNMT, TENSOR2TENSOR = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("new", [False, True])
def test_the_program_for_fairseq(new: bool, here: Path) -> None:
    model, args = {"encoder.version": torch.ones(1)}, argparse.Namespace(arch="transformer", lr=[0.1], source_lang="de")
    saved = {"cfg": {"task": {"source_lang": "de"}, "model": args}, "args": None} if new else {"args": args}
    torch.save({"model": model, **saved}, "checkpoint_best.pt")
    exec(FAIRSEQ, {})
    assert read_state_dict(here) == {"encoder.version": np.ones(1)}
    assert json.loads(Path(fairseq.ARGS).read_text()) == vars(args)


@pytest.mark.parametrize("version", [2, 3])
def test_the_program_for_opennmt_py(version: int, here: Path) -> None:
    words = {"src": ["<unk>", "<blank>", "ein"], "tgt": ["<unk>", "<blank>", "<s>", "</s>", "a"]}
    vocab = words if version == 3 else {side: Field(of) for side, of in words.items()}
    opt = argparse.Namespace(heads=4, data={"corpus": {}})
    torch.save(
        {"model": {"w": torch.ones(1)}, "generator": {"0.bias": torch.zeros(1)}, "opt": opt, "vocab": vocab},
        "model_step_100000.pt",
    )
    exec(OPENNMT, {})
    assert read_state_dict(here).keys() == {"w", "generator.0.bias"}
    assert json.loads(Path(opennmt_py.OPTIONS).read_text())["heads"] == 4
    assert toolkit.read_pieces(here / "vocab.json") == {"<unk>": 0, "<blank>": 1, "ein": 2}
    assert toolkit.read_pieces(here / "target_vocab.json")["a"] == 4


class Field:
    """As versions 1 and 2 keep a vocabulary."""

    def __init__(self, words: list[str]) -> None:
        self.base_field = types.SimpleNamespace(vocab=types.SimpleNamespace(itos=words))


def test_the_program_for_tensor2tensor(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "transformer/body/x/kernel": np.ones((2, 3), np.float32),
        "transformer/y/Adam": np.ones(1),
        "global_step": 3,
    }
    reader = types.SimpleNamespace(get_variable_to_shape_map=lambda: variables, get_tensor=variables.__getitem__)
    module = types.ModuleType("tensorflow")
    module.train = types.SimpleNamespace(load_checkpoint=lambda folder: reader)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", module)
    exec(TENSOR2TENSOR, {})
    arrays, _ = read_npz(here / tensor2tensor.FILE)
    assert {name: array.shape for name, array in arrays.items()} == {"transformer/body/x/kernel": (2, 3)}


def test_the_page_tells_what_the_code_has() -> None:
    for family in set(OWN_SETTINGS) - {"nn_transformer", "makemore"}:
        assert f'`"{family}"`' in PAGE or f'"model_type": "{family}"' in PAGE
    for file in (fairseq.ARGS, marian_npz.FILE, opennmt_py.OPTIONS, tensor2tensor.FILE, tensor2tensor.OPTIONS):
        assert f"`{file}`" in PAGE
    assert f"| {toolkit.DEFAULT_POSITIONS}; fairseq" in PAGE
    assert f"at most {toolkit.DEFAULT_NEW_TOKENS} tokens" in PAGE
