"""`--expect`: a wrong config.json, which the comparison with PyTorch cannot see, makes no bundle."""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.positions import interleaved_positions
from beamline_export.families.registry import detect
from beamline_export.parity import random_sources
from beamline_export.progress import Progress
from beamline_export.reference import Reference, quiet_transformers
from beamline_export.reference_search import reference_search
from beamline_export.spec import ExportError
from beamline_export.testing import DECODER_START, EOS, nn_config, write_nn_transformer
from beamline_server.bundle import Bundle
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import SearchOptions

pytestmark = pytest.mark.parity

FR_EN = Path(__file__).parents[2] / "models" / "fr-en"
LIMIT = 10
RIGHT = nn_config(nhead=8, generation={"max_new_tokens": LIMIT})
SOURCES = random_sources(90, EOS, 30, count=100)


def model_of(checkpoint: Path) -> Reference:
    """The model as PyTorch runs it."""
    family = detect(checkpoint)
    return family.reference(checkpoint, family.read(checkpoint))


def outputs(model: Reference, beam: int) -> list[list[int]]:
    """What the model itself answers."""

    def search(source: Sequence[int]) -> list[int]:
        def next_logprobs(prefixes: Sequence[Sequence[int]]) -> NDArray[np.float32]:
            return model.logprobs(source, prefixes)[:, -1]

        options = SearchOptions(beam, max_new_tokens=LIMIT)
        return list(
            reference_search(next_logprobs, SearchRules(eos=(EOS,)), options, DECODER_START).hypotheses[0].tokens
        )

    return [search(source) for source in SOURCES]


def written(file: Path, targets: Sequence[Sequence[int]], **fields: object) -> Path:
    lines = [
        {"source_ids": list(source), "target_ids": list(target), **fields}
        for source, target in zip(SOURCES, targets, strict=True)
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's checkpoint, right."""
    return write_nn_transformer(tmp_path_factory.mktemp("own") / "checkpoint", RIGHT)


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Path:
    """Greedy outputs of the user's model."""
    return written(folder.parent / "greedy.jsonl", outputs(model_of(folder), 1))


def exported(checkpoint: Path, target: Path, expect: Path | None, precision: str = "fp32") -> Bundle:
    return export(checkpoint, target, ExportOptions(precision, expect=expect), Progress(io.StringIO()))


def test_a_right_config_gives_every_output(folder: Path, greedy: Path, tmp_path: Path) -> None:
    bundle = exported(folder, tmp_path / "bundle", greedy)
    assert bundle.manifest.parity["expected"] == {"examples": 100, "same": 100, "near_ties": 0}


def test_a_right_config_gives_every_output_of_a_beam_search(folder: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "beam.jsonl", outputs(model_of(folder), 4), beam_size=4)
    bundle = exported(folder, tmp_path / "bundle", file)
    assert bundle.manifest.parity["expected"] == {"examples": 100, "same": 100, "near_ties": 0}


@pytest.mark.parametrize(
    "wrong",
    [{"nhead": 4}, {"norm_first": True}, {"activation": "gelu"}, {"scale_embedding": False}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_config_makes_no_bundle(wrong: dict[str, Any], folder: Path, greedy: Path, tmp_path: Path) -> None:
    write_nn_transformer(tmp_path / "checkpoint", {**RIGHT, **wrong})
    with pytest.raises(ExportError, match=rf" of 100 outputs are as expected; .*wrong in one of .*{next(iter(wrong))}"):
        exported(tmp_path / "checkpoint", tmp_path / "bundle", greedy)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("end", [True, False], ids=["with-end", "without-end"])
def test_a_wrong_end_makes_no_bundle(end: bool, folder: Path, greedy: Path, tmp_path: Path) -> None:
    """Of outputs that are right as far as they go: the model that is served would go on."""
    wrong = write_nn_transformer(tmp_path / "wrong", {**RIGHT, "eos_token_id": 5})
    lines = [json.loads(line) for line in greedy.read_text().splitlines()]
    ended = [line for line in lines if len(line["target_ids"]) < LIMIT and 5 not in line["target_ids"]]
    assert ended
    for line in ended:
        assert line["target_ids"].pop() == EOS
        line["target_ids"] += [EOS] if end or not line["target_ids"] else []
    file = tmp_path / "expected.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in ended))
    with pytest.raises(ExportError, match=rf": 0 of {len(ended)} outputs are .*expected the end .*eos_token_id \(5\)"):
        exported(wrong, tmp_path / "bundle", file)
    expected: Any = exported(folder, tmp_path / "right", file).manifest.parity["expected"]
    assert expected["same"] == len(ended)


def test_outputs_that_the_models_own_limit_forces_to_end_are_expected(tmp_path: Path) -> None:
    """Whether the lines say the limit or the config alone."""
    forced = {**RIGHT, "generation": {"max_length": LIMIT + 1, "forced_eos_token_id": EOS}}
    checkpoint = write_nn_transformer(tmp_path / "checkpoint", forced)
    targets = [target if len(target) < LIMIT else [*target[:-1], EOS] for target in outputs(model_of(checkpoint), 1)]
    assert any(len(target) == LIMIT for target in targets)
    for name, fields in (("default", {}), ("said", {"max_new_tokens": LIMIT})):
        file = written(tmp_path / f"{name}.jsonl", targets, **fields)
        bundle = exported(checkpoint, tmp_path / name, file)
        assert bundle.manifest.parity["expected"] == {"examples": 100, "same": 100, "near_ties": 0}


def test_a_wrong_order_of_positions_makes_no_bundle(folder: Path, tmp_path: Path) -> None:
    """The user's model has all sines before all cosines, and config.json can only say that they take turns."""
    own = write_nn_transformer(tmp_path / "own", {**RIGHT, "positions": "learned"})
    table = torch.from_numpy(interleaved_positions(48, 32))
    halves = torch.cat([table[:, 0::2], table[:, 1::2]], dim=1)
    state = load_file(folder / "model.safetensors")
    state |= {f"{side}_positions.weight": halves.clone() for side in ("src", "tgt")}
    save_file(state, own / "model.safetensors")
    file = written(tmp_path / "expected.jsonl", outputs(model_of(own), 1))
    with pytest.raises(ExportError, match=r" of 100 outputs are as expected; .*wrong in one of .*positions"):
        exported(folder, tmp_path / "bundle", file)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_wrong_config_of_a_real_model_makes_no_bundle(precision: str, tmp_path: Path) -> None:
    """In any precision: what is compared is computed in fp32."""
    wrong = Path(shutil.copytree(FR_EN, tmp_path / "fr-en"))
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "activation_function": "swish"}))
    with pytest.raises(
        ExportError, match=r"expected\.jsonl: \d+ of 100 outputs are as expected; the first that differs"
    ):
        exported(wrong, tmp_path / "bundle", FR_EN / "expected.jsonl", precision)
    assert [path.name for path in tmp_path.iterdir()] == ["fr-en"]


@pytest.fixture(scope="module")
def translations() -> list[dict[str, Any]]:
    """The embedded model's expected outputs."""
    return [json.loads(line) for line in (FR_EN / "expected.jsonl").read_text("utf-8").splitlines()]


def test_the_embedded_models_file_is_what_generate_gives(translations: list[dict[str, Any]]) -> None:
    assert len(translations) == 100
    assert {line["beam_size"] for line in translations} == {4}
    with quiet_transformers():
        tokenizer = transformers.MarianTokenizer.from_pretrained(FR_EN)
        model = transformers.MarianMTModel.from_pretrained(FR_EN).eval()
        with torch.inference_mode():
            for line in translations[::5]:
                (ids,) = model.generate(**tokenizer([line["source"]], return_tensors="pt"))
                assert tokenizer.decode(ids, skip_special_tokens=True) == line["target"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_texts_are_compared_where_there_is_a_tokenizer(
    precision: str, translations: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = FR_EN / "expected.jsonl"
    expected: Any = exported(FR_EN, tmp_path / "bundle", file, precision).manifest.parity["expected"]
    assert expected["same"] + expected["near_ties"] == expected["examples"] == 100
    assert expected["same"] >= 99
    assert precision == "fp32" or expected["same_in_int8"] > 50
    file = tmp_path / "expected.jsonl"
    lines = [*translations[:3], {**translations[3], "target": "something else"}, *translations[4:20]]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(ExportError) as caught:
        exported(FR_EN, tmp_path / "none", file, precision)
    told = f"line 4: expected 'something else', got {translations[3]['target']!r}; the search differs"
    assert told in str(caught.value)
