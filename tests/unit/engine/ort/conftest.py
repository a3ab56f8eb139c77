"""Tiny models with random weights, as they are exported today."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.testing import nn_config, write_hugging_face, write_nn_transformer
from beamline_server.bundle import Bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The bundle of one in a precision: two layers, 32 wide, 120 target tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    config = nn_config(num_encoder_layers=1, num_decoder_layers=2)
    return _exports(folder, write_nn_transformer(folder / "checkpoint", config, sharpness=0.6))


@pytest.fixture(scope="session")
def tiny_relative(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """As `tiny`, with relative positions of each layer's own, all distances from 9 on being one."""
    folder = tmp_path_factory.mktemp("tiny-relative")
    config = {"relative_attention_max_distance": 9}
    return _exports(folder, write_hugging_face(folder / "checkpoint", "umt5", config, {}, sharpness=0.6))


def _exports(folder: Path, checkpoint: Path) -> Callable[[str], Bundle]:
    made: dict[str, Bundle] = {}

    def bundle(precision: str) -> Bundle:
        if precision not in made:
            made[precision] = export(checkpoint, folder / precision, ExportOptions(precision), Progress(io.StringIO()))
        return made[precision]

    return bundle
