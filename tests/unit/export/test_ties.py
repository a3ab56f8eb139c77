"""Tied and untied embeddings of Hugging Face checkpoints are those that transformers itself loads."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from beamline_export.families.registry import detect
from beamline_export.reference import HuggingFaceReference, quiet_transformers
from beamline_export.spec import Checkpoint, ExportError, check_weights
from beamline_export.testing import HUGGING_FACE_CLASSES, write_hugging_face

SHARED, HEAD = "model.shared.weight", "lm_head.weight"
SOURCE, TARGET = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
TABLES = (SHARED, SOURCE, TARGET, HEAD)
SEPARATE = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 120}
CASES = [
    pytest.param("marian", {}, id="marian"),
    pytest.param("marian", {"tie_word_embeddings": False}, id="marian-untied"),
    pytest.param("marian", SEPARATE, id="marian-separate"),
    pytest.param("marian", {**SEPARATE, "tie_word_embeddings": False}, id="marian-separate-untied"),
    pytest.param("bart", {}, id="bart"),
    pytest.param("bart", {"tie_word_embeddings": False}, id="bart-untied"),
    pytest.param("mbart", {}, id="mbart"),
    pytest.param("m2m_100", {}, id="m2m_100"),
    pytest.param("pegasus", {"tie_word_embeddings": False}, id="pegasus-untied"),
    *(pytest.param(name, {}, id=name) for name in ("pegasus", "blenderbot", "blenderbot-small", "plbart", "mvp")),
]
CLASSES = {family: getattr(transformers, name) for family, name in HUGGING_FACE_CLASSES.items()}


def with_tables(folder: Path, names: tuple[str, ...]) -> Path:
    """The checkpoint with these tables alone, each with values of its own."""
    state = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in TABLES}
    tables = {name: torch.full((120, 32), float(TABLES.index(name) + 1)) for name in names}
    save_file(state | tables, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def subsets() -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(TABLES, count) for count in range(5))


def read(folder: Path) -> Checkpoint:
    checkpoint = detect(folder).read(folder)
    check_weights(checkpoint)
    return checkpoint


def loaded(family: str, folder: Path) -> dict[str, float] | None:
    """Which table each part has in transformers; None if one is drawn at random."""
    with quiet_transformers():
        model: Any
        model, report = CLASSES[family].from_pretrained(folder, output_loading_info=True)
    parts = {
        "source_embedding": model.get_encoder().embed_tokens,
        "target_embedding": model.get_decoder().embed_tokens,
        "head.weight": model.lm_head,
    }
    drawn = {SOURCE, TARGET, HEAD} & set(report["missing_keys"])
    return None if drawn else {name: float(part.weight.detach()[0, 0]) for name, part in parts.items()}


@pytest.mark.parametrize(("family", "config"), CASES)
def test_tables_are_those_that_transformers_loads(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Whichever of the four tables a file has, and whatever the config ties."""
    folder = write_hugging_face(tmp_path, family, {**config, "encoder_layers": 1, "decoder_layers": 1}, {})
    outcomes = set()
    for names in subsets():
        expected = loaded(family, with_tables(folder, names))
        if expected is None:
            with pytest.raises(ExportError, match="missing: "):
                read(folder)
        else:
            weights = read(folder).weights
            assert {name: float(weights[name][0, 0]) for name in expected} == expected, names
        outcomes.add(expected is None)
    assert outcomes == {True, False}


def test_of_tied_tables_that_differ_the_reader_is_told(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, "marian", {}, {})
    assert read(folder).notices == ()
    with_tables(folder, (SHARED, HEAD))
    (notice,) = read(folder).notices
    assert notice == (
        "tie_word_embeddings is true, but model.shared.weight and lm_head.weight differ in the file; "
        "each is used as it is"
    )
    detect(folder).reference(folder, read(folder))


@pytest.mark.parametrize("sides", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_marian_positions_that_a_file_has_are_used(sides: tuple[str, ...], tmp_path: Path) -> None:
    """transformers reads them as well, whatever they hold."""
    folder = write_hugging_face(tmp_path, "marian", {}, {})
    computed = read(folder).weights["source_positions"]
    state = load_file(folder / "model.safetensors")
    for side in sides:
        state[f"model.{side}.embed_positions.weight"] = torch.full((48, 32), 0.5)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model: Any = HuggingFaceReference("MarianMTModel", folder).model.model
    weights = read(folder).weights
    for side, name in (("encoder", "source_positions"), ("decoder", "target_positions")):
        assert weights[name] == pytest.approx(getattr(model, side).embed_positions.weight.detach().numpy(), abs=1e-6)
        assert np.allclose(weights[name], computed, atol=1e-6) == (side not in sides)


def test_what_transformers_cannot_load_is_told_in_words_of_our_own(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, "marian", {}, {})
    state = load_file(folder / "model.safetensors")
    state["model.encoder.layers.0.fc1.weight"] = torch.ones(20, 32)
    del state["model.decoder.layers.1.fc2.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError) as caught:
        HuggingFaceReference("MarianMTModel", folder)
    assert str(caught.value) == (
        f"transformers cannot load {folder} as MarianMTModel: "
        "model.encoder.layers.0.fc1.weight has shape [20, 32], and [48, 32] by its config; "
        "missing: model.decoder.layers.1.fc2.weight; correct config.json, or save the model again"
    )
