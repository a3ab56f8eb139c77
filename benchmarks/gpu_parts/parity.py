"""Whether fp16 on the device answers what fp32 on the CPU answers, and graphs what single kernels answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from beamline_export.agreement import answers, search_all, searching_core
from beamline_export.parity import all_logprobs
from beamline_server.engine.backend import Backend
from beamline_server.engine.request import Completed, SearchOptions
from beamline_server.engine.step import ModelRules
from beamline_server.models.load import model_rules
from gpu_parts.setting import FR_EN, Setting, Tokens

FORCED_STEPS = 12
TOLERANCE = 2e-2
"""How far fp16 may move a log-probability; two hypotheses whose fp32 scores are as close are a near-tie."""
MOST_TOKENS = 60


def parity(setting: Setting) -> dict[str, Any]:
    """Searches of widths 1 to 8 in one batch: fp32 on the CPU, fp16 with graphs, fp16 without."""
    reference = setting.reference()
    bundle = setting.bundle(FR_EN, "fp32")
    rules, vocabulary = model_rules(bundle.manifest), bundle.manifest.dimensions.target_vocabulary
    every = setting.sources()
    sources = every[:: max(1, len(every) // setting.scale.parity_sentences)][: setting.scale.parity_sentences]
    least = setting.scale.parity_least_tokens
    options = [SearchOptions(1 + i % 8, min_new_tokens=least, max_new_tokens=MOST_TOKENS) for i in range(len(sources))]
    searches = list(zip(sources, options, strict=True))
    expected = search_all(reference, rules, searches)
    plain = search_all(setting.backend(FR_EN, graphs=False), rules, searches)
    with_graphs = setting.backend(FR_EN)
    core = searching_core(with_graphs, rules)
    replayed = answers(core, searches)
    # Once more, with the same caches: now shapes that were captured late are replayed from the start.
    again = answers(core, searches)
    return {
        "searches": len(searches),
        **_against_fp32(expected, plain, reference, rules, searches),
        "forced_decode": _forced(setting, reference, expected, sources, vocabulary),
        "graphs": {
            "captured": len(with_graphs.step_graphs),
            "captured_encoder": len(with_graphs.encoder_graphs),
            "same_bits_as_single_kernels": _equal(plain, replayed),
            "same_bits_again": _equal(plain, again),
            "same_tokens": _equal_tokens(plain, again),
        },
    }


def _equal(some: Sequence[Completed], others: Sequence[Completed]) -> int:
    return sum(a.hypotheses == b.hypotheses for a, b in zip(some, others, strict=True))


def _equal_tokens(some: Sequence[Completed], others: Sequence[Completed]) -> int:
    return sum(a.hypotheses[0].tokens == b.hypotheses[0].tokens for a, b in zip(some, others, strict=True))


def _against_fp32(
    expected: Sequence[Completed],
    found: Sequence[Completed],
    reference: Backend,
    rules: ModelRules,
    searches: Sequence[tuple[Tokens, SearchOptions]],
) -> dict[str, Any]:
    """How many best hypotheses are the same tokens; what fp32 says of the others."""
    differences, partings = [0.0], []
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        best, other = a.hypotheses[0], b.hypotheses[0]
        if best.tokens == other.tokens:
            differences.append(abs(best.score - other.score))
            continue
        # The engine's default score: the sum over the length.
        rescored = _logprob(reference, rules, searches[i][0], other.tokens) / len(other.tokens)
        margin = best.score - rescored
        step = next((t for t, (x, y) in enumerate(zip(best.tokens, other.tokens, strict=False)) if x != y), -1)
        partings.append({"search": i, "step": step, "fp32_margin": margin, "near_tie": margin <= TOLERANCE})
    return {
        "same_tokens": len(expected) - len(partings),
        "largest_score_difference": max(differences),
        "partings": partings,
        "beyond_near_ties": sum(not parting["near_tie"] for parting in partings),
    }


def _logprob(reference: Backend, rules: ModelRules, source: Tokens, tokens: Tokens) -> float:
    """The sum of the log-probabilities of a hypothesis."""
    path = np.array([(rules.decoder_start, *tokens[:-1])], np.int64)
    logprobs = all_logprobs(reference, [source], path, rules.vocabulary)[0]
    return float(logprobs[np.arange(len(tokens)), list(tokens)].sum())


def _forced(
    setting: Setting, reference: Backend, expected: Sequence[Completed], sources: Sequence[Tokens], vocabulary: int
) -> dict[str, Any]:
    """Log-probabilities of the best next token along the CPU's own answers."""
    start = model_rules(setting.bundle(FR_EN, "fp32").manifest).decoder_start
    answers = [answer.hypotheses[0].tokens for answer in expected]
    path = np.array([(start, *answer, *answer[-1:] * FORCED_STEPS)[:FORCED_STEPS] for answer in answers], np.int64)
    backends = (reference, setting.backend(FR_EN, graphs=False))
    on_cpu, on_device = (all_logprobs(backend, sources, path, vocabulary) for backend in backends)
    best = on_cpu.argmax(2)[..., None]
    difference = np.abs(np.take_along_axis(on_cpu, best, 2) - np.take_along_axis(on_device, best, 2))
    return {
        "largest_difference": float(difference.max()),
        "same_best_token": float((on_device.argmax(2) == best[..., 0]).mean()),
        "within_tolerance": bool(difference.max() <= TOLERANCE),
    }
