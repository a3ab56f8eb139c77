"""Random traffic, step by step: the compiled engine, the same loops uncompiled, and the naive engine agree.

What is decided is compared with the naive engine: who runs, with how many rows; tokens, scores, pieces, failures. The
state of every sequence - parents, slots, ancestors, scores, inputs of the step - is compared with the uncompiled loops,
bit for bit.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import Bucket, Cache, Encoded, StepResult
from beamline_server.engine.errors import DeadlineExceeded, RequestCancelled, StepFailed
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.ort.cuda.rectangle import StepInputs, pack_step
from beamline_server.engine.pack import Extent
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    Event,
    Failed,
    GenerationRequest,
    LengthPenaltyKind,
    Piece,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.engine.table import FloatArray, IntArray, Table
from doubles.engine import LogprobTable, ManualClock, RandomTable, TableBackend, table_rules
from doubles.memory import PackStep, TableMemory, Tokens, TracedStep, expect
from doubles.naive_engine import NaiveEngine, NaiveStep
from doubles.uncompiled import uncompiled

STEPS = int(os.environ.get("FUZZ_STEPS", "3000"))
"""Steps of sequences, each of which counts once, that are compared at least."""
LOOPS = ("search", "pack", "ort.cuda.rectangle", "table", "processors")
CAPACITY, ENCODE_TOKENS = Capacity(40, 8192), 60
PLAIN_SEARCH, PLAIN_PACK, PLAIN_RECTANGLE, _, _ = uncompiled(*(f"beamline_server.engine.{name}" for name in LOOPS))

# -- compiled and uncompiled ------------------------------------------------------------------------------------------


class PackedTwice(TableMemory):
    """A memory that packs compiled and uncompiled."""

    def pack(self, table: Table, members: IntArray, needed: Extent, loop: PackStep = pack_step) -> StepInputs:
        expect(PLAIN_PACK.extent(table, members) == needed, f"another extent than {needed}")
        ours, plain = (
            super().pack(table, members, needed, loop),
            super().pack(table, members, needed, PLAIN_RECTANGLE.pack_step),
        )
        for name, array in zip(StepInputs._fields, ours, strict=True):
            expect(np.array_equal(array, getattr(plain, name)), f"{name} is packed differently")
        return ours


@dataclass(frozen=True)
class Watched:
    """A bucket whose results are remembered."""

    bucket: Bucket
    results: list[tuple[IntArray, StepResult]]

    @property
    def members(self) -> IntArray:
        return self.bucket.members

    @property
    def needed(self) -> Extent:
        return self.bucket.needed

    def run(self, table: Table, candidates: int, *, logprobs: bool = False) -> StepResult:
        result = self.bucket.run(table, candidates, logprobs=logprobs)
        copied = replace(result, top_logprob=result.top_logprob.copy(), top_token=result.top_token.copy())
        self.results.append((self.members.copy(), copied))
        return result


class DecidedTwice:
    """A cache that, at every step, decides the last one again, uncompiled and on a copy of the table."""

    def __init__(self, inner: Cache, rules: SearchRules) -> None:
        self._inner = inner
        self._rules = rules.arrays()
        self._before: Table | None = None
        self._results: list[tuple[IntArray, StepResult]] = []
        self._new: set[int] = set()
        self._left: set[int] = set()
        self.compared = 0

    def enter(self, index: int, encoded: Encoded, number: int) -> None:
        self._inner.enter(index, encoded, number)
        self._new.add(index)

    def leave(self, index: int) -> None:
        self._inner.leave(index)
        self._left.add(index)

    def place(self, table: Table, going: Sequence[int] | None = None) -> Sequence[Bucket]:
        for index in self._new:
            again = copied(table, like=table)
            PLAIN_SEARCH.start(again, index)
            assert_same(again, table, index)
        if self._before is not None:
            self._decide_again(copied(self._before, like=table), table)
        buckets = self._inner.place(table, going)
        self._before, self._results = copied(table, like=table), []
        self._new.clear()
        self._left.clear()
        return [Watched(bucket, self._results) for bucket in buckets]

    def _decide_again(self, again: Table, table: Table) -> None:
        for members, result in self._results:
            over = PLAIN_SEARCH.decide(self._rules, again, members, result.top_logprob, result.top_token)
            done = again.sequences["done"][members]
            expect(over == done.sum(), f"{over} are over, {done.sum()} are marked")
            expect(set(members[done].tolist()) <= self._left, "who is over has not left")
            again.sequences["done"][members] = False
            # Whoever has come meanwhile has taken the index of one who has left.
            for index in set(members.tolist()) - self._new:
                assert_same(again, table, index)
                self.compared += 1


def copied(table: Table, *, like: Table) -> Table:
    """A copy, with arrays as large as those of another table."""

    def grown(array: Any, other: Any) -> Any:
        more = [(0, there - here) for here, there in zip(array.shape, other.shape, strict=True)]
        return np.pad(array, more) if any(after for _, after in more) else array.copy()

    return Table(*(grown(array, other) for array, other in zip(table, like, strict=True)))


def assert_same(ours: Table, theirs: Table, index: int) -> None:
    """BrokenContract unless all that is written of a sequence is the same, bit for bit."""
    mine, other = ours.sequences[index], theirs.sequences[index]
    differ = [name for name in mine.dtype.names if mine[name].tobytes() != other[name].tobytes()]
    differ += ["ancestors"] if (ours.ancestors[index] != theirs.ancestors[index]).any() else []
    steps = slice(int(other["length"]))
    for name in ("parents", "tokens", "totals"):
        if getattr(ours, name)[index, steps].tobytes() != getattr(theirs, name)[index, steps].tobytes():
            differ.append(name)
    expect(not differ, f"compiled and uncompiled loops differ in {differ}")


class TwiceBackend(TableBackend):
    """A backend on which everything is also done uncompiled."""

    caches: list[DecidedTwice]

    def new_cache(self) -> Cache:
        cache = DecidedTwice(super().new_cache(), self.rules.search)
        self.caches = [*getattr(self, "caches", []), cache]
        return cache

    def new_memory(self) -> TableMemory:
        return PackedTwice(self, padded=self.device != "cpu")


# -- random traffic ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """A model, and what comes: (step, request, step at which it is cancelled)."""

    table: LogprobTable
    rules: ModelRules
    coming: list[tuple[int, GenerationRequest, int | None]]


def traffic(rng: random.Random) -> Traffic:
    vocabulary = rng.choice([2, 4, 6, 9, 12, 40])

    def tokens(most: int) -> Tokens:
        return tuple(rng.sample(range(vocabulary), rng.randint(0, min(most, vocabulary))))

    rules = SearchRules(
        eos=tokens(3),
        banned=tokens(2),
        banned_at_start=tokens(2),
        forced_first=rng.choice([None, None, rng.randrange(vocabulary)]),
        forced_last=rng.choice([None, None, rng.randrange(vocabulary)]),
    )
    coming = []
    for number in range(rng.randint(1, 12)):
        at = rng.randint(0, 10)
        cancelled_at = at + rng.randint(0, 10) if rng.random() < 0.1 else None
        coming.append((at, asked(rng, number, at, vocabulary), cancelled_at))
    levels = rng.choice([None, None, 1, 2, 4])
    table = RandomTable(vocabulary, rng.randrange(1 << 30), sharpness=rng.choice([0.0, 2.0, 8.0]), levels=levels)
    return Traffic(with_holes(table, rng) if rng.random() < 0.2 else table, table_rules(vocabulary, rules), coming)


def asked(rng: random.Random, number: int, at: int, vocabulary: int) -> GenerationRequest:
    beams, new = rng.choice([1, 1, 2, 4, rng.randint(1, 16)]), rng.choice([1, 3, 6, 10, 10, 20, 20])
    if rng.random() < 0.05:
        # Longer than the table has room for at first.
        beams, new = rng.randint(1, 3), 80
    options = SearchOptions(
        beam_size=beams,
        n_best=rng.randint(1, beams),
        length_penalty=rng.choice([-1.0, 0.0, 0.6, 1.0, 2.0]),
        length_penalty_kind=rng.choice(list(LengthPenaltyKind)),
        early_stopping=rng.choice(list(EarlyStopping)),
        min_new_tokens=rng.choice([0, 0, new // 2, new]),
        max_new_tokens=new,
    )
    prefix = tuple(rng.randrange(vocabulary) for _ in range(rng.choice([0, 0, 0, 0, 1, 15, 16, 17, 30, 70])))
    source = (*range(rng.choice([0, 1, 4, 19, 69])), number)
    deadline = float(at + rng.randint(0, 20)) if rng.random() < 0.1 else None
    # As of a language that a request asks for.
    start, first = (rng.choice([None, None, None, rng.randrange(vocabulary)]) for _ in range(2))
    return GenerationRequest(
        RequestId(number),
        source,
        options,
        deadline,
        rng.random() < 0.5,
        prefix,
        decoder_start=start,
        forced_first=first,
    )


def with_holes(table: LogprobTable, rng: random.Random) -> LogprobTable:
    """Tokens without a probability, log-probabilities that are no numbers."""
    seed = rng.randrange(1 << 30)

    def holed(source: Tokens, prefix: Tokens) -> FloatArray:
        logprobs = table(source, prefix).copy()
        draw = np.random.default_rng([seed, len(source), *prefix]).integers(0, 10, len(logprobs))
        logprobs[draw == 0], logprobs[draw == 1] = np.nan, -np.inf
        return logprobs

    return holed


# -- compiled and naive -----------------------------------------------------------------------------------------------


def told(events: Sequence[Event]) -> NaiveStep:
    """What a step of the engine has told, as the naive engine tells it; but for its rows."""
    reasons = {RequestCancelled: "cancelled", DeadlineExceeded: "late", StepFailed: "nothing found"}
    result = NaiveStep()
    for event in events:
        match event:
            case Piece(number, tokens):
                result.pieces[number] = tokens
            case Failed(number, error):
                result.failed[number] = reasons[type(error)]
            case Completed(number, hypotheses):
                result.completed[number] = hypotheses
    return result


def rows_of(steps: Sequence[TracedStep]) -> dict[RequestId, int]:
    """How many rows of each request ran, all buckets together."""
    pairs = [(source[-1], len(taken)) for s in steps for source, taken in zip(s.sources, s.taken, strict=True)]
    assert len(dict(pairs)) == len(pairs), "a request ran twice in a step"
    return {RequestId(number): rows for number, rows in pairs}


def run(seed: int) -> int:
    """One traffic; returns how many steps of sequences were compared."""
    given = traffic(random.Random(seed))
    starts = range(given.rules.vocabulary)
    backend = TwiceBackend(given.table, given.rules, device="cuda" if seed % 4 == 3 else "cpu", starts=starts)
    clock = ManualClock()
    core = EngineCore(backend, given.rules, CAPACITY, clock=clock, observer=NullObserver(), encode_tokens=ENCODE_TOKENS)
    naive = NaiveEngine(given.table, given.rules, CAPACITY, encode_tokens=ENCODE_TOKENS)
    last = max(at for at, _, _ in given.coming)
    while clock.now <= last or not core.idle:
        arriving = [request for at, request, _ in given.coming if at == clock.now]
        leaving = [request.id for _, request, at in given.coming if at == clock.now]
        for engine in (core, naive):
            engine.accept(arriving)
            engine.cancel(leaving)
        before = len(backend.trace)
        events, expected = core.step(), naive.step(clock.now)
        core.check()
        found = told(events)
        assert rows_of(backend.trace[before:]) == expected.rows
        assert found.pieces == expected.pieces
        assert found.failed == expected.failed
        assert found.completed == expected.completed
        clock.advance(1.0)
    return sum(cache.compared for cache in backend.caches)


def test_compiled_uncompiled_and_naive_engine_agree() -> None:
    compared, seed = 0, 0
    while compared < STEPS:
        try:
            compared += run(seed)
        except BaseException as error:
            error.add_note(f"in the traffic of seed {seed}, after {compared} steps of sequences")
            raise
        seed += 1
    print(f"{compared} steps of sequences in {seed} traffics: compiled = uncompiled = naive")
