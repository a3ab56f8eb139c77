"""The Transformer's published formulas, written out, and what a bundle gives against a forward pass made of them.

Nothing here is shared with the export: a mistake there would otherwise be made twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beamline_export.agreement import search_all
from beamline_export.parity import all_logprobs, random_sources
from beamline_export.reference_search import reference_search
from beamline_server.bundle import Bundle
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.models.load import build_backend, model_rules

Forward = Callable[[Tensor, Tensor], Tensor]
"""Ids of one source (R) and of one decoder input (T) -> logits (T, V)."""


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """softmax(Q Kᵀ / √d_k) V for each head, of (Q, D) and (K, D)."""
    size = query.shape[1] // heads
    parts = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = query[:, own] @ key[:, own].T / math.sqrt(size)
        if causal:
            scores = scores + torch.full(scores.shape, -math.inf).triu(1)
        parts.append(scores.softmax(1) @ value[:, own])
    return torch.cat(parts, dim=1)


def normalized(x: Tensor, gain: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Layer normalization (Ba et al. 2016)."""
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + epsilon).sqrt() * gain + bias


def halves(first: int, count: int, width: int) -> Tensor:
    """Sines, then cosines, of frequencies from 1 to 1/10000 in equal steps of their logarithm, both ends included."""
    rate = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2 - 1))
    angle = torch.arange(first, first + count)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def check_agreement(bundle: Bundle, forward: Forward, *, count: int = 8, words: range | None = None) -> None:
    """Forced log-probabilities within 1e-4, and greedy and beam-4 outputs that are equal, of `count` sources.

    `words` are what sources are made of, by default the whole vocabulary.
    """
    rules, backend = model_rules(bundle.manifest), build_backend(bundle, "cpu", threads=1)
    size = bundle.manifest.dimensions
    words = words or range(size.source_vocabulary)
    end = bundle.manifest.special_tokens.source_eos
    drawn_inputs = random_sources(words.stop, end, min(20, size.max_source_tokens), count=count, seed=3)
    inputs = [tuple(i if i in words else words[-1] for i in source) for source in drawn_inputs]
    rng = np.random.default_rng(1)
    own = [i for i in range(size.target_vocabulary) if i != rules.decoder_start]
    forced = np.array([[rules.decoder_start, *rng.choice(own, 9)] for _ in inputs])
    found = all_logprobs(backend, inputs, forced, size.target_vocabulary)
    with np.errstate(invalid="ignore"):
        for logprobs, source, target in zip(found, inputs, forced, strict=True):
            expected = _logprobs(forward, source, target.tolist())
            assert np.array_equal(np.isinf(logprobs), np.isinf(expected))
            kept = np.isfinite(expected)
            assert np.abs(logprobs[kept] - expected[kept]).max() < 1e-4
    for width in (1, 4):
        options = SearchOptions(width, width, max_new_tokens=8, early_stopping=EarlyStopping.WHEN_FULL)
        answers = search_all(backend, rules, [(source, options) for source in inputs])
        for source, answer in zip(inputs, answers, strict=True):
            trace = reference_search(
                lambda prefixes, source=source: np.stack(  # type: ignore[misc]
                    [_logprobs(forward, source, prefix)[-1] for prefix in prefixes]
                ),
                rules.search,
                options,
                rules.decoder_start,
            )
            assert [h.tokens for h in answer.hypotheses] == [h.tokens for h in trace.hypotheses]
            scores = [(a.score, b.score) for a, b in zip(answer.hypotheses, trace.hypotheses, strict=True)]
            assert all(abs(a - b) < 1e-4 for a, b in scores)


def _logprobs(forward: Forward, source: Sequence[int], target: Sequence[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits = forward(torch.tensor(list(source)), torch.tensor(list(target)))
        result: NDArray[np.float32] = logits.double().log_softmax(-1).float().numpy()
    return result


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights by name, large enough that every part matters and that searches have something to choose."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if max(shape) == torch.Size(shape).numel():  # a vector
            gain = "scale" in name or ("norm" in name and name.endswith("weight"))
            tensors[name] = 1 + 0.2 * noise if gain else 0.3 * noise
        else:
            tensors[name] = 1.7 * noise / math.sqrt(min(shape))
    return tensors


def save_npz(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """An archive of arrays, whose names may be any."""
    np.savez(file, **arrays)  # type: ignore[arg-type]
