"""What the host adds to a decoder step: an engine over a model that takes no time.

Everything but the run of the graph is the engine's own on a CPU: table, packing, binding, search, delivery.
Sentences of one length start together; what is counted is the CPU time of the engine's thread in the steps between the
first and the last of them. The processor's L2 cache is emptied before each step, as the products of a real one do.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import Cache, Encoded, StepResult
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.ort.candidates import empty
from beamline_server.engine.ort.cpu import CpuCache
from beamline_server.engine.ort.pieces import Pieces, Sizes
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.engine.table import FloatArray, IntArray
from beamline_server.graphs import GraphSizes

SIZES = ((1, 1), (1, 4), (8, 4), (32, 4), (64, 4), (256, 1), (256, 4), (1024, 1))
"""Sentences, and rows of each."""
VOCABULARY, SOURCE_TOKENS, NEW_TOKENS = 6000, 25, 40
_RULES = ModelRules(SearchRules(eos=(0,)), decoder_start=0, vocabulary=VOCABULARY, max_source_tokens=512)
_WIDTH = 8
_UNCOUNTED = 3
"""Steps of each round at the beginning: some are there to start it."""
_ANSWERS = 8
_L2_BYTES = 8 << 20
"""More than the L2 cache of any core has."""


class FreeBackend:
    """A backend of one small layer, whose graphs take no time and answer at random.

    Attributes:
        seconds: CPU time that making up the answers took, which is no part of a step.
    """

    device = "cpu"
    encode_tokens = 1024
    has_encoder = True

    def __init__(self) -> None:
        self.seconds = 0.0
        self._answers: dict[tuple[int, int], list[tuple[FloatArray, IntArray]]] = {}
        self._steps = 0

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """As `Backend.encode`."""
        width = max(map(len, sources))
        return Encoded(np.zeros((1, 2, len(sources), width, _WIDTH), np.float32), 0)

    def new_cache(self) -> Cache:
        """As `Backend.new_cache`."""
        return CpuCache(1, _WIDTH, _FreePieces(self))

    def answer(self, logprob: FloatArray, token: IntArray) -> None:
        """Write the candidates of a step, (N, C)."""
        began = time.thread_time()
        shape = (len(token), token.shape[1])
        if shape not in self._answers:
            rng = np.random.default_rng(0)
            self._answers[shape] = [
                (
                    -np.sort(5 * rng.random(shape, np.float32), axis=1),
                    rng.integers(1, VOCABULARY, shape),
                )
                for _ in range(_ANSWERS)
            ]
        self._steps += 1
        logprob[:], token[:] = self._answers[shape][self._steps % _ANSWERS]
        self.seconds += time.thread_time() - began


class _FreePieces(Pieces):
    def __init__(self, backend: FreeBackend) -> None:
        super().__init__((), Sizes(GraphSizes(1, _WIDTH, VOCABULARY), 1), note=None)
        self._backend = backend

    def run(self, rows: int, count: int, *_: object, **__: object) -> StepResult:
        best = empty(rows, count)
        self._backend.answer(best.logprob, best.token)
        return StepResult(best.logprob, best.token)


@dataclass(frozen=True, slots=True)
class HostTime:
    """CPU time of a step's host work, in microseconds.

    Attributes:
        sentences: At a time.
        beams: Rows of each.
        steps: How many were measured.
        median_us: The middle one.
        least_us: The quickest.
        p90_us: Nine of ten are as quick.
    """

    sentences: int
    beams: int
    steps: int
    median_us: float
    least_us: float
    p90_us: float

    def __str__(self) -> str:
        return (
            f"{self.sentences:5} x {self.beams} rows: {self.median_us:7.1f} µs a step (least {self.least_us:.1f}, "
            f"90 % within {self.p90_us:.1f}; {self.steps} steps)"
        )


def host_time(sentences: int, beams: int, *, steps: int = 400) -> HostTime:
    """The host work of steps of so many sentences with so many rows each."""
    backend, counted = FreeBackend(), list[float]()
    core = EngineCore(
        backend,
        _RULES,
        Capacity(sentences * beams, 1 << 40),
        clock=time.monotonic,
        observer=NullObserver(),
        encode_tokens=sentences * SOURCE_TOKENS,
    )
    _round(core, backend, sentences, beams)  # allocates, and compiles or loads what is compiled
    while len(counted) < steps:
        counted += _round(core, backend, sentences, beams)
    ordered = np.sort(counted) * 1e6
    return HostTime(
        sentences, beams, len(counted), median(ordered), float(ordered[0]), float(ordered[len(ordered) * 9 // 10])
    )


def _round(core: EngineCore, backend: FreeBackend, sentences: int, beams: int) -> list[float]:
    """Some sentences from start to end; seconds of the steps in between."""
    options = SearchOptions(beams, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
    source = tuple(range(1, SOURCE_TOKENS + 1))
    core.accept(GenerationRequest(RequestId(number), source, options) for number in range(sentences))
    others, seconds = np.zeros(_L2_BYTES // 8), []
    while not core.idle:
        others += 1
        backend.seconds, began = 0.0, time.thread_time()
        core.step()
        seconds.append(time.thread_time() - began - backend.seconds)
    return seconds[_UNCOUNTED:-1]


def print_table(steps: int) -> None:
    """Measure and print all sizes."""
    print(f"host work of a decoder step beside a model that takes no time, {SOURCE_TOKENS} source tokens:")
    for sentences, beams in SIZES:
        print(host_time(sentences, beams, steps=steps), flush=True)
