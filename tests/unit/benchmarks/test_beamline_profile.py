"""Measurements inside the engine come to figures that can be true, with a tiny model."""

import io

import pytest

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.testing import nn_config, write_nn_transformer
from beamline_server.bundle import Bundle
from offline.beamline_profile import (
    BEAM,
    ROUNDS,
    SENTENCES,
    SHORT_SENTENCES,
    company,
    outside_sessions,
    step_over_floor,
)
from offline.task import Sentence, write_sentences


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("profiled")
    config = nn_config(num_encoder_layers=1, num_decoder_layers=1, max_positions=256)
    checkpoint = write_nn_transformer(folder / "checkpoint", config)
    return export(checkpoint, folder / "bundle", ExportOptions(), Progress(io.StringIO()))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sentences") / "sentences.json"
    some = [(*range(5 + number % 7, 12 + number % 7), 1) for number in range(4 * SENTENCES)]
    write_sentences(path, [Sentence(ids, tuple("x" * len(ids)), None) for ids in some])
    return str(path)


def test_the_workers_time_is_inside_and_outside_sessions(bundle: Bundle, sentences: str) -> None:
    found = outside_sessions(bundle, sentences=sentences, workers=1)
    assert found["inside"] == "session.run"
    assert 0 < found["outside"] < 1
    assert 0 < found["rows_per_step"] <= SENTENCES * BEAM
    assert found["step_ms"] > 0
    assert found["encode_ms"] > 0


def test_a_step_takes_longer_than_its_products(bundle: Bundle, sentences: str) -> None:
    found = step_over_floor(bundle, sentences=sentences)
    assert found["step_ms"] >= found["backend_ms"] > 0
    assert found["step_ms"] > found["floor_ms"] > 0


def test_short_sentences_are_timed_with_and_without_company(bundle: Bundle, sentences: str) -> None:
    found = company(bundle, sentences=sentences)
    assert found["sentences"] == SHORT_SENTENCES * ROUNDS
    assert found["alone_s"] > 0
    assert found["beside_s"] > 0
