"""The relation that everything else rests on: an answer does not depend on who else is in the batch.

Random arrivals of real sentences, of all widths and stopping rules, with some that are given up, through the embedded
model on one thread: every result has the tokens, and bit for bit the scores, of the same request alone.
"""

import gzip
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from beamline_server.bundle import Bundle
from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import Backend
from beamline_server.engine.errors import RequestCancelled
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.ort.cpu import CpuBackend
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    Event,
    Failed,
    GenerationRequest,
    LengthPenaltyKind,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.models.load import model_rules
from beamline_server.tokenizer import load_tokenizer
from doubles.engine import ManualClock, run_alone

pytestmark = pytest.mark.parity

TEST_SENTENCES = Path(__file__).parents[2] / "models" / "fr-en" / "test.tsv.gz"
REQUESTS = 300


@dataclass(frozen=True)
class Model:
    """A bundle, ready to run on one thread."""

    backend: Backend
    rules: ModelRules
    sources: tuple[tuple[int, ...], ...]


@pytest.fixture(scope="module", params=["fp32", "int8", "calibrated", "int4"])
def model(request: pytest.FixtureRequest) -> Model:
    bundle: Bundle = request.getfixturevalue(f"fr_en_{request.param}")
    return Model(CpuBackend(bundle, threads=1), model_rules(bundle.manifest), sources_of(bundle))


def sources_of(bundle: Bundle) -> tuple[tuple[int, ...], ...]:
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    with gzip.open(TEST_SENTENCES, "rt", encoding="utf-8") as lines:
        return tuple(tuple(tokenizer.encode(line.split("\t")[0])) for line in lines)


def requests(sources: Sequence[tuple[int, ...]], seed: int) -> list[GenerationRequest]:
    """Requests of all kinds; one of them is long, and two are as wide as can be."""
    rng = random.Random(seed)
    result = []
    for number in range(REQUESTS):
        beams = rng.choice([1, 1, 2, 3, 4, 4, 5, 8])
        options = SearchOptions(
            beam_size=beams,
            n_best=rng.randint(1, beams),
            length_penalty=rng.choice([0.0, 0.6, 1.0, 1.4]),
            length_penalty_kind=rng.choice(list(LengthPenaltyKind)),
            early_stopping=rng.choice(list(EarlyStopping)),
            min_new_tokens=rng.choice([0, 0, 0, 12]),
            max_new_tokens=rng.choice([1, 6, 20, 40]) if rng.random() < 0.3 else 40,
        )
        options = replace(options, min_new_tokens=min(options.min_new_tokens, options.max_new_tokens))
        result.append(GenerationRequest(RequestId(number), rng.choice(sources), options))
    long: tuple[int, ...] = ()
    while len(long) < 120:
        long = (*long[:-1], *rng.choice(sources))
    result[40] = replace(result[40], source=long, options=SearchOptions(beam_size=4, n_best=4, max_new_tokens=120))
    for number in (60, 200):
        result[number] = replace(result[number], options=SearchOptions(beam_size=16, n_best=16, max_new_tokens=40))
    return result


def through_the_engine(
    model: Model, asked: Sequence[GenerationRequest], seed: int, *, rows: int = 128, at_once: int = 6
) -> dict[RequestId, Event]:
    """All requests, some at a time at random; one in ten is cancelled while it waits or runs."""
    rng = random.Random(seed)
    core = EngineCore(model.backend, model.rules, Capacity(rows, 1 << 17), clock=ManualClock(), observer=NullObserver())
    arrivals: Iterator[GenerationRequest] = iter(asked)
    coming: list[RequestId] = []
    outcomes: dict[RequestId, Event] = {}
    while len(outcomes) < len(asked):
        if core.queued_requests < 8:
            newcomers = list(itertools.islice(arrivals, rng.randint(0, at_once)))
            core.accept(newcomers)
            coming += [request.id for request in newcomers]
        if coming and rng.random() < 0.2:
            core.cancel([rng.choice(coming[-20:])])
        for event in core.step():
            assert event.id not in outcomes
            outcomes[event.id] = event
        core.check()
    return outcomes


@pytest.mark.parametrize(("seed", "rows", "at_once"), [(0, 128, 6), (1, 384, 20)], ids=["few-at-a-time", "many"])
def test_an_answer_is_the_same_alone_and_in_any_batch(model: Model, seed: int, rows: int, at_once: int) -> None:
    """Few share a bucket; many are in buckets by length and move from one to the next."""
    asked = requests(model.sources, seed)
    outcomes = through_the_engine(model, asked, seed, rows=rows, at_once=at_once)
    completed = 0
    for request in asked:
        outcome = outcomes[request.id]
        if isinstance(outcome, Failed):
            assert isinstance(outcome.error, RequestCancelled)
            continue
        assert isinstance(outcome, Completed)
        alone = run_alone(model.backend, model.rules, request)
        assert isinstance(alone, Completed)
        # Tokens, scores and token log-probabilities, bit for bit.
        assert outcome.hypotheses == alone.hypotheses
        completed += 1
    assert REQUESTS // 2 < completed < REQUESTS


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_an_answer_does_not_depend_on_the_number_of_threads(request: pytest.FixtureRequest, precision: str) -> None:
    """In a batch on two threads, which share every product, as alone on one."""
    bundle: Bundle = request.getfixturevalue(f"fr_en_{precision}")
    rules, sources = model_rules(bundle.manifest), sources_of(bundle)
    asked = requests(sources, 3)[:96]
    on_two = through_the_engine(Model(CpuBackend(bundle, threads=2), rules, sources), asked, 3)
    one = CpuBackend(bundle, threads=1)
    compared = 0
    for number, outcome in on_two.items():
        if isinstance(outcome, Completed):
            alone = run_alone(one, rules, asked[number])
            assert isinstance(alone, Completed)
            assert outcome.hypotheses == alone.hypotheses
            compared += 1
    assert compared > len(asked) // 2


def test_caches_on_a_device_give_the_same_answers(fr_en_fp32: Bundle) -> None:
    """The backend for GPUs, on the CPU: attention in the graph, so other last bits, but the same alone as together."""
    rules, sources = model_rules(fr_en_fp32.manifest), sources_of(fr_en_fp32)
    asked = requests(sources, 2)[:48]
    host = Model(CpuBackend(fr_en_fp32, threads=1), rules, sources)
    backend = CudaBackend(fr_en_fp32, device="cpu")
    device = Model(backend, rules, sources)
    on_host, on_device = through_the_engine(host, asked, 2), through_the_engine(device, asked, 2)
    # Which tells that shapes came again, and what they were computed in was padded and bound once.
    assert len(backend.step_graphs) > 3
    for number, outcome in on_host.items():
        other = on_device[number]
        assert type(outcome) is type(other)
        if isinstance(outcome, Completed) and isinstance(other, Completed):
            assert [h.tokens for h in outcome.hypotheses] == [h.tokens for h in other.hypotheses]
            scores = [h.score for h in other.hypotheses]
            assert [h.score for h in outcome.hypotheses] == pytest.approx(scores, rel=1e-4, abs=1e-4)
            alone = run_alone(backend, rules, asked[number])
            assert isinstance(alone, Completed)
            assert other.hypotheses == alone.hypotheses
