"""The embedded model in fp16 on a GPU, with its caches in device memory, beside fp32 on the CPU."""

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from beamline_export.agreement import Tokens, answers, search_all, searching_core
from beamline_export.parity import all_logprobs
from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.ort.cpu import CpuBackend
from beamline_server.engine.ort.cuda.backend import CudaBackend, providers
from beamline_server.engine.ort.cuda.provider import provider_options, what_is_missing
from beamline_server.engine.ort.sessions import Sessions
from beamline_server.engine.ort.settings import CUDA
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.graphs import Precision
from beamline_server.models.load import model_rules
from beamline_server.tokenizer import load_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.cuda]

TEST_FILE = Path(__file__).parents[2] / "models" / "fr-en" / "test.tsv.gz"
SENTENCES = 64
STEPS = 12
TOLERANCE = 2e-2
"""How far fp16 may move a log-probability; candidates closer than twice that may change places."""
MISSING = what_is_missing()
"""If nothing is, a provider that does not start is a failure."""
needs_a_gpu = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def cpu(fr_en_fp32: Bundle) -> Backend:
    return CpuBackend(fr_en_fp32, threads=1)


@pytest.fixture(scope="module")
def gpu(export_fr_en: Callable[[str], Bundle]) -> Backend:
    return CudaBackend(export_fr_en("fp16"), device="cuda")


@pytest.fixture(scope="module")
def sources(fr_en_fp32: Bundle) -> list[Tokens]:
    tokenizer = load_tokenizer(fr_en_fp32)
    assert tokenizer is not None
    with gzip.open(TEST_FILE, "rt", encoding="utf-8") as lines:
        return [tuple(tokenizer.encode(line.split("\t")[0])) for line in lines][::30][:SENTENCES]


def forced(answers: Sequence[Tokens], start: int) -> NDArray[np.int64]:
    """Decoder inputs along these answers, (S, T): shorter ones repeat their end-of-sequence."""
    rows = [(start, *answer, *answer[-1:] * STEPS)[:STEPS] for answer in answers]
    return np.array(rows, np.int64)


@needs_a_gpu
def test_fp16_on_a_gpu_is_fp32_but_for_near_ties(
    fr_en_fp32: Bundle, cpu: Backend, gpu: Backend, sources: list[Tokens]
) -> None:
    rules, vocabulary = model_rules(fr_en_fp32.manifest), fr_en_fp32.manifest.dimensions.target_vocabulary
    greedy = SearchOptions(beam_size=1, max_new_tokens=STEPS)
    expected = [answer.hypotheses[0].tokens for answer in search_all(cpu, rules, [(s, greedy) for s in sources])]
    path = forced(expected, rules.decoder_start)

    on_cpu, on_gpu = (all_logprobs(backend, sources, path, vocabulary) for backend in (cpu, gpu))

    best = on_cpu.argmax(2)
    differences = [np.take_along_axis(side, best[..., None], 2) for side in (on_cpu, on_gpu)]
    largest = float(np.abs(differences[0] - differences[1]).max())
    second, first = np.sort(on_cpu, axis=2)[..., -2:].transpose(2, 0, 1)
    parted = (on_gpu.argmax(2) != best) & (first - second > 2 * TOLERANCE)
    print(f"provider {CUDA}: best log-probabilities differ by at most {largest:.2e}")
    assert largest <= TOLERANCE
    assert not parted.any()


@needs_a_gpu
def test_searches_on_a_gpu_agree(fr_en_fp32: Bundle, cpu: Backend, gpu: Backend, sources: list[Tokens]) -> None:
    """All in one batch, of mixed widths; where a near-tie parts two searches, their scores are close."""
    rules = model_rules(fr_en_fp32.manifest)
    searches = [
        (source, SearchOptions(beam_size=1 + number % 8, early_stopping=EarlyStopping.WHEN_FULL, max_new_tokens=60))
        for number, source in enumerate(sources)
    ]

    on_cpu, on_gpu = (search_all(backend, rules, searches) for backend in (cpu, gpu))

    pairs = [(a.hypotheses[0], b.hypotheses[0]) for a, b in zip(on_cpu, on_gpu, strict=True)]
    same = [(a, b) for a, b in pairs if a.tokens == b.tokens]
    print(f"provider {CUDA}: {len(same)} of {len(pairs)} best hypotheses are the same tokens")
    assert len(same) >= 0.9 * len(pairs)
    assert all(abs(a.score - b.score) <= TOLERANCE for a, b in same)


@needs_a_gpu
def test_captured_graphs_answer_what_single_kernels_answer(
    fr_en_fp32: Bundle, export_fr_en: Callable[[str], Bundle], sources: list[Tokens]
) -> None:
    """The same kernels at the same shapes: the same bits. The second pass replays from its first step on."""
    rules, bundle = model_rules(fr_en_fp32.manifest), export_fr_en("fp16")
    searches = [(source, SearchOptions(beam_size=4, max_new_tokens=60)) for source in sources]
    plain, graphs = (CudaBackend(bundle, device="cuda", graphs=graphs) for graphs in (False, True))

    expected = search_all(plain, rules, searches)
    core = searching_core(graphs, rules)
    passes = [answers(core, searches) for _ in range(2)]

    assert len(plain.step_graphs) == 0
    assert len(graphs.step_graphs) > 0
    for found in passes:
        assert [answer.hypotheses for answer in found] == [answer.hypotheses for answer in expected]


@needs_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_provider_takes_what_it_is_told(export_fr_en: Callable[[str], Bundle], precision: Precision) -> None:
    told = provider_options(precision, graphs=False)
    session = Sessions(export_fr_en(precision), providers("cuda", precision, graphs=False), threads=1).decoder
    assert told.items() <= session.get_provider_options()[CUDA].items()
