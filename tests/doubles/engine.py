"""Public doubles: an engine without a model, on a clock that stands still.

    rules = table_rules(vocabulary=8)
    runner = TableRunner(RandomTable(vocabulary=8), rules)
    run_alone(runner, rules, GenerationRequest(RequestId(1), (3, 4), SearchOptions(beam_size=2)))

`TableRunner` looks log-probabilities up in a function of (source, prefix), but it learns both from its caches alone, as
a model would: a wrong slot, seat, lane or row gives a wrong answer, or a `BrokenContract` that says what was wrong.
"""

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from beamline_server.engine.batch import LEAST_QUERIES
from numpy.typing import NDArray

from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import (
    Backend,
    Cache,
    Encoded,
    EncoderBatch,
    FromCache,
    FromEncoder,
    FromSeat,
    Origin,
    StepBatch,
)
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import Completed, Event, Failed, GenerationRequest, Piece, RequestId
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.engine.table import FloatArray, IntArray, SearchRules

_PATIENCE_S = 30.0
"""How long a test waits for another thread before it says that nothing comes."""

Tokens = tuple[int, ...]
LogprobTable = Callable[[Tokens, Tokens], FloatArray]
"""(source, prefix that begins with the decoder start) -> log-probabilities of the next token, (V,). Pure."""


class BrokenContract(BaseException):
    """The engine broke the contract between itself and its runner.

    No `Exception`, because the engine turns those of a runner into failed requests; this one is the test's to see.
    """


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise BrokenContract(problem)


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
    """Holds a runner back before each step until a test lets it pass."""

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
        """Wait for leave; the runner's side."""
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


@dataclass(slots=True)
class _Seat:
    """One sentence of a cache: its source, and (position, token) by slot. What nobody wrote since is poison."""

    source: Tokens
    written: dict[int, tuple[int, int]] = field(default_factory=dict)


class TableCache:
    """A lane's cache that knows what was written where, and whether a step that failed may have spoiled it."""

    def __init__(self, runner: "TableRunner") -> None:
        self.runner = runner
        self.slots = 0
        self.source_width = 0
        self.seats: list[_Seat] = []
        self.broken = False

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """As `Cache.arrange`; what is cut off by fewer slots is lost, and a newcomer's seat is all poison."""
        _expect(not self.broken, "a cache is used again whose step failed: it may hold anything")
        stayers = [origin.seat for origin in origins if isinstance(origin, FromSeat)]
        _expect(len(stayers) == len(set(stayers)), f"seats {stayers} are taken twice")
        seated = [self._seated(origin, slots) for origin in origins]
        longest = max((len(seat.source) for seat in seated), default=0)
        _expect(longest <= source_width, f"a source of {longest} tokens does not fit in {source_width}")
        # Seats are filled in order in the same memory: nobody's seat may be taken before its sentence has moved.
        for seat, origin in enumerate(origins):
            _expect(not isinstance(origin, FromSeat) or origin.seat >= seat, f"seat {seat} is filled from a filled one")
        self.seats, self.slots, self.source_width = seated, slots, source_width

    def _seated(self, origin: Origin, slots: int) -> _Seat:
        if isinstance(origin, FromEncoder):
            return _Seat(origin.encoded.tensors[origin.index])
        if isinstance(origin, FromCache):
            assert isinstance(origin.cache, TableCache)
            _expect(origin.cache is not self, "a sentence moves from its own cache")
            old = origin.cache.seats[origin.seat]
        else:
            old = self.seats[origin.seat]
        return _Seat(old.source, {slot: entry for slot, entry in old.written.items() if slot < slots})


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One decoder step as the runner saw it.

    Attributes:
        sources: The source of each sentence, in seat order.
        positions: Position of each sentence's new tokens.
        taken: Slots that each sentence's new tokens took, in the order of its beams.
        rows: N.
        slots: P.
        source_width: R.
        query_length: Q.
    """

    sources: tuple[Tokens, ...]
    positions: tuple[int, ...]
    taken: tuple[Tokens, ...]
    rows: int
    slots: int
    source_width: int
    query_length: int


class TableRunner:
    """A `Backend` whose answers come from a table; checks every batch. Thread-safe.

    Args:
        table: What it answers.
        rules: The model it stands for.
        faults: Calls that fail.
        gate: Where each step waits for leave.
        device: The kind that it stands for: lanes are finer on a CPU.

    Attributes:
        encoded: The sources of each encoder call.
        trace: The decoder steps.
    """

    def __init__(
        self,
        table: LogprobTable,
        rules: ModelRules,
        *,
        faults: Faults | None = None,
        gate: Gate | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self._table = table
        self._rules = rules
        self._faults = faults or Faults()
        self._gate = gate
        self._encode_numbers = itertools.count()
        self._step_numbers = itertools.count()
        self.encoded: list[tuple[Tokens, ...]] = []
        self.trace: list[TracedStep] = []

    def encode(self, batch: EncoderBatch) -> Encoded:
        """As `Backend.encode`; what it encodes is the sources themselves."""
        if fault := self._faults.encode.get(next(self._encode_numbers)):
            raise fault
        sentences, width = batch.row_of.shape
        _expect(len(batch.ids) == len(batch.positions) == len(batch.back), "the packed arrays differ in length")
        _expect(batch.source_length.shape == (sentences,), "source_length is not one per sentence")
        _expect(int(batch.source_length.sum()) == len(batch.ids), "source_length does not add up to the packed rows")
        sources = []
        for sentence, length in enumerate(batch.source_length.tolist()):
            _expect(0 < length <= width, f"a source of {length} tokens in {width}")
            rows = batch.row_of[sentence]
            _expect(np.array_equal(batch.positions[rows[:length]], np.arange(length)), "positions are not 0, 1, …")
            _expect(
                np.array_equal(batch.back[rows[:length]], sentence * width + np.arange(length)),
                "back does not lead to where row_of comes from",
            )
            _expect(bool(np.isin(rows, rows[:length]).all()), "padding is filled from another sentence")
            sources.append(tuple(batch.ids[rows[:length]].tolist()))
        self.encoded.append(tuple(sources))
        return Encoded(tuple(sources))

    def new_cache(self) -> Cache:
        """As `Backend.new_cache`."""
        return TableCache(self)

    def step(self, cache: Cache, batch: StepBatch) -> tuple[FloatArray, IntArray]:
        """As `Backend.step`: writes each row's token, reads its prefix through its ancestors, looks it up."""
        number = next(self._step_numbers)
        if self._gate is not None:
            self._gate.pass_through()
        assert isinstance(cache, TableCache)
        if fault := self._faults.step.get(number):
            cache.broken = True
            raise fault
        _expect(cache.runner is self, "the cache is another runner's")
        _expect(not cache.broken, "a cache is used again whose step failed: it may hold anything")
        self._check(cache, batch)
        self._note(cache, batch)
        for token, position, (seat, slot) in zip(batch.ids.tolist(), batch.positions.tolist(), batch.slot, strict=True):
            cache.seats[seat].written[int(slot)] = (position, token)
        logprobs = np.stack([self._logprobs(cache, batch, row) for row in range(len(batch.ids))])
        top = np.argsort(-logprobs, axis=1, kind="stable")[:, : batch.candidates]
        return np.take_along_axis(logprobs, top, axis=1), top

    def _check(self, cache: TableCache, batch: StepBatch) -> None:
        rows = len(batch.ids)
        sentences, heads, queries, slots = batch.ancestors.shape
        _expect(sentences == len(cache.seats), f"{sentences} sentences in {len(cache.seats)} seats")
        _expect(heads == 1 and queries >= LEAST_QUERIES, f"{queries} queries, {heads} heads")
        _expect(slots == cache.slots, f"a mask over {slots} slots, {cache.slots} are there")
        _expect(batch.row_of.shape == (sentences, queries), "row_of does not have the mask's shape")
        _expect(batch.slot.shape == (rows, 2), "slot is not one pair per row")
        _expect(len(batch.positions) == len(batch.back) == rows, "the packed arrays differ in length")
        _expect(0 < batch.candidates <= self._rules.vocabulary, f"{batch.candidates} candidates")
        lengths = [len(seat.source) for seat in cache.seats]
        _expect(
            batch.source_length.tolist() == lengths, f"sources of {batch.source_length} tokens; seated are {lengths}"
        )
        _expect(bool((np.diff(batch.back) > 0).all()), "two rows stand at one place, or out of order")
        sentence, query = np.divmod(batch.back, queries)
        _expect(np.array_equal(batch.slot[:, 0], sentence), "a row writes into another sentence's pool")
        _expect(np.array_equal(batch.row_of[sentence, query], np.arange(rows)), "row_of and back contradict each other")
        _expect(set(sentence.tolist()) == set(range(sentences)), "a seated sentence has no row")
        own_rows = sentence[batch.row_of] == np.arange(sentences)[:, None]
        _expect(bool(own_rows.all()), "padding is filled from another sentence")
        _expect(bool(((batch.slot[:, 1] >= 0) & (batch.slot[:, 1] < slots)).all()), f"a slot is outside of {slots}")
        # Who descends from the slot that a row writes? That row, and nobody else.
        heirs = batch.ancestors[sentence, 0, :, batch.slot[:, 1]]
        alone = np.arange(queries) == query[:, None]
        _expect(np.array_equal(heirs, alone), "a row writes where another beam descends from, or does not see itself")

    def _note(self, cache: TableCache, batch: StepBatch) -> None:
        sentences = range(len(cache.seats))
        of = [np.flatnonzero(batch.slot[:, 0] == sentence) for sentence in sentences]
        step = TracedStep(
            sources=tuple(seat.source for seat in cache.seats),
            positions=tuple(int(batch.positions[rows[0]]) for rows in of),
            taken=tuple(tuple(batch.slot[rows, 1].tolist()) for rows in of),
            rows=len(batch.ids),
            slots=cache.slots,
            source_width=cache.source_width,
            query_length=batch.row_of.shape[1],
        )
        self.trace.append(step)

    def _logprobs(self, cache: TableCache, batch: StepBatch, row: int) -> FloatArray:
        sentence, query = divmod(int(batch.back[row]), batch.row_of.shape[1])
        seat = cache.seats[sentence]
        ancestors = np.flatnonzero(batch.ancestors[sentence, 0, query]).tolist()
        poison = [slot for slot in ancestors if slot not in seat.written]
        _expect(not poison, f"a beam reads slots {poison}, which nobody wrote")
        path = sorted(seat.written[slot] for slot in ancestors)
        positions = [position for position, _ in path]
        _expect(positions == list(range(int(batch.positions[row]) + 1)), f"a beam's ancestors are at {positions}")
        prefix = tuple(token for _, token in path)
        _expect(prefix[0] == self._rules.decoder_start, f"a prefix begins with {prefix[0]}")
        logprobs = self._table(seat.source, prefix)
        _expect(logprobs.shape == (self._rules.vocabulary,), "the table does not have the vocabulary's size")
        return logprobs


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


def run_alone(runner: Backend, rules: ModelRules, request: GenerationRequest) -> Completed | Failed:
    """What a request comes to with nobody else in the engine, and all the time in the world."""
    capacity = Capacity(rows=request.options.beam_size, slots=1 << 30)
    core = EngineCore(runner, rules, capacity, clock=ManualClock(), observer=NullObserver())
    core.accept([replace(request, deadline=None, stream=False)])
    (outcome,) = run_until_idle(core)
    assert isinstance(outcome, Completed | Failed)
    return outcome
