"""The log-probabilities of all tokens, which a step gives when it is asked for them, are those of PyTorch."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from beamline_export.reference import HuggingFaceReference
from beamline_server.bundle import Bundle
from beamline_server.engine.admission import MOST_ROWS
from beamline_server.engine.backend import StepResult
from beamline_server.engine.ort.cpu import CpuBackend
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.models.forced import forced_rows
from beamline_server.models.load import model_rules
from beamline_server.tokenizer import load_tokenizer
from doubles.fed import FedSequences, Tokens

pytestmark = pytest.mark.parity

MODEL = Path(__file__).parents[2] / "models" / "fr-en"
SENTENCES, TOKENS = 6, 24
CANDIDATES = 9


@pytest.fixture(scope="module")
def sources(fr_en_fp32: Bundle) -> list[Tokens]:
    """Some test sentences."""
    tokenizer = load_tokenizer(fr_en_fp32)
    assert tokenizer is not None
    with gzip.open(MODEL / "test.tsv.gz", "rt", encoding="utf-8") as lines:
        return [tuple(tokenizer.encode(line.split("\t")[0])) for line in lines][::300][:SENTENCES]


@pytest.fixture(scope="module")
def targets(fr_en_fp32: Bundle) -> list[Tokens]:
    """Random tokens after the decoder start, more than one step takes."""
    start, vocabulary = model_rules(fr_en_fp32.manifest).decoder_start, 5999
    ids = np.random.default_rng(0).integers(0, vocabulary, (SENTENCES, TOKENS - 1)).tolist()
    return [(start, *row) for row in ids]


@pytest.fixture(scope="module")
def expected(sources: list[Tokens], targets: list[Tokens]) -> np.ndarray:
    """PyTorch's, after every token, (S, T, V)."""
    reference = HuggingFaceReference("MarianMTModel", MODEL)
    return np.stack([reference.logprobs(s, [t])[0] for s, t in zip(sources, targets, strict=True)])


def assert_best(found: StepResult) -> None:
    """The best candidates are the best of all, bit for bit."""
    assert found.logprob is not None
    best = -np.sort(-found.logprob, axis=1)[:, : found.top_logprob.shape[1]]
    assert np.array_equal(found.top_logprob, best)
    assert np.array_equal(found.top_logprob, np.take_along_axis(found.logprob, found.top_token, axis=1))


@pytest.mark.parametrize("part", [1, 5, MOST_ROWS])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_all_logprobs_are_those_of_pytorch(
    fr_en_fp32: Bundle, sources: list[Tokens], targets: list[Tokens], expected: np.ndarray, kind: str, part: int
) -> None:
    """However many tokens of a target a step takes; by the code for GPUs as well, run on the CPU."""
    backend = CpuBackend(fr_en_fp32, threads=1) if kind == "cpu" else CudaBackend(fr_en_fp32, device="cpu")
    seen = set()
    for number, position, row in forced_rows(backend, sources, targets, logprobs=True, part=part):
        wanted = expected[number, position]
        assert row.logprob is not None
        assert row.logprob == pytest.approx(wanted, abs=1e-3)
        assert row.top_token[0] == row.logprob.argmax()
        assert row.top_logprob[0] == row.logprob.max()
        seen.add((number, position))
    assert len(seen) == SENTENCES * TOKENS


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
def test_the_best_candidates_are_the_best_of_all(
    export_fr_en: Callable[[str], Bundle],
    request: pytest.FixtureRequest,
    sources: list[Tokens],
    targets: list[Tokens],
    precision: str,
) -> None:
    """In steps that ask for both, in batches that change meanwhile; fp16 by the code for GPUs."""
    bundle = export_fr_en("fp16") if precision == "fp16" else request.getfixturevalue(f"fr_en_{precision}")
    backend = CudaBackend(bundle, device="cpu") if precision == "fp16" else CpuBackend(bundle, threads=1)
    fed, cache, members = FedSequences(sources, targets), backend.new_cache(), list(range(SENTENCES))
    encoded = backend.encode(sources)
    for index in members:
        cache.enter(index, encoded, index)
    for step in range(6):
        (bucket,) = cache.place(fed.arrays)
        found = bucket.run(fed.arrays, CANDIDATES + step % 2, logprobs=True)
        assert_best(found)
        best = found.top_logprob[:, :CANDIDATES].copy()
        without = bucket.run(fed.arrays, CANDIDATES)
        assert without.logprob is None
        assert np.array_equal(without.top_logprob, best)
        fed.feed(members)
        if step == 2:
            cache.leave(members.pop(0))
