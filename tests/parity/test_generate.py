"""The embedded model: the engine's answers to its test sentences are those of transformers' `generate`."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from beamline_export.agreement import Tokens
from beamline_export.generate_oracle import GenerateOracle
from beamline_export.reference import HuggingFaceReference, quiet_transformers
from beamline_server.bundle import Bundle
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.models.load import build_backend, model_rules
from beamline_server.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "fr-en"
SENTENCES = 60


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/parity.py as a module; its folder is not a package."""
    spec = importlib.util.spec_from_file_location("benchmark_parity", ROOT / "benchmarks" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lines(script: ModuleType) -> Sequence[Sequence[str]]:
    """Source and references of every test sentence."""
    found: Sequence[Sequence[str]] = script.test_set(MODEL)
    return found


@pytest.fixture(scope="module")
def tokenizer(fr_en_fp32: Bundle) -> Tokenizer:
    """Ours."""
    found = load_tokenizer(fr_en_fp32)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def their_tokenizer() -> Any:
    """transformers' own."""
    with quiet_transformers():  # it recommends a package that this model does not use
        return transformers.MarianTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def sources(lines: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[Tokens]:
    """Every so-manieth test sentence."""
    every = len(lines) // SENTENCES
    return [tuple(tokenizer.encode(source)) for source, *_ in lines[::every]][:SENTENCES]


@pytest.fixture(scope="module")
def oracle(fr_en_fp32: Bundle) -> GenerateOracle:
    """The model as transformers run it."""
    return GenerateOracle(HuggingFaceReference("MarianMTModel", MODEL).model, model_rules(fr_en_fp32.manifest))


def test_token_ids_equal_those_of_transformers(
    lines: Sequence[Sequence[str]], tokenizer: Tokenizer, their_tokenizer: Any
) -> None:
    texts = [source for source, *_ in lines]
    expected = their_tokenizer(texts)["input_ids"]
    assert [tokenizer.encode(text) for text in texts] == expected


def test_text_equals_that_of_transformers(
    lines: Sequence[Sequence[str]], tokenizer: Tokenizer, their_tokenizer: Any
) -> None:
    """For what a model may give: with end of sequence, padding and unknown tokens."""
    for _, reference, *_ in lines[:300]:
        ids = [5999, *their_tokenizer(text_target=reference)["input_ids"], 5999]
        assert tokenizer.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("beam", "n_best", "early_stopping"),
    [
        pytest.param(1, 1, "when_full", id="greedy"),
        pytest.param(4, 4, "when_full", id="beam4-as-configured"),
        pytest.param(4, 4, "heuristic", id="beam4-heuristic"),
        pytest.param(4, 4, "never", id="beam4-never"),
    ],
)
def test_hypotheses_equal_those_of_generate(
    beam: int, n_best: int, early_stopping: str, fr_en_fp32: Bundle, oracle: GenerateOracle, sources: list[Tokens]
) -> None:
    """All n-best lists are the same, but for near-ties, and so are their scores."""
    assert fr_en_fp32.manifest.generation_defaults.early_stopping == "when_full"
    options = SearchOptions(beam, n_best, early_stopping=EarlyStopping(early_stopping), max_new_tokens=128)
    sources = sources if early_stopping == "when_full" else sources[:16]
    comparisons = list(oracle.compare(build_backend(fr_en_fp32, "cpu", threads=1), sources, options))
    assert all(c.agrees for c in comparisons), [c.parting for c in comparisons if not c.agrees]
    assert sum(c.same for c in comparisons) > 0.9 * len(sources)
    assert max(c.score_difference for c in comparisons) < 1e-4


def test_the_script_tells_the_figures(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--sentences", "8", "--beam", "2"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("identical token sequences: 8 of 8 (100.0%)\nmaximum score difference: ")


def test_int8_translates_nearly_as_well(
    script: ModuleType, lines: Sequence[Sequence[str]], fr_en_fp32: Bundle, fr_en_int8: Bundle
) -> None:
    """BLEU of a part of the test file."""
    some = lines[::8]
    assert script.bleu(fr_en_int8, some) > script.bleu(fr_en_fp32, some) - 1.0
