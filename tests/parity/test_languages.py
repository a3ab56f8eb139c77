"""Languages per request: what `generate` answers with a forced first token, a decoder start, or `>>fra<<` in a text."""

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from beamline.v1 import generation_pb2 as pb
from beamline_export.agreement import NEAR_TIE, searching_core
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.generate_oracle import GenerateOracle
from beamline_export.parity import random_sources
from beamline_export.progress import Progress
from beamline_export.reference import HuggingFaceReference, quiet_transformers
from beamline_export.reference_search import Ranked
from beamline_export.testing import DECODER_START, EOS, write_hugging_face
from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    GenerationRequest,
    Hypothesis,
    RequestId,
    SearchOptions,
)
from beamline_server.languages import Languages
from beamline_server.models.load import build_backend, model_rules
from beamline_server.rpc.converters import RequestReader, default_search, limits_of
from beamline_server.settings import Settings
from beamline_server.tokenizer import load_tokenizer

pytestmark = pytest.mark.parity

FR_EN = Path(__file__).parents[2] / "models" / "fr-en"
CODES = {"en": 100, "fr": 101, "de": 102}
BANNED = 5

SEARCHES = [
    pytest.param(SearchOptions(1, 1, max_new_tokens=14), id="greedy"),
    pytest.param(SearchOptions(4, 4, max_new_tokens=14, length_penalty=0.6), id="beam4"),
    pytest.param(
        SearchOptions(4, 4, max_new_tokens=14, min_new_tokens=9, early_stopping=EarlyStopping.NEVER), id="beam4-min"
    ),
    pytest.param(SearchOptions(4, 4, max_new_tokens=1), id="beam4-one-token"),
    pytest.param(SearchOptions(4, 4, max_new_tokens=2, early_stopping=EarlyStopping.WHEN_FULL), id="beam4-two-tokens"),
]


@dataclass(frozen=True)
class Model:
    """An exported BART, the same as transformers run it, and some sources."""

    bundle: Bundle
    reference: HuggingFaceReference
    sources: Sequence[tuple[int, ...]]


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("bart")
    generation = {"bad_words_ids": [[BANNED]], "begin_suppress_tokens": [*range(20, 60)]}
    checkpoint = write_hugging_face(folder / "checkpoint", "bart", {}, generation, seed=3)
    bundle = export(checkpoint, folder / "bundle", ExportOptions(), Progress(io.StringIO()))
    assert "languages" not in json.loads((folder / "bundle" / "manifest.json").read_text())
    sources = random_sources(bundle.manifest.dimensions.source_vocabulary, EOS, 20, count=6, seed=1)
    return Model(bundle, HuggingFaceReference("BartForConditionalGeneration", checkpoint), sources)


def in_languages(bundle: Bundle, begins: str, **codes: int) -> Bundle:
    """The bundle of a model whose targets begin with the code of a language."""
    described = {"codes": {n: {"token": i, "target": True} for n, i in codes.items()}, "target_begins": begins}
    languages = Languages.model_validate(described)
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"languages": languages}), "")


def answered(
    bundle: Bundle, backend: Backend, requests: Sequence[pb.GenerateRequest], options: SearchOptions
) -> list[list[Hypothesis]]:
    """What all requests at once come to, in an engine of their own: the hypotheses of each source."""
    settings = Settings()
    limits = limits_of(settings, bundle.manifest)
    reader = RequestReader(
        model_name="m",
        limits=limits,
        defaults=default_search(bundle.manifest.generation_defaults, limits),
        manifest=bundle.manifest,
        tokenizer=load_tokenizer(bundle),
    )
    sources = [source for request in requests for source in reader.generate(request).sources]
    core = searching_core(backend, model_rules(bundle.manifest))
    core.accept(
        GenerationRequest(
            RequestId(number),
            source.tokens,
            options,
            target_prefix=source.target_prefix,
            decoder_start=source.decoder_start,
            forced_first=source.forced_first,
        )
        for number, source in enumerate(sources)
    )
    done: dict[int, list[Hypothesis]] = {}
    while not core.idle:
        for event in core.step():
            assert isinstance(event, Completed), event
            done[event.id] = list(event.hypotheses)
    return [done[number] for number in range(len(sources))]


def assert_same(
    ours: Sequence[Hypothesis],
    theirs: Sequence[Ranked],
    oracle: GenerateOracle,
    source: tuple[int, ...],
    options: SearchOptions,
) -> None:
    if [h.tokens for h in ours] != [h.tokens for h in theirs]:
        margins = [min(step.margin, step.stop_margin) for step in oracle.trace(source, options).steps]
        assert min(margins) < NEAR_TIE, "the answers differ, and no two candidates were close"
    elif options.beam_size > 1:  # greedy searches of `generate` have no score
        assert [h.score for h in ours] == pytest.approx([h.score for h in theirs], abs=1e-4)


def requests_for(model: Model, name: str) -> list[pb.GenerateRequest]:
    inputs = [pb.Input(token_ids=pb.TokenIds(ids=source)) for source in model.sources]
    return [pb.GenerateRequest(inputs=inputs, target_language=name)]


@pytest.mark.parametrize("options", SEARCHES)
@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "whole-step"])
@pytest.mark.parametrize("begins", ["forced_first", "decoder_start"])
def test_a_target_language_is_what_generate_makes_of_its_id(
    bart: Model, begins: str, options: SearchOptions, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three languages at once, one of them a token that the model never generates by itself."""
    codes = {**CODES, "banned": BANNED}
    bundle = in_languages(bart.bundle, begins, **codes)
    backend: Backend = CudaBackend(bundle, device="cpu", threads=1) if cuda else build_backend(bundle, "cpu", threads=1)
    requests = [request for name in codes for request in requests_for(bart, name)]
    ours = answered(bundle, backend, requests, options)
    for number, code in enumerate(codes.values()):
        oracle = oracle_of(bart, begins, code, monkeypatch)
        found = ours[number * len(bart.sources) :][: len(bart.sources)]
        for source, hypotheses, theirs in zip(bart.sources, found, oracle.search(bart.sources, options), strict=True):
            assert_same(hypotheses, theirs, oracle, source, options)
        if begins == "forced_first":
            firsts = {(h.tokens[0], h.token_logprobs[0]) for hypotheses in found for h in hypotheses}
            assert firsts == {(code, 0.0)}
    assert len({tuple(h.tokens[1:] for h in hypotheses) for hypotheses in ours}) > 1 or options.max_new_tokens == 1


def oracle_of(model: Model, begins: str, code: int, monkeypatch: pytest.MonkeyPatch) -> GenerateOracle:
    """`generate` with the id of a language as its forced first token, or as its decoder start."""
    rules, config = model_rules(model.bundle.manifest), model.reference.model.generation_config
    if begins == "forced_first":
        monkeypatch.setattr(config, "forced_bos_token_id", code)
        return GenerateOracle(model.reference.model, replace(rules, search=replace(rules.search, forced_first=code)))
    monkeypatch.setattr(config, "decoder_start_token_id", code)
    return GenerateOracle(model.reference.model, replace(rules, decoder_start=code))


def test_without_a_language_the_answer_is_the_models_own(bart: Model) -> None:
    """A model whose decoder start is one of its languages."""
    bundle = in_languages(bart.bundle, "decoder_start", en=DECODER_START, fr=101)
    backend = build_backend(bundle, "cpu", threads=1)
    options = SearchOptions(4, 4, max_new_tokens=14)
    inputs = [pb.Input(token_ids=pb.TokenIds(ids=source)) for source in bart.sources]
    without, default, other = (
        answered(bundle, backend, [pb.GenerateRequest(inputs=inputs, target_language=name)], options)
        for name in (None, "en", "fr")
    )
    plain = answered(bart.bundle, backend, [pb.GenerateRequest(inputs=inputs)], options)
    assert without == default == plain
    assert other != plain


@pytest.fixture(scope="module")
def opus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A random MarianMT with two target languages in its vocabulary, as OPUS-MT has them."""
    folder = tmp_path_factory.mktemp("opus")
    ids = {"eos_token_id": 0, "pad_token_id": 5999, "decoder_start_token_id": 5999, "bos_token_id": None}
    config = {"vocab_size": 6002, "max_position_embeddings": 128, **ids}
    checkpoint = write_hugging_face(folder / "checkpoint", "marian", config, {**ids, "bad_words_ids": [[5999]]}, seed=5)
    for name in ("source.spm", "target.spm"):
        shutil.copy(FR_EN / name, checkpoint)
    vocabulary: dict[str, Any] = json.loads((FR_EN / "vocab.json").read_text())
    (checkpoint / "vocab.json").write_text(json.dumps({**vocabulary, ">>fra<<": 6000, ">>deu<<": 6001}))
    return checkpoint, export(checkpoint, folder / "bundle", ExportOptions(), Progress(io.StringIO()))


def test_a_target_language_of_opus_is_the_code_before_the_text(opus: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = opus
    assert bundle.manifest.model_languages().names == {"source": (), "target": ("deu", "fra")}
    texts = ["Je ne sais pas.", "  Où  ça ?", "Une phrase un peu plus longue, avec >>deu<< dedans."]
    options = SearchOptions(3, 3, max_new_tokens=12)
    with quiet_transformers():
        tokenizer = transformers.MarianTokenizer.from_pretrained(checkpoint)
    model = HuggingFaceReference("MarianMTModel", checkpoint).model
    backend = build_backend(bundle, "cpu", threads=1)
    inputs = [pb.Input(text=text) for text in texts]
    found = {}
    for name in ("fra", "deu"):
        ours = answered(bundle, backend, [pb.GenerateRequest(inputs=inputs, target_language=name)], options)
        written = [pb.Input(text=f">>{name}<< {text}") for text in texts]
        assert answered(bundle, backend, [pb.GenerateRequest(inputs=written)], options) == ours
        for text, hypotheses in zip(texts, ours, strict=True):
            ids = tokenizer(f">>{name}<< {text}", return_tensors="pt")
            with quiet_transformers(), torch.inference_mode():
                theirs = model.generate(
                    **ids,
                    num_beams=3,
                    num_return_sequences=3,
                    max_new_tokens=12,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
            rows = [row[1:] for row in theirs.sequences.tolist()]
            expected = [tuple(row[: row.index(0) + 1] if 0 in row else row) for row in rows]
            assert [h.tokens for h in hypotheses] == expected
            assert [h.score for h in hypotheses] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        found[name] = ours
    assert found["fra"] != found["deu"]
