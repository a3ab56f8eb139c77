"""Bundles that were exported long ago are still read, and still answer what they answered then."""

import json
from pathlib import Path
from typing import Any

import pytest

from beamline_export.agreement import search_all
from beamline_server.bundle import load_bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.models.load import build_backend, check_golden, model_rules
from beamline_server.tokenizer import load_tokenizer

HERE = Path(__file__).parent
ANSWERS: dict[str, Any] = json.loads((HERE / "format4.json").read_text("utf-8"))
TOLERANCE = {"fp32": 1e-4, "int8": 2e-2}


def checked_backend(name: str) -> Backend:
    """A backend that has given the answers of the machine that exported the bundle, whatever processor this is."""
    bundle = load_bundle(HERE / name)
    backend = build_backend(bundle, "cpu", threads=1)
    check_golden(bundle, backend)
    return backend


@pytest.mark.parametrize("name", ANSWERS)
def test_searches_answer_as_recorded(name: str) -> None:
    """The same tokens, and scores within rounding."""
    backend, manifest = checked_backend(name), load_bundle(HERE / name).manifest
    cases = ANSWERS[name]["searches"]
    assert len(cases) == 9
    searches = [
        (
            tuple(case["source"]),
            SearchOptions(**{**case["options"], "early_stopping": EarlyStopping(case["options"]["early_stopping"])}),
        )
        for case in cases
    ]
    for case, answer in zip(cases, search_all(backend, model_rules(manifest), searches), strict=True):
        expected = case["hypotheses"]
        assert [list(h.tokens) for h in answer.hypotheses] == [h["tokens"] for h in expected]
        scores = [h.score for h in answer.hypotheses]
        assert scores == pytest.approx([h["score"] for h in expected], abs=TOLERANCE[manifest.precision])


@pytest.mark.parametrize("name", ANSWERS)
def test_the_tokenizer_reads_as_recorded(name: str) -> None:
    tokenizer = load_tokenizer(load_bundle(HERE / name))
    assert tokenizer is not None
    for case in ANSWERS[name]["texts"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["back"]


@pytest.mark.parametrize("name", ANSWERS)
def test_the_manifest_says_what_it_said(name: str) -> None:
    """Fields of format 4 keep their meaning."""
    manifest = load_bundle(HERE / name).manifest
    assert manifest.format_version == 4
    assert (manifest.name, manifest.architecture) == ("golden", "nn_transformer")
    assert manifest.precision == name.removeprefix("format4-")
    tokens, defaults = manifest.special_tokens, manifest.generation_defaults
    assert (tokens.decoder_start, tokens.eos, tokens.source_eos, tokens.banned) == (2, (1,), 1, (0, 3))
    assert (defaults.beam_size, defaults.max_new_tokens, defaults.early_stopping) == (4, 24, "when_full")
    assert (manifest.dimensions.d_model, manifest.dimensions.max_source_tokens) == (16, 32)


def test_the_folder_stays_small() -> None:
    assert sum(file.stat().st_size for file in HERE.rglob("*") if file.suffix != ".pyc") < 200_000
