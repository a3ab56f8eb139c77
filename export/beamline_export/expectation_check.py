"""Compares an exported model with what the user's own model answered: shows that its config.json is the right one.

The comparison is in fp32, whatever the bundle's precision: rounding may change an output, a wrong config changes most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_export.agreement import NEAR_TIE, Tokens, first_input, search_all
from beamline_export.expectations import Example, Expectations, resolve, same_up_to
from beamline_export.parity import TOLERANCES, Progress, all_logprobs
from beamline_export.reference_search import processed
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.request import Hypothesis
from beamline_server.models.load import model_rules
from beamline_server.tokenizer import load_tokenizer

_AT_ONCE = 16
"""Searches in one batch; bounds the memory for their caches."""
_MOST_WAYS = 16
"""Outputs that near-ties lead to and that are followed at once, of a text."""
_MOST_SHOWN = 200
"""Characters of a text in a message."""
_OWN_FIELDS = (
    "nhead, norm_first, activation, positions, scale_embedding, layer_norm_eps, tie_embeddings, the special tokens"
)
_OTHER_CAUSES = "or the outputs were made with other weights, without model.eval(), or in half precision"


class ExpectedOutputs:
    """Expected outputs, as a model is to give them.

    Args:
        expectations: What was read from a file.
        bundle: Of the model; its manifest and its tokenizer are used.

    Raises:
        ExportError: names the lines that the model cannot read.
    """

    def __init__(self, expectations: Expectations, bundle: Bundle) -> None:
        self._file, self._examples = expectations.file, resolve(expectations, bundle)
        self._tokenizer = load_tokenizer(bundle)
        self._rules = model_rules(bundle.manifest)
        self._own_config = bundle.manifest.architecture == "nn_transformer"

    def count_same(self, backend: Backend, progress: Progress) -> int:
        """How many outputs this backend gives as expected."""
        outputs = self._search(backend, progress, "expected outputs")
        return sum(self._is_same(e, found[0].tokens) for e, found in zip(self._examples, outputs, strict=True))

    def check(self, backend: Backend, progress: Progress) -> dict[str, Any]:
        """Compare the outputs and log-probabilities of an fp32 backend; returns the figures for the manifest.

        Raises:
            ExportError: one differs by more than a near-tie; says which is the first.
        """
        outputs = self._search(backend, progress, "expected outputs in fp32")
        pairs = list(zip(self._examples, outputs, strict=True))
        different = [(example, found) for example, found in pairs if not self._is_same(example, found[0].tokens)]
        count = f"{len(pairs) - len(different)} of {len(pairs)} outputs are as expected"
        for example, found in different:
            where = self._parting(backend, example, found)
            if where is not None:
                told = self._told(example, found[0].tokens, where)
                raise ExportError(f"{self._file}: {count}; {told}; {self._causes()}")
        if len(different) == len(pairs):
            raise ExportError(f"{self._file}: {count}, all others are near-ties; give inputs that decide something")
        figures = {"examples": len(pairs), "same": len(pairs) - len(different), "near_ties": len(different)}
        return figures | self._check_logprobs(backend, progress)

    def _search(self, backend: Backend, progress: Progress, name: str) -> list[tuple[Hypothesis, ...]]:
        outputs: list[tuple[Hypothesis, ...]] = []
        for i in progress(name, -(-len(self._examples) // _AT_ONCE)):
            searches = [(e.source, e.options) for e in self._examples[i * _AT_ONCE : (i + 1) * _AT_ONCE]]
            outputs += [done.hypotheses for done in search_all(backend, self._rules, searches)]
        return outputs

    def _is_same(self, example: Example, output: Tokens) -> bool:
        if example.target is not None:
            return output == example.target or (output[:-1] == example.target and output[-1] in self._rules.search.eos)
        assert example.text is not None
        return self._decoded(output) == example.text.strip()

    def _decoded(self, tokens: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(tokens).strip()

    def _parting(self, backend: Backend, example: Example, found: Sequence[Hypothesis]) -> "_Parting | None":
        """Where an output that differs does so; None if a near-tie explains it."""
        output, target = found[0].tokens, example.target
        if target is not None and example.options.beam_size == 1:
            return self._greedy_parting(backend, example, target)
        if target is None and example.options.beam_size == 1:
            near_tie = self._leads_to_text(backend, example)
        else:
            close = [h.tokens for h in found if found[0].score - h.score <= NEAR_TIE]
            near_tie = any(self._is_same(example, tokens) for tokens in close)
        if near_tie:
            return None
        return _Parting(None if target is None else same_up_to(output, target))

    def _leads_to_text(self, backend: Backend, example: Example) -> bool:
        """Whether a greedy search comes to the expected text if near-ties are decided in its favour."""
        ways: list[Tokens] = [()]
        while ways:
            further = [way for begin in ways for way in self._next(backend, example, begin)]
            if any(self._is_over(way, example) and self._is_same(example, way) for way in further):
                return True
            ways = [way for way in further if not self._is_over(way, example) and self._begins(way, example)]
            ways = ways[:_MOST_WAYS]
        return False

    def _next(self, backend: Backend, example: Example, begin: Tokens) -> list[Tokens]:
        """The beginning of an output with each token that is as good as the best one after it."""
        row = self._rows(backend, example, begin)[-1]
        return [(*begin, int(token)) for token in np.flatnonzero(row.max() - row <= NEAR_TIE)]

    def _begins(self, tokens: Tokens, example: Example) -> bool:
        """Whether the expected text may still come of an output that begins with these tokens."""
        assert self._tokenizer is not None
        assert example.text is not None
        return example.text.strip().startswith(self._tokenizer.settled(tokens).strip())

    def _is_over(self, tokens: Tokens, example: Example) -> bool:
        ended = not set(tokens[-1:]).isdisjoint(self._rules.search.eos)
        return ended or len(tokens) == example.options.max_new_tokens

    def _greedy_parting(self, backend: Backend, example: Example, target: Tokens) -> "_Parting | None":
        """The first expected token, or end, that this model does not prefer, on the way that the expected ones go."""
        wanted: list[Tokens] = [(token,) for token in target]
        if not self._is_over(target, example):
            wanted.append(self._rules.search.eos)
        for step, (row, tokens) in enumerate(zip(self._rows(backend, example, target), wanted, strict=True)):
            best, likely = int(row.argmax()), float(max(row[list(tokens)], default=-np.inf))
            if not row[best] - likely <= NEAR_TIE:
                return _Parting(step, best, likely, float(row[best]))
        return None

    def _rows(self, backend: Backend, example: Example, tokens: Tokens) -> list[NDArray[np.float32]]:
        """Log-probabilities, with bans and forced tokens, at each token, and after them unless the output is over."""
        along = tokens if self._is_over(tokens, example) else (*tokens, 0)  # the last is not looked at
        rows = self._forced(backend, example.source, along)
        return [processed(row, step, self._rules.search, example.options) for step, row in enumerate(rows)]

    def _forced(self, backend: Backend, source: Tokens, target: Tokens) -> NDArray[np.float32]:
        """Log-probabilities along the target, (T, V)."""
        before, start = first_input(source, self._rules, prompted=not backend.has_encoder)
        inputs = np.array([[start, *target[:-1]]])
        rows: NDArray[np.float32] = all_logprobs(backend, [before], inputs, self._rules.vocabulary)[0]
        return rows

    def _told(self, example: Example, output: Tokens, where: "_Parting") -> str:
        begin = f"the first that differs is in line {example.line}"
        if example.target is None:
            return f"{begin}: expected {_shown(str(example.text).strip())}, got {_shown(self._decoded(output))}"
        assert where.step is not None
        begin += f", at token {where.step + 1}"
        if where.got is not None:
            wanted = f"expected {_token(example.target, where.step)} (log-probability {where.expected_logprob:.3f})"
            begin += f": {wanted}, got {where.got} ({where.got_logprob:.3f})"
            output = (*example.target[: where.step], where.got)
        else:
            begin += f": expected {_token(example.target, where.step)}, got {_token(output, where.step)}"
        if where.step == len(example.target):
            begin += f"; {self._end_hint(example)}"
        if self._tokenizer is None:
            return begin
        return f"{begin}; expected {_shown(self._decoded(example.target))}, got {_shown(self._decoded(output))}"

    def _end_hint(self, example: Example) -> str:
        eos = ", ".join(str(token) for token in self._rules.search.eos) or "none"
        ends = f"eos_token_id ({eos}) or after max_new_tokens ({example.options.max_new_tokens})"
        return f"an output ends with {ends}: correct config.json, or give the max_new_tokens of the line"

    def _causes(self) -> str:
        fields = f"config.json is probably wrong in one of {_OWN_FIELDS}, " if self._own_config else ""
        searches = "the search differs (beam_size, length_penalty, max_new_tokens, generation settings), "
        return f"{fields}{searches}{_OTHER_CAUSES}"

    def _check_logprobs(self, backend: Backend, progress: Progress) -> dict[str, Any]:
        """The largest difference of a log-probability, if any were given."""
        given = [example for example in self._examples if example.logprobs]
        if not given:
            return {}
        allowed = TOLERANCES["fp32"].logprob
        assert allowed is not None
        worst = 0.0
        for i in progress("expected log-probabilities", len(given)):
            example = given[i]
            assert example.target is not None
            rows = self._forced(backend, example.source, example.target)
            found = rows[np.arange(len(rows)), list(example.target)]
            difference = np.abs(found - np.array(example.logprobs, np.float32))
            if (wrong := np.flatnonzero(~(difference <= allowed))).size:
                at = int(wrong[0])
                raise ExportError(
                    f"{self._file}: line {example.line}: the log-probability of token {at + 1} "
                    f"({example.target[at]}) is {found[at]:.4f}, expected {example.logprobs[at]:.4f} (allowed "
                    f"difference: {allowed:g}); {self._causes()}"
                )
            worst = max(worst, float(difference.max()))
        return {"with_logprobs": len(given), "max_logprob_difference": worst}


@dataclass(frozen=True, slots=True)
class _Parting:
    """Where an output differs.

    Attributes:
        step: The first token that does, from 0; None for text.
        got: The token that the model prefers there, of a greedy search.
        expected_logprob: Log-probability of the expected token there.
        got_logprob: That of the preferred one.
    """

    step: int | None
    got: int | None = None
    expected_logprob: float = 0.0
    got_logprob: float = 0.0


def _token(tokens: Tokens, step: int) -> str:
    return str(tokens[step]) if step < len(tokens) else "the end"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…")
