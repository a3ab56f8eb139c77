"""A tiny model with random weights, as it is exported today."""

import io
from collections.abc import Callable

import pytest

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.testing import nn_config, write_nn_transformer
from beamline_server.bundle import Bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Its bundle in a precision: two layers, 32 wide, 120 target tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    config = nn_config(num_encoder_layers=1, num_decoder_layers=2)
    checkpoint = write_nn_transformer(folder / "checkpoint", config, sharpness=0.6)
    made: dict[str, Bundle] = {}

    def bundle(precision: str) -> Bundle:
        if precision not in made:
            made[precision] = export(checkpoint, folder / precision, ExportOptions(precision), Progress(io.StringIO()))
        return made[precision]

    return bundle
