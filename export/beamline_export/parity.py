"""The gate of an export: the ONNX graphs against the PyTorch model, before a bundle appears.

Compared are the graphs' names, types and axes with their contract; log-probabilities of forced decodes, over several
lengths in one packed batch, from the first step to late ones; and whole beam searches, whose beams are permuted at
every step, with the slow reference search over PyTorch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_export.agreement import NEAR_TIE, Recording, Tokens, first_input, parting, record, search_all
from beamline_export.reference import Reference
from beamline_export.reference_search import reference_search
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.request import Completed, EarlyStopping, SearchOptions
from beamline_server.graph_file import read_graph
from beamline_server.graphs import GraphSpec
from beamline_server.models.forced import forced_rows
from beamline_server.models.load import model_rules

Progress = Callable[[str, int], Iterator[int]]
"""Yields 0 … count - 1 and shows how far it is."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """What a precision is allowed.

    Attributes:
        logprob: Greatest difference of a log-probability, or None where only `relative` is asked for.
        relative: Root mean square of the differences over the standard deviation of the log-probabilities.
        same_search: Whether whole searches must agree, but for near-ties.
    """

    logprob: float | None
    relative: float
    same_search: bool


TOLERANCES = {
    "fp32": Tolerances(1e-3, 1e-4, same_search=True),
    "fp16": Tolerances(2e-2, 5e-3, same_search=False),
    "int8": Tolerances(None, 0.1, same_search=False),
    "int4": Tolerances(None, 0.35, same_search=False),
}


@dataclass(frozen=True, slots=True)
class Probe:
    """What to compare with: sources of several lengths and the seed of the forced targets."""

    sources: tuple[Tokens, ...]
    forced_length: int = 12
    search_widths: tuple[int, ...] = (4, 1, 2, 5, 3, 8)
    search_length: int = 16
    seed: int = 0


def random_sources(
    vocabulary: int, eos: int | None, longest: int, *, count: int = 12, seed: int = 0
) -> tuple[Tokens, ...]:
    """Sources of 1 to `longest` random ids, end of sequence included where the model has one."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 3, longest, *rng.integers(1, longest + 1, max(0, count - 4))][:count]
    end = () if eos is None else (eos,)
    inner = [min(int(n), longest) - len(end) for n in lengths]
    return tuple((*(int(i) for i in rng.integers(0, vocabulary, max(n, 0))), *end) or (0,) for n in inner)


def check_contract(bundle: Bundle, contracts: dict[str, GraphSpec]) -> None:
    """Compare the graphs' files with their declaration.

    Raises:
        ExportError: a name, type or axis differs.
    """
    for name, contract in contracts.items():
        if different := {value for value, *_ in read_graph(bundle.read(name)).differing(contract)}:
            raise ExportError(f"{name} does not meet its contract in {', '.join(sorted(different))}")


def forced_decodes(bundle: Bundle, backend: Backend, probe: Probe) -> NDArray[np.float32]:
    """Log-probabilities after every forced token of a probe, (sources, T, V)."""
    return all_logprobs(backend, probe.sources, _forced(bundle, probe), bundle.manifest.dimensions.target_vocabulary)


def _forced(bundle: Bundle, probe: Probe) -> NDArray[np.int64]:
    """Random targets, as long as the model allows, (sources, T)."""
    length = min(probe.forced_length, bundle.manifest.dimensions.max_target_tokens)
    rng, vocabulary = np.random.default_rng(probe.seed), bundle.manifest.dimensions.target_vocabulary
    forced = rng.integers(0, vocabulary, (len(probe.sources), length))
    forced[:, 0] = bundle.manifest.special_tokens.decoder_start
    return forced


@dataclass(frozen=True, slots=True)
class ExportedAnswers:
    """What the graphs of a bundle give. It is kept, so that the graphs need no memory while PyTorch computes.

    Attributes:
        device: Where they ran.
        decodes: Of each set of graphs of the decoder, as `forced_decodes`.
        searches: Whole searches of mixed widths in one batch, with each one's recording; none where log-probabilities
            are no numbers.
    """

    device: str
    decodes: Sequence[NDArray[np.float32]]
    searches: Sequence[tuple[Completed, Recording]]

    @property
    def are_numbers(self) -> bool:
        """Whether the log-probabilities are."""
        return not np.isnan(self.decodes[0]).any()


def exported_answers(
    bundle: Bundle, backend: Backend, whole_step: NDArray[np.float32] | None, probe: Probe
) -> ExportedAnswers:
    """Compute what is to be compared with PyTorch.

    Args:
        bundle: What is to be served.
        backend: Runs the graphs that check the bundle when a server starts.
        whole_step: What the bundle's other graphs of the decoder give, if it has them, as `forced_decodes`.
        probe: What to compare with.
    """
    decodes = [forced_decodes(bundle, backend, probe), *([] if whole_step is None else [whole_step])]
    answers = ExportedAnswers(backend.device, decodes, ())
    if not answers.are_numbers:
        return answers
    rules, searches = model_rules(bundle.manifest), _searches(bundle, probe)
    together = search_all(backend, rules, searches)
    alone = [record(backend, rules, *search) for search in searches]
    return ExportedAnswers(backend.device, decodes, list(zip(together, alone, strict=True)))


def check_parity(
    bundle: Bundle,
    answers: ExportedAnswers,
    reference: Reference,
    probe: Probe,
    progress: Progress,
) -> dict[str, Any]:
    """Compare values; returns the figures for the manifest.

    Args:
        bundle: What is to be served.
        answers: What its graphs give.
        reference: The PyTorch model.
        probe: What to compare with.
        progress: Shows how far it is.

    Raises:
        ExportError: they differ by more than the precision is allowed.
    """
    limits = TOLERANCES[bundle.manifest.precision]
    decodes = _compared(_forced(bundle, probe), answers.decodes, reference, probe, progress)
    search = _compared_searches(bundle, answers, reference, probe, progress)
    problems = [problem for figures in decodes for problem in _beyond(limits, figures)]
    if limits.same_search and search["parted_beyond_near_ties"]:
        problems.append(f"{search['parted_beyond_near_ties']} of {search['searches']} beam searches differ")
    if problems and bundle.manifest.activations is not None and bundle.manifest.activations.scaled == "calibrated":
        problems.append("other or more sentences to calibrate with may help")
    if problems:
        raise ExportError(f"the exported model does not agree with PyTorch: {'; '.join(problems)}")
    figures = {"device": answers.device, "forced_decode": decodes[0], "beam_search": search}
    return figures | {"whole_step": decodes[1]} if decodes[1:] else figures


def _beyond(limits: Tolerances, figures: dict[str, Any]) -> list[str]:
    """What of forced decodes is beyond what a precision is allowed."""
    problems = []
    if not np.isfinite(figures["max_difference"]):
        problems.append("its log-probabilities are not finite")
    if limits.logprob is not None and not figures["max_difference"] <= limits.logprob:
        problems.append(f"log-probabilities differ by {figures['max_difference']:.3g} (allowed: {limits.logprob:g})")
    if not figures["relative_rms"] <= limits.relative:
        problems.append(f"their relative error is {figures['relative_rms']:.3g} (allowed: {limits.relative:g})")
    return problems


def _compared(
    forced: NDArray[np.int64],
    exported: Sequence[NDArray[np.float32]],
    reference: Reference,
    probe: Probe,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Figures of each set of graphs; PyTorch computes a source once for all of them."""
    agreements = [_Agreement() for _ in exported]
    for i in progress("forced decodes", len(probe.sources)):
        expected = reference.logprobs(probe.sources[i], [forced[i].tolist()])[0]
        if np.isnan(expected).any():
            raise ExportError("the model gives no numbers in PyTorch itself; its weights or its config are broken")
        for agreement, logprobs in zip(agreements, exported, strict=True):
            agreement.add(logprobs[i], expected)
    steps = forced.shape[1]
    return [{"sources": len(probe.sources), "steps": steps, **agreement.figures()} for agreement in agreements]


class _Agreement:
    """How far exported log-probabilities are from PyTorch's, source by source."""

    def __init__(self) -> None:
        self._worst: list[NDArray[np.float32]] = []
        self._squares = self._variance = 0.0
        self._same_top = 0

    def add(self, exported: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Log-probabilities after every forced token of one source, (T, V)."""
        # Tokens that were taken out are -inf on both sides.
        kept = expected > -np.inf
        difference = np.zeros_like(expected)
        np.subtract(exported, expected, where=exported != expected, out=difference)
        np.abs(difference, out=difference)
        self._worst.append(difference.max(axis=1))
        self._squares += float(np.square(difference[kept], dtype=np.float64).mean())
        self._variance += float(expected[kept].var(dtype=np.float64))
        self._same_top += int((exported.argmax(1) == expected.argmax(1)).sum())

    def figures(self) -> dict[str, Any]:
        worst = np.stack(self._worst)
        return {
            "max_difference": float(worst.max()),
            "max_difference_first_step": float(worst[:, 0].max()),
            "max_difference_last_step": float(worst[:, -1].max()),
            "relative_rms": float(np.sqrt(self._squares / self._variance)) if self._variance else 0.0,
            "same_top_token": self._same_top / worst.size,
        }


def all_logprobs(
    backend: Backend, sources: Sequence[Sequence[int]], forced: NDArray[np.int64], vocabulary: int
) -> NDArray[np.float32]:
    """Log-probabilities of the whole vocabulary after every forced token, (S, T, V), all sources side by side.

    The targets are fed token by token, as a search does.
    """
    result = np.empty((*forced.shape, vocabulary), np.float32)
    targets = [row.tolist() for row in forced]
    for index, position, row in forced_rows(backend, sources, targets, logprobs=True, part=1):
        result[index, position] = row.logprob
    return result


def _searches(bundle: Bundle, probe: Probe) -> list[tuple[Tokens, SearchOptions]]:
    """Whole searches of mixed widths."""
    most = min(probe.search_length, bundle.manifest.dimensions.max_target_tokens)
    stopping = list(EarlyStopping)
    return [
        (source, SearchOptions(width, width, max_new_tokens=most, early_stopping=stopping[i % 3]))
        for i, (source, width) in enumerate(zip(probe.sources, probe.search_widths, strict=False))
    ]


def _compared_searches(
    bundle: Bundle, answers: ExportedAnswers, reference: Reference, probe: Probe, progress: Progress
) -> dict[str, Any]:
    """Figures of the searches, each against the reference search over PyTorch."""
    rules, searches = model_rules(bundle.manifest), _searches(bundle, probe)[: len(answers.searches)]
    same, beyond, worst = 0, 0, 0.0
    for i in progress("beam searches", len(searches)):
        (source, options), (answer, recording) = searches[i], answers.searches[i]
        before, start = first_input(source, rules, prompted=bundle.manifest.dimensions.decoder_only)
        trace = reference_search(_next_logprobs(reference, before), rules.search, options, start)
        ours = answer.hypotheses
        if [h.tokens for h in ours] == [h.tokens for h in trace.hypotheses]:
            same += 1
            worst = max([worst, *(abs(a.score - b.score) for a, b in zip(ours, trace.hypotheses, strict=True))])
        else:
            where = parting(trace, recording)
            beyond += where is None or where.margin > NEAR_TIE
    return {"searches": len(searches), "same": same, "parted_beyond_near_ties": beyond, "max_score_difference": worst}


def _next_logprobs(
    reference: Reference, source: Sequence[int]
) -> Callable[[Sequence[Sequence[int]]], NDArray[np.float32]]:
    return lambda prefixes: reference.logprobs(source, prefixes)[:, -1]
