"""Whether two beam searches agree, and if not, where they part and how close the call was there.

Two correct searches may part where two candidates are closer than rounding: after that, everything may differ. So a
difference of results says nothing by itself; the margin at the step where they parted does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beamline_export.reference_search import SearchTrace
from beamline_export.spec import ExportError
from beamline_server.engine.admission import Capacity
from beamline_server.engine.core import EngineCore, ModelRules
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import Completed, Failed, GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.runner import Cache, Encoded, EncoderBatch, StepBatch, StepRunner

NEAR_TIE = 1e-4
"""Candidates closer than this may change places by rounding alone (log-probability)."""

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two searches part.

    Attributes:
        step: The first step that decided differently, from 0; the last one if only the finished hypotheses differ.
        margin: By how much the oracle prefers its decision.
    """

    step: int
    margin: float


def search_all(
    runner: StepRunner, rules: ModelRules, searches: Sequence[tuple[Tokens, SearchOptions]]
) -> list[Completed]:
    """Run searches (source, options) through an engine of their own, as many at once as fit; answers in order.

    Raises:
        ExportError: one of them failed.
    """
    return answers(searching_core(runner, rules), searches)


def searching_core(runner: StepRunner, rules: ModelRules) -> EngineCore:
    """An engine for `answers`; what its caches are bound to stays from one use to the next."""
    return EngineCore(runner, rules, Capacity(256, 1 << 20), clock=lambda: 0.0, observer=NullObserver())


def answers(core: EngineCore, searches: Sequence[tuple[Tokens, SearchOptions]]) -> list[Completed]:
    """As `search_all`, through an engine that may have been used before and is idle."""
    core.accept(GenerationRequest(RequestId(i), *search) for i, search in enumerate(searches))
    done: dict[int, Completed] = {}
    while not core.idle:
        for event in core.step():
            if isinstance(event, Failed):
                raise ExportError(f"a beam search failed ({event.error}); the log says why")
            if isinstance(event, Completed):
                done[event.id] = event
    return [done[i] for i in range(len(searches))]


def find_parting(
    trace: SearchTrace, runner: StepRunner, rules: ModelRules, source: Tokens, options: SearchOptions
) -> Parting | None:
    """Run one search alone and compare it step by step with the oracle's; None if it comes to the same hypotheses."""
    recorder = _Recorder(runner)
    hypotheses = [h.tokens for h in search_all(recorder, rules, [(source, options)])[0].hypotheses]
    if hypotheses == [h.tokens for h in trace.hypotheses][: len(hypotheses)]:
        return None
    for number, (step, beams) in enumerate(zip(trace.steps, recorder.beams[1:], strict=False)):
        expected = [beam.tokens for beam in step.beams]
        if beams != expected:
            totals = {candidate.tokens: float(candidate.total) for candidate in step.ranked}
            pairs = [(a, b) for a, b in zip(expected, beams, strict=False) if a != b]
            known = len(expected) == len(beams) and all(b in totals for _, b in pairs)
            return Parting(number, max(abs(totals[a] - totals[b]) for a, b in pairs) if known else np.inf)
    # The beams were the same as long as both ran: a finished hypothesis, or the end, was decided differently.
    last = min(len(trace.steps), len(recorder.beams)) - 1
    scores = [abs(a.score - b.score) for a, b in zip(trace.hypotheses, trace.hypotheses[1:], strict=False)]
    ends = [trace.steps[min(len(tokens), len(trace.steps)) - 1].margin for tokens in hypotheses]
    return Parting(last, min([trace.steps[last].stop_margin, *scores, *ends]))


class _Recorder:
    """A runner that notes which hypotheses each step of a lone sentence continues, from the batches alone."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self.device = runner.device
        self.beams: list[list[Tokens]] = []
        self._token: dict[int, int] = {}
        self._step: dict[int, int] = {}

    def encode(self, batch: EncoderBatch) -> Encoded:
        return self._runner.encode(batch)

    def new_cache(self) -> Cache:
        return self._runner.new_cache()

    def step(self, cache: Cache, batch: StepBatch) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        for token, step, (_, slot) in zip(batch.ids, batch.positions, batch.slot, strict=True):
            self._token[int(slot)], self._step[int(slot)] = int(token), int(step)
        self.beams.append([self._path(batch.ancestors[0, 0, beam]) for beam in batch.back])
        return self._runner.step(cache, batch)

    def _path(self, ancestors: NDArray[np.bool_]) -> Tokens:
        """The tokens in a beam's slots in the order of their steps, but for the decoder's start."""
        slots = sorted((int(slot) for slot in np.flatnonzero(ancestors)), key=self._step.__getitem__)
        return tuple(self._token[slot] for slot in slots[1:])
