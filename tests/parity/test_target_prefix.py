"""Given beginnings of targets: the engine goes on as `generate(decoder_input_ids=[[start, *prefix]])` does."""

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamline_export.agreement import NEAR_TIE, Tokens, searching_core
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.generate_oracle import GenerateOracle
from beamline_export.parity import random_sources
from beamline_export.progress import Progress
from beamline_export.reference import HuggingFaceReference
from beamline_export.reference_search import SearchTrace
from beamline_export.testing import EOS, write_hugging_face
from beamline_server.bundle import Bundle
from beamline_server.engine.request import Completed, EarlyStopping, GenerationRequest, RequestId, SearchOptions
from beamline_server.models.load import build_backend, model_rules
from beamline_server.tokenizer import load_tokenizer

pytestmark = pytest.mark.parity

FR_EN = Path(__file__).parents[2] / "models" / "fr-en"
LENGTHS = (1, 3, 20)
SENTENCES = 8
MODEL_CLASSES = {"marian": "MarianMTModel", "bart": "BartForConditionalGeneration"}

SEARCHES = [
    pytest.param(SearchOptions(1, 1, max_new_tokens=16), id="greedy"),
    pytest.param(SearchOptions(1, 1, max_new_tokens=16, min_new_tokens=12), id="greedy-min"),
    pytest.param(SearchOptions(4, 4, max_new_tokens=16, early_stopping=EarlyStopping.WHEN_FULL), id="beam4-when-full"),
    pytest.param(
        SearchOptions(4, 4, max_new_tokens=16, early_stopping=EarlyStopping.HEURISTIC, length_penalty=0.6),
        id="beam4-heuristic",
    ),
    pytest.param(
        SearchOptions(4, 4, max_new_tokens=16, early_stopping=EarlyStopping.NEVER, length_penalty=2.0), id="beam4-never"
    ),
    pytest.param(
        SearchOptions(4, 4, max_new_tokens=16, early_stopping=EarlyStopping.NEVER, length_penalty=-1.0),
        id="beam4-shorter",
    ),
    pytest.param(SearchOptions(4, 4, max_new_tokens=14, min_new_tokens=10), id="beam4-min"),
    pytest.param(SearchOptions(4, 4, max_new_tokens=1), id="beam4-one-token"),
]


@dataclass(frozen=True)
class Model:
    """An exported model, the same as transformers run it, and sources with the longest prefix for each."""

    bundle: Bundle
    reference: HuggingFaceReference
    oracle: GenerateOracle
    pairs: Sequence[tuple[Tokens, Tokens]]


@pytest.fixture(scope="module")
def fr_en(fr_en_fp32: Bundle) -> Model:
    """The embedded model; prefixes are beginnings of its references, or several of them in a row."""
    tokenizer = load_tokenizer(fr_en_fp32)
    assert tokenizer is not None
    with gzip.open(FR_EN / "test.tsv.gz", "rt", encoding="utf-8") as stream:
        lines = [line.rstrip("\n").split("\t")[:2] for line in stream][::101][:SENTENCES]
    sources = [tuple(tokenizer.encode(source)) for source, _ in lines]
    prefixes = [tuple((tokenizer.encode_target(target) * LENGTHS[-1])[: LENGTHS[-1]]) for _, target in lines]
    return model_of(fr_en_fp32, HuggingFaceReference("MarianMTModel", FR_EN), sources, prefixes)


def model_of(
    bundle: Bundle, reference: HuggingFaceReference, sources: Sequence[Tokens], prefixes: Sequence[Tokens]
) -> Model:
    oracle = GenerateOracle(reference.model, model_rules(bundle.manifest))
    return Model(bundle, reference, oracle, list(zip(sources, prefixes, strict=True)))


def random_model(folder: Path, family: str, config: dict[str, Any], generation: dict[str, Any], seed: int) -> Model:
    checkpoint = write_hugging_face(folder / "checkpoint", family, config, generation, seed=seed)
    bundle = export(checkpoint, folder / "bundle", ExportOptions(), Progress(io.StringIO()))
    sizes, rng = bundle.manifest.dimensions, np.random.default_rng(seed)
    sources = random_sources(sizes.source_vocabulary, EOS, 20, count=SENTENCES, seed=seed)
    ids = [i for i in range(sizes.target_vocabulary) if i not in bundle.manifest.special_tokens.eos]
    prefixes = [tuple(rng.choice(ids, LENGTHS[-1]).tolist()) for _ in sources]
    return model_of(bundle, HuggingFaceReference(MODEL_CLASSES[family], checkpoint), sources, prefixes)


@pytest.fixture(scope="module")
def forced(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random BART that forces its first token, which gives way to a prefix, and its last one, which does not."""
    generation = {"forced_bos_token_id": 3, "forced_eos_token_id": EOS}
    return random_model(tmp_path_factory.mktemp("bart"), "bart", {}, generation, seed=0)


@pytest.fixture(scope="module")
def suppressed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random MarianMT with tokens that it never generates, and some that it does not begin with."""
    config = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False, "decoder_vocab_size": 130}
    generation = {"suppress_tokens": [5, 9], "begin_suppress_tokens": [EOS, *range(20, 60)]}
    return random_model(tmp_path_factory.mktemp("marian"), "marian", config, generation, seed=2)


@pytest.fixture(params=["fr_en", "forced", "suppressed"])
def model(request: pytest.FixtureRequest) -> Model:
    """Each of them."""
    found: Model = request.getfixturevalue(request.param)
    return found


def searched(bundle: Bundle, requests: Sequence[GenerationRequest]) -> list[Completed]:
    """The engine's answers to requests that run together, in their order."""
    core = searching_core(build_backend(bundle, "cpu", threads=1), model_rules(bundle.manifest))
    core.accept(requests)
    done: dict[RequestId, Completed] = {}
    while not core.idle:
        for event in core.step():
            assert isinstance(event, Completed), event
            done[event.id] = event
    core.check()
    return [done[request.id] for request in requests]


def closest_call(trace: SearchTrace) -> float:
    """The least difference that decided anything in a search."""
    scores = [a.score - b.score for a, b in zip(trace.hypotheses, trace.hypotheses[1:], strict=False)]
    return min([*scores, *(min(step.margin, step.stop_margin) for step in trace.steps)])


@pytest.mark.parametrize("options", SEARCHES)
def test_searches_go_on_as_generate_does(model: Model, options: SearchOptions) -> None:
    """Prefixes of several lengths, and none, side by side: ids and scores are generate's, but for near-ties."""
    cases = [(source, prefix[:length]) for source, prefix in model.pairs for length in (0, *LENGTHS)]
    requests = [
        GenerationRequest(RequestId(i), source, options, target_prefix=prefix)
        for i, (source, prefix) in enumerate(cases)
    ]
    same = 0
    for (source, prefix), answer in zip(cases, searched(model.bundle, requests), strict=True):
        [expected] = model.oracle.search([source], options, prefix)
        if [h.tokens for h in answer.hypotheses] != [h.tokens for h in expected]:
            assert closest_call(model.oracle.trace(source, options, prefix)) < NEAR_TIE, (source, prefix)
            continue
        same += 1
        if options.beam_size > 1:  # `generate` tells no scores of a greedy search
            scores = [h.score for h in answer.hypotheses]
            assert scores == pytest.approx([h.score for h in expected], abs=1e-4, rel=1e-4)
    assert same > 0.9 * len(cases)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_scores_are_of_the_generated_tokens_alone(model: Model, beam_size: int) -> None:
    """Log-probabilities are PyTorch's behind the same prefix, and their penalized sum is the score."""
    options = SearchOptions(beam_size, beam_size, length_penalty=0.6, max_new_tokens=16)
    cases = [(source, prefix[:length]) for source, prefix in model.pairs for length in LENGTHS]
    requests = [
        GenerationRequest(RequestId(i), source, options, target_prefix=prefix)
        for i, (source, prefix) in enumerate(cases)
    ]
    tokens = model.bundle.manifest.special_tokens
    for (source, prefix), answer in zip(cases, searched(model.bundle, requests), strict=True):
        for hypothesis in answer.hypotheses:
            length, target = len(hypothesis.tokens), (tokens.decoder_start, *prefix, *hypothesis.tokens)
            rows = model.reference.logprobs(source, [target[:-1]])[0, len(prefix) :]
            expected = rows[np.arange(length), hypothesis.tokens]
            if length == options.max_new_tokens and tokens.forced_eos is not None:
                expected[-1] = 0
            assert hypothesis.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
            assert hypothesis.score == pytest.approx(expected.sum() / length**0.6, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("name", ["fr_en", "forced"])
def test_greedy_search_goes_on_from_its_own_tokens_as_it_did(
    name: str, length: int, request: pytest.FixtureRequest
) -> None:
    """Given the first tokens of what it has found alone, it finds the rest again, with the same log-probabilities."""
    model: Model = request.getfixturevalue(name)
    sources = [source for source, _ in model.pairs]
    whole = SearchOptions(1, 1, min_new_tokens=12, max_new_tokens=24)
    free = searched(model.bundle, [GenerationRequest(RequestId(i), source, whole) for i, source in enumerate(sources)])
    found = [answer.hypotheses[0] for answer in free]
    # Generated tokens are counted alone, so both bounds are at the same places.
    rest = SearchOptions(1, 1, min_new_tokens=12 - length, max_new_tokens=24 - length)
    again = [
        GenerationRequest(RequestId(i), source, rest, target_prefix=hypothesis.tokens[:length])
        for i, (source, hypothesis) in enumerate(zip(sources, found, strict=True))
    ]
    for hypothesis, answer in zip(found, searched(model.bundle, again), strict=True):
        assert answer.hypotheses[0].tokens == hypothesis.tokens[length:]
        assert answer.hypotheses[0].token_logprobs == pytest.approx(hypothesis.token_logprobs[length:], abs=1e-4)
