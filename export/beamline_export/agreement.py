"""Whether two beam searches agree, and if not, where they part and how close the call was there.

Two correct searches may part where two candidates are closer than rounding: after that, everything may differ. So a
difference of results says nothing by itself; the margin at the step where they parted does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beamline_export.reference_search import SearchTrace
from beamline_export.spec import ExportError
from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import Backend, Bucket, Cache, Encoded
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import Completed, Failed, GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.engine.table import Table, path

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
    backend: Backend, rules: ModelRules, searches: Sequence[tuple[Tokens, SearchOptions]]
) -> list[Completed]:
    """Run searches (source, options) through an engine of their own, as many at once as fit; answers in order.

    Raises:
        ExportError: one of them failed.
    """
    return answers(searching_core(backend, rules), searches)


def first_input(source: Sequence[int], rules: ModelRules, *, prompted: bool) -> tuple[Tokens, int]:
    """What is read before the first decoder input of a search, and that input.

    Of a model without an encoder (`prompted`), these are the prompt without its last token, and the last one.
    """
    return (tuple(source[:-1]), source[-1]) if prompted else (tuple(source), rules.decoder_start)


def searching_core(backend: Backend, rules: ModelRules) -> EngineCore:
    """An engine for `answers`; what its caches are bound to stays from one use to the next."""
    return EngineCore(backend, rules, Capacity(256, 1 << 20), clock=lambda: 0.0, observer=NullObserver())


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


@dataclass(frozen=True, slots=True)
class Recording:
    """A search that was run alone.

    Attributes:
        hypotheses: Tokens of what it came to.
        beams: Tokens of the hypotheses that each step continues.
    """

    hypotheses: list[Tokens]
    beams: list[list[Tokens]]


def record(backend: Backend, rules: ModelRules, source: Tokens, options: SearchOptions) -> Recording:
    """Run one search alone."""
    recorder = _Recorder(backend)
    hypotheses = [h.tokens for h in search_all(recorder, rules, [(source, options)])[0].hypotheses]
    return Recording(hypotheses, recorder.beams)


def find_parting(
    trace: SearchTrace, backend: Backend, rules: ModelRules, source: Tokens, options: SearchOptions
) -> Parting | None:
    """Run one search alone and compare it step by step with the oracle's; None if it comes to the same hypotheses."""
    return parting(trace, record(backend, rules, source, options))


def parting(trace: SearchTrace, recording: Recording) -> Parting | None:
    """Compare a search step by step with the oracle's; None if it comes to the same hypotheses."""
    hypotheses, ours = recording.hypotheses, recording.beams
    if hypotheses == [h.tokens for h in trace.hypotheses][: len(hypotheses)]:
        return None
    for number, (step, beams) in enumerate(zip(trace.steps, ours[1:], strict=False)):
        expected = [beam.tokens for beam in step.beams]
        if beams != expected:
            totals = {candidate.tokens: float(candidate.total) for candidate in step.ranked}
            pairs = [(a, b) for a, b in zip(expected, beams, strict=False) if a != b]
            known = len(expected) == len(beams) and all(b in totals for _, b in pairs)
            return Parting(number, max(abs(totals[a] - totals[b]) for a, b in pairs) if known else np.inf)
    # The beams were the same as long as both ran: a finished hypothesis, or the end, was decided differently.
    last = min(len(trace.steps), len(ours)) - 1
    scores = [abs(a.score - b.score) for a, b in zip(trace.hypotheses, trace.hypotheses[1:], strict=False)]
    ends = [trace.steps[min(len(tokens), len(trace.steps)) - 1].margin for tokens in hypotheses]
    return Parting(last, min([trace.steps[last].stop_margin, *scores, *ends]))


class _Recorder:
    """A backend that notes which hypotheses each step of a lone sentence continues."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.device, self.encode_tokens = backend.device, backend.encode_tokens
        self.has_encoder = backend.has_encoder
        self.beams: list[list[Tokens]] = []

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        return self._backend.encode(sources)

    def new_cache(self) -> Cache:
        return _RecordingCache(self._backend.new_cache(), self.beams)


class _RecordingCache:
    """A cache that notes, at every step, the tokens of the live hypotheses of the sentence that has come last."""

    def __init__(self, cache: Cache, beams: list[list[Tokens]]) -> None:
        self._cache = cache
        self._beams = beams
        self._index = 0

    def enter(self, index: int, encoded: Encoded, number: int) -> None:
        self._index = index
        self._cache.enter(index, encoded, number)

    def leave(self, index: int) -> None:
        self._cache.leave(index)

    def place(self, table: Table, going: Sequence[int] | None = None) -> Sequence[Bucket]:
        sequence = table.sequences[self._index]
        length = int(sequence.length)
        if length == len(self._beams):  # a long prefix takes several steps, which continue nothing
            self._beams.append([self._tokens(table, length, k) for k in range(sequence.live)])
        return self._cache.place(table, going)

    def _tokens(self, table: Table, length: int, hypothesis: int) -> Tokens:
        tokens, totals = np.empty(length, np.int64), np.empty(length, np.float32)
        path(table, self._index, length, hypothesis, tokens, totals)
        return tuple(tokens.tolist())
