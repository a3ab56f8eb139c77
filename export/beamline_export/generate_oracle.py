"""Hugging Face `generate` as an oracle: what it answers, and by which steps it came to it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, LogitsProcessorList

from beamline_export.agreement import NEAR_TIE, Parting, Tokens, find_parting, search_all
from beamline_export.reference import quiet_transformers
from beamline_export.reference_search import Ranked, SearchTrace, reference_search
from beamline_server.engine.backend import Backend
from beamline_server.engine.request import EarlyStopping, Hypothesis, SearchOptions
from beamline_server.engine.step import ModelRules

_PHANTOM = -1e8
"""Scores below this are places that `generate` had no hypothesis for."""

_EARLY_STOPPING: dict[EarlyStopping, object] = {
    EarlyStopping.WHEN_FULL: True,
    EarlyStopping.HEURISTIC: False,
    EarlyStopping.NEVER: "never",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The engine's answer to one sentence beside that of `generate`.

    Attributes:
        same: Whether all hypotheses are the same token sequences in the same order.
        parting: Where the searches part if not; None if they do only where `generate` runs a padded batch.
        score_difference: The greatest difference between scores of the same hypotheses; relative where scores exceed 1.
    """

    same: bool
    parting: Parting | None = None
    score_difference: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether the answers are the same but for near-ties."""
        return self.same or self.parting is None or self.parting.margin < NEAR_TIE


class GenerateOracle:
    """A transformers sequence-to-sequence model, with its own generation_config for what `SearchOptions` do not say.

    Args:
        model: The model, in evaluation mode.
        rules: The same rules as the exported model's, to follow its steps by.
    """

    def __init__(self, model: Any, rules: ModelRules) -> None:
        self._model = model
        self._rules = rules

    def search(
        self, sources: Sequence[Tokens], options: SearchOptions, target_prefix: Tokens = ()
    ) -> list[tuple[Ranked, ...]]:
        """The `n_best` hypotheses of each source, searched as one padded batch; greedy ones have no score (nan).

        Their tokens are the generated ones, which follow `target_prefix`.
        """
        width = max(map(len, sources))
        padding = next(iter(self._rules.search.eos), 0)
        ids = torch.tensor([[*source, *[padding] * (width - len(source))] for source in sources])
        mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in sources])
        given = (self._rules.decoder_start, *target_prefix)
        decoder_ids = torch.tensor([given] * len(sources))
        output = self._generate(options, input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)
        return self._hypotheses(output, options, len(given))

    def trace(self, source: Tokens, options: SearchOptions, target_prefix: Tokens = ()) -> SearchTrace:
        """The steps of one search, after `target_prefix`.

        Raises:
            AssertionError: `reference_search` comes to something else from the same log-probabilities.
        """
        given = (self._rules.decoder_start, *target_prefix)
        inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([given])}
        return self._traced(given, options, inputs)

    def _traced(self, given: Tokens, options: SearchOptions, inputs: dict[str, Any]) -> SearchTrace:
        """The steps of one search; `given` is what the decoder begins with."""
        recorder = _Recorder(renormalize=bool(self._model.generation_config.renormalize_logits))
        output = self._generate(options, logits_processor=LogitsProcessorList([recorder]), **inputs)
        trace = reference_search(recorder.logprobs, self._rules.search, options, given[0], given[1:])
        found = self._hypotheses(output, options, len(given))[0]
        same = [h.tokens for h in trace.hypotheses][: options.n_best] == [h.tokens for h in found]
        assert same, "reference_search does not follow generate"
        return trace

    def compare(self, backend: Backend, sources: Sequence[Tokens], options: SearchOptions) -> Iterator[Comparison]:
        """The engine beside `generate`, sentence by sentence."""
        theirs = self.search(sources, options)
        ours = search_all(backend, self._rules, [(source, options) for source in sources])
        for source, expected, answer in zip(sources, theirs, ours, strict=True):
            if [h.tokens for h in answer.hypotheses] == [h.tokens for h in expected]:
                yield Comparison(True, None, _score_difference(expected, answer.hypotheses))
            else:
                yield Comparison(
                    False, find_parting(self.trace(source, options), backend, self._rules, source, options)
                )

    def _generate(self, options: SearchOptions, **inputs: Any) -> Any:
        beams: dict[str, Any] = {}
        if options.beam_size > 1:
            beams = {
                "num_return_sequences": options.n_best,
                "length_penalty": options.length_penalty,
                "early_stopping": _EARLY_STOPPING[options.early_stopping],
            }
        with quiet_transformers(), torch.inference_mode():
            return self._model.generate(
                **inputs,
                num_beams=options.beam_size,
                max_new_tokens=options.max_new_tokens,
                min_new_tokens=options.min_new_tokens,
                output_scores=True,
                return_dict_in_generate=True,
                **beams,
            )

    def _hypotheses(self, output: Any, options: SearchOptions, given: int) -> list[tuple[Ranked, ...]]:
        """What follows the first `given` tokens."""
        tokens = [self._generated(row[given:]) for row in output.sequences.tolist()]
        scores = [math.nan] * len(tokens) if options.beam_size == 1 else output.sequences_scores.tolist()
        ranked = [Ranked(*pair) for pair in zip(tokens, scores, strict=True)]
        lists = (ranked[i : i + options.n_best] for i in range(0, len(ranked), options.n_best))
        return [tuple(h for h in hypotheses if not h.score < _PHANTOM) for hypotheses in lists]

    def _generated(self, row: Sequence[int]) -> Tokens:
        """What follows the given tokens, up to the first end of sequence."""
        tokens = tuple(row)
        end = next((i for i, token in enumerate(tokens) if token in self._rules.search.eos), len(tokens))
        return tokens[: end + 1]


class DecoderOnlyOracle(GenerateOracle):
    """The same of a model without an encoder; sources are prompts, each of which is searched alone."""

    def search(
        self, sources: Sequence[Tokens], options: SearchOptions, target_prefix: Tokens = ()
    ) -> list[tuple[Ranked, ...]]:
        """As `GenerateOracle.search`."""
        return [
            self._hypotheses(self._generate(options, **_prompt(given)), options, len(given))[0]
            for given in ((*source, *target_prefix) for source in sources)
        ]

    def trace(self, source: Tokens, options: SearchOptions, target_prefix: Tokens = ()) -> SearchTrace:
        """As `GenerateOracle.trace`."""
        given = (*source, *target_prefix)
        return self._traced(given, options, _prompt(given))


def _prompt(tokens: Tokens) -> dict[str, Any]:
    ids = torch.tensor([tokens])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Recorder(LogitsProcessor):  # type: ignore[misc]  # transformers come without types
    """Notes the scores of every prefix that a search asks for, as all processors leave them."""

    def __init__(self, *, renormalize: bool) -> None:
        # `generate` does this after the processors that it is given.
        self._renormalize = renormalize
        self._seen: dict[Tokens, NDArray[np.float32]] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        final = scores.log_softmax(-1) if self._renormalize else scores.clone()
        for prefix, row in zip(input_ids.tolist(), final.numpy(), strict=True):
            self._seen[tuple(prefix)] = row
        return scores

    def logprobs(self, prefixes: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As `NextLogprobs`, for prefixes that were seen."""
        return np.stack([self._seen[tuple(prefix)] for prefix in prefixes])


def _score_difference(expected: Sequence[Ranked], found: Sequence[Hypothesis]) -> float:
    """The greatest difference, of large scores relative to them; 0 where the oracle has none."""
    pairs = ((a.score, b.score) for a, b in zip(expected, found, strict=True) if not math.isnan(a.score))
    return max((abs(a - b) / max(1.0, abs(a)) for a, b in pairs), default=0.0)
