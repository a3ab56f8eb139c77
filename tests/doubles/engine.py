"""An engine without a model, on a clock that stands still.

    rules = table_rules(vocabulary=8)
    backend = TableBackend(RandomTable(vocabulary=8), rules)
    run_alone(backend, rules, GenerationRequest(RequestId(1), (3, 4), SearchOptions(beam_size=2)))

`TableBackend` looks log-probabilities up in a function of (source, prefix), but it learns both from packed arrays and
from what was written to its memories alone, as a model would: a wrong slot, batch index, bucket or row gives a wrong
answer, or a `BrokenContract` that says what was wrong.
"""

import hashlib
import itertools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.admission import Capacity, cost
from beamline_server.engine.backend import Backend, Cache, Encoded
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.ort.cuda.buckets import Buckets
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import Completed, Event, Failed, GenerationRequest, Piece, RequestId
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.engine.table import FloatArray
from doubles.memory import TableMemory, Tokens, TracedStep, read_sources

_PATIENCE_S = 30.0
"""How long a test waits for another thread before it says that nothing comes."""

LogprobTable = Callable[[Tokens, Tokens], FloatArray]
"""(source, prefix that begins with the decoder start) -> log-probabilities of the next token, (V,). Pure."""


class ManualClock:
    """A clock that moves when it is told to; seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """What time it is."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class RandomTable:
    """A table that a seed fills: every prefix of every source has log-probabilities of its own.

    Args:
        vocabulary: V.
        seed: Another seed, another table.
        sharpness: 0 makes all tokens equally likely; from 10 on, one token has most of the probability.
        levels: If given, log-probabilities are one of so many multiples of 1/2, not normalized: their sums are exact
            and often equal, so ties abound.
    """

    def __init__(self, vocabulary: int, seed: int = 0, *, sharpness: float = 4.0, levels: int | None = None) -> None:
        self._vocabulary = vocabulary
        self._seed = seed
        self._sharpness = sharpness
        self._levels = levels

    def __call__(self, source: Tokens, prefix: Tokens) -> FloatArray:
        """Log-probabilities after a prefix, (V,)."""
        key = np.array([self._seed, len(source), *source, *prefix], np.int64).tobytes()
        draw = np.frombuffer(hashlib.shake_128(key).digest(4 * self._vocabulary), np.uint32)
        if self._levels is not None:
            return (-0.5 - (draw % self._levels) / 2).astype(np.float32)
        logits: NDArray[np.float64] = self._sharpness * (draw / 2.0**32)
        logprobs: FloatArray = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        return logprobs


def table_rules(
    vocabulary: int = 8,
    search: SearchRules = SearchRules(eos=(1,)),  # noqa: B008 - a frozen value
    *,
    max_source_tokens: int = 512,
) -> ModelRules:
    """The rules of a model that a table stands for; its decoder start is 0."""
    return ModelRules(search, 0, vocabulary, max_source_tokens)


@dataclass(frozen=True, slots=True)
class Faults:
    """What to raise instead of computing, by the number of the call; calls count from 0."""

    encode: Mapping[int, BaseException] = field(default_factory=dict)
    step: Mapping[int, BaseException] = field(default_factory=dict)


class Gate:
    """Holds a backend back before each step until a test lets it pass."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting = 0
        self._passes = 0
        self._open = False

    def wait_for_arrival(self) -> None:
        """Block until a step stands at the gate."""
        with self._changed:
            self._wait_until(lambda: self._waiting > self._passes)

    def let_pass(self, steps: int = 1) -> None:
        """Let so many further steps through."""
        with self._changed:
            self._passes += steps
            self._changed.notify_all()

    def open(self) -> None:
        """Hold nobody back any more."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def pass_through(self) -> None:
        """Wait for leave; the backend's side."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                self._wait_until(lambda: self._open or self._passes > 0)
            finally:
                self._waiting -= 1
            self._passes = max(0, self._passes - 1)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        if not self._changed.wait_for(holds, _PATIENCE_S):
            raise TimeoutError("nobody came to the gate, or nobody opened it")


class TableBackend:
    """A `Backend` whose answers come from a table; checks all that it is given. Thread-safe.

    Args:
        table: What it answers.
        rules: The model it stands for.
        faults: Calls that fail.
        gate: Where each step waits for leave.
        device: The kind that it stands for: on "cpu" buckets are finer, elsewhere all arrays are padded.
        starts: Decoder starts that requests may have of their own, besides the model's.

    Attributes:
        encoded: The sources of each encoder call.
        trace: The decoder steps.
    """

    encode_tokens = 1024
    has_encoder = True

    def __init__(
        self,
        table: LogprobTable,
        rules: ModelRules,
        *,
        faults: Faults | None = None,
        gate: Gate | None = None,
        device: str = "cpu",
        starts: Collection[int] = (),
    ) -> None:
        self.device = device
        self.starts = frozenset([rules.decoder_start, *starts])
        self.rules = rules
        self._table = table
        self._faults = faults or Faults()
        self._gate = gate
        self._encode_numbers = itertools.count()
        self._step_numbers = itertools.count()
        self.encoded: list[tuple[Tokens, ...]] = []
        self.trace: list[TracedStep] = []

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """As `Backend.encode`; what it encodes is the sources themselves, read back from the packed arrays."""
        if fault := self._faults.encode.get(next(self._encode_numbers)):
            raise fault
        read, padded_tokens = read_sources(sources)
        self.encoded.append(read)
        return Encoded(read, padded_tokens)

    def new_cache(self) -> Cache:
        """As `Backend.new_cache`."""
        return Buckets(self.new_memory)

    def new_memory(self) -> TableMemory:
        """The memory of a bucket."""
        return TableMemory(self, padded=self.device != "cpu")

    def begin_step(self) -> BaseException | None:
        """A step begins, of any memory: wait at the gate; returns what is to be raised instead of computing."""
        number = next(self._step_numbers)
        if self._gate is not None:
            self._gate.pass_through()
        return self._faults.step.get(number)

    def look_up(self, source: Tokens, prefix: Tokens) -> FloatArray:
        """The table's log-probabilities, (V,)."""
        return self._table(source, prefix)


class Inbox:
    """A `Deliver` that keeps what it gets, and lets a test wait for it. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._outcomes: dict[RequestId, list[Completed | Failed]] = {}
        self._pieces: dict[RequestId, list[Piece]] = {}

    def __call__(self, events: Sequence[Event]) -> None:
        """Keep the events."""
        with self._changed:
            for event in events:
                if isinstance(event, Piece):
                    self._pieces.setdefault(event.id, []).append(event)
                else:
                    self._outcomes.setdefault(event.id, []).append(event)
            self._changed.notify_all()

    def wait_for(self, number: RequestId) -> Completed | Failed:
        """The outcome of a request; blocks until it is there."""
        with self._changed:
            came = self._changed.wait_for(lambda: number in self._outcomes, _PATIENCE_S)
            assert came, f"request {number} has no outcome"
            return self._outcomes[number][0]

    def pieces(self, number: RequestId) -> list[Tokens]:
        """The tokens of the pieces of a request so far."""
        with self._changed:
            return [piece.tokens for piece in self._pieces.get(number, [])]

    def outcomes(self) -> dict[RequestId, Completed | Failed]:
        """The outcomes so far; raises AssertionError if a request has more than one."""
        with self._changed:
            twice = [number for number, outcomes in self._outcomes.items() if len(outcomes) > 1]
            assert not twice, f"requests {twice} have more than one outcome"
            return {number: outcomes[0] for number, outcomes in self._outcomes.items()}


def run_until_idle(core: EngineCore) -> list[Event]:
    """Step until nothing is left to do, recounting after every step; returns all events."""
    events: list[Event] = []
    while not core.idle:
        events += core.step()
        core.check()
    return events


def run_alone(backend: Backend, rules: ModelRules, request: GenerationRequest) -> Completed | Failed:
    """What a request comes to with nobody else in the engine, and all the time in the world."""
    capacity = Capacity(cost(request).rows, slots=1 << 40)
    core = EngineCore(backend, rules, capacity, clock=ManualClock(), observer=NullObserver())
    core.accept([replace(request, deadline=None, stream=False)])
    (outcome,) = run_until_idle(core)
    assert isinstance(outcome, Completed | Failed)
    return outcome
