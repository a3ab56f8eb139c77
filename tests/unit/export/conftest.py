"""A small checkpoint to break, and an export without noise."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from beamline_export.progress import Progress
from beamline_export.testing import (
    DECODER_ONLY_FAMILIES,
    HUGGING_FACE_CLASSES,
    T5_FAMILIES,
    nn_config,
    write_hugging_face,
    write_nn_transformer,
)

SIZES = {"fsmt": {"src_vocab_size": 90, "tgt_vocab_size": 120}}
"""Vocabularies of families that have one for each side."""


class Checkpoint:
    """A checkpoint folder that may be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = folder / "model.safetensors"

    def config(self, **changes: Any) -> Path:
        """Change config.json; a value of `...` removes the field."""
        file = self.folder / "config.json"
        data = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
        return self.folder

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """Change the weights."""
        state = load_file(self.weights)
        change(state)
        save_file(state, self.weights)
        return self.folder


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each family, not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_nn_transformer(folder / "nn_transformer", nn_config(num_encoder_layers=1, num_decoder_layers=1))
    for family in HUGGING_FACE_CLASSES:
        layers = {"encoder_layers": 1, "decoder_layers": 1}
        layers = {"num_layers": 1} if family in T5_FAMILIES else layers
        layers = {"num_hidden_layers": 1} if family in DECODER_ONLY_FAMILIES else layers
        write_hugging_face(folder / family, family, {**SIZES.get(family, {}), **layers}, {})
    return folder


@pytest.fixture
def make_checkpoint(pristine: Path, tmp_path: Path) -> Callable[[str], Checkpoint]:
    """A copy of a family's checkpoint."""

    def make(family: str) -> Checkpoint:
        return Checkpoint(Path(shutil.copytree(pristine / family, tmp_path / "checkpoint")))

    return make


@pytest.fixture
def checkpoint(make_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    """An nn.Transformer."""
    return make_checkpoint("nn_transformer")


@pytest.fixture
def silent() -> Progress:
    """Tells nobody."""
    return Progress(io.StringIO())
