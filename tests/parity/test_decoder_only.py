"""Decoders without an encoder, exported from small random checkpoints, against transformers' `generate`."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from beamline_export.agreement import Tokens, search_all
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.generate_oracle import DecoderOnlyOracle
from beamline_export.parity import random_sources
from beamline_export.progress import Progress
from beamline_export.testing import DECODER_ONLY_FAMILIES, EOS, write_hugging_face
from beamline_server.bundle import Bundle
from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import Backend
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import Completed, EarlyStopping, GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.models.forced import forced_rows
from beamline_server.models.load import build_backend, model_rules

pytestmark = pytest.mark.parity

SEARCHES = [
    SearchOptions(1, 1, max_new_tokens=16),
    SearchOptions(1, 1, max_new_tokens=12, min_new_tokens=5),
    SearchOptions(4, 4, max_new_tokens=14, early_stopping=EarlyStopping.WHEN_FULL),
    SearchOptions(4, 4, max_new_tokens=14, early_stopping=EarlyStopping.HEURISTIC, length_penalty=0.6),
    SearchOptions(4, 4, max_new_tokens=14, early_stopping=EarlyStopping.NEVER, length_penalty=2.0),
    SearchOptions(5, 2, max_new_tokens=10, min_new_tokens=4, length_penalty=0.0),
    SearchOptions(2, 2, max_new_tokens=1),
]


@dataclass(frozen=True)
class Case:
    """A random checkpoint."""

    family: str
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHORT = {**LLAMA3, "original_max_position_embeddings": 32}
CASES = {
    "gpt2": Case("gpt2"),
    "gpt2-one-head": Case(
        "gpt2",
        1,
        {"n_head": 1, "n_embd": 24, "n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False},
        {"bad_words_ids": [[0], [11]], "forced_eos_token_id": EOS},
    ),
    "gpt2-other-scales": Case(
        "gpt2",
        2,
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
        {"eos_token_id": [EOS, 7]},
    ),
    "gpt2-wide-heads": Case("gpt2", 3, {"n_embd": 64, "n_head": 2}, {"begin_suppress_tokens": [EOS, 20]}),
    "gpt_neox": Case("gpt_neox"),
    "gpt_neox-one-after-the-other": Case(
        "gpt_neox", 1, {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"}
    ),
    "gpt_neox-without-biases": Case(
        "gpt_neox", 2, {"attention_bias": False, "tie_word_embeddings": True, "rotary_emb_base": 100, "rotary_pct": 0.5}
    ),
    "opt": Case("opt"),
    "opt-post-norm-narrow-embeddings": Case("opt", 1, {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-untied": Case("opt", 2, {"tie_word_embeddings": False, "num_hidden_layers": 1, "num_attention_heads": 2}),
    "llama": Case("llama"),
    "llama-grouped": Case("llama", 1, {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}),
    "llama-one-key": Case(
        "llama", 2, {"num_key_value_heads": 1, "tie_word_embeddings": True, "mlp_bias": True, "rope_theta": 50.0}
    ),
    "llama-3": Case("llama", 3, {"rope_scaling": LLAMA3, "num_key_value_heads": 2}),
    "llama-3-of-before": Case("llama", 5, {"rope_scaling": SHORT, "original_max_position_embeddings": 16}),
    "llama-linear": Case("llama", 4, {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "hidden_act": "gelu"}),
    "mistral": Case("mistral", 0, {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-window": Case("mistral", 1, {"num_key_value_heads": 2, "sliding_window": 40}),
    "qwen2": Case("qwen2", 0, {"num_key_value_heads": 2}),
    "qwen2-tied": Case("qwen2", 1, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
}


@dataclass(frozen=True)
class Exported:
    """A bundle, and what it was made of."""

    bundle: Bundle
    rules: ModelRules
    backend: Backend
    oracle: DecoderOnlyOracle
    model: Any


def exported(folder: Path, case: Case, precision: str = "fp32") -> Exported:
    checkpoint = write_hugging_face(folder / "checkpoint", case.family, case.config, case.generation, seed=case.seed)
    bundle = export(checkpoint, folder / "bundle", ExportOptions(precision=precision), Progress(io.StringIO()))
    model = getattr(transformers, DECODER_ONLY_FAMILIES[case.family].model_class).from_pretrained(checkpoint).eval()
    rules = model_rules(bundle.manifest)
    return Exported(bundle, rules, build_backend(bundle, "cpu", threads=1), DecoderOnlyOracle(model, rules), model)


def prompts(bundle: Bundle, seed: int) -> tuple[Tokens, ...]:
    """Of one token, of some, and of more than a step takes."""
    sizes = bundle.manifest.dimensions
    drawn = random_sources(sizes.source_vocabulary, None, min(24, sizes.max_target_tokens - 16), count=4, seed=seed)
    return tuple(tuple(token for token in prompt if token != EOS) or (5,) for prompt in drawn)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_generate(name: str, tmp_path: Path) -> None:
    model = exported(tmp_path, CASES[name])
    checked = 0
    for number, options in enumerate(SEARCHES):
        for comparison in model.oracle.compare(model.backend, prompts(model.bundle, number), options):
            assert comparison.agrees, comparison.parting
            assert comparison.score_difference < 1e-4
            checked += comparison.same
    assert checked >= 0.9 * 4 * len(SEARCHES)


@pytest.mark.parametrize(
    "name", ["gpt2-wide-heads", "gpt_neox", "llama-grouped", "llama-3", "llama-3-of-before", "qwen2"]
)
def test_log_probabilities_are_those_of_pytorch(name: str, tmp_path: Path) -> None:
    import torch

    model = exported(tmp_path, CASES[name])
    longest = model.bundle.manifest.dimensions.max_target_tokens
    whole = np.random.default_rng(0).integers(2, 120, (3, longest))
    with torch.inference_mode():
        expected = model.model(input_ids=torch.from_numpy(whole)).logits.log_softmax(-1).numpy()
    sources = [row[:cut].tolist() for row, cut in zip(whole, (0, 1, 20), strict=True)]
    targets = [row[cut:].tolist() for row, cut in zip(whole, (0, 1, 20), strict=True)]
    for index, position, row in forced_rows(model.backend, sources, targets, logprobs=True):
        assert row.logprob is not None
        wanted = expected[index, len(sources[index]) + position]
        assert np.abs(row.logprob - wanted).max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama-grouped"])
def test_an_answer_is_the_same_alone_and_in_any_batch(name: str, tmp_path: Path) -> None:
    """To the last bit, with prompts that are fed beside running searches."""
    model = exported(tmp_path, CASES[name])
    searches = [(prompt, SEARCHES[i % len(SEARCHES)]) for i, prompt in enumerate([*prompts(model.bundle, 3)] * 3)]
    together = search_all(model.backend, model.rules, searches)
    for search, answer in zip(searches, together, strict=True):
        assert search_all(model.backend, model.rules, [search])[0].hypotheses == answer.hypotheses


def test_a_prompt_that_has_been_fed_gives_its_rows_back(tmp_path: Path) -> None:
    """Greedy searches behind prompts of 16 tokens and more: nearly as many run as there are rows, and none is lost."""
    model = exported(tmp_path, CASES["gpt2"])
    core = EngineCore(model.backend, model.rules, Capacity(64, 1 << 20), clock=lambda: 0.0, observer=NullObserver())
    options = SearchOptions(max_new_tokens=30, min_new_tokens=30)
    searches = [(tuple(2 + (i + j) % 100 for j in range(16 + i % 20)), options) for i in range(100)]
    core.accept(GenerationRequest(RequestId(i), *search) for i, search in enumerate(searches))
    most, answers = 0, {}
    while not core.idle:
        for event in core.step():
            assert isinstance(event, Completed)
            answers[event.id] = event.hypotheses
        core.check()
        most = max(most, core.running_requests)
    assert most > 24
    for number in (0, 7, 19, 64, 99):
        alone = search_all(model.backend, model.rules, [searches[number]])[0]
        assert alone.hypotheses == answers[RequestId(number)]
