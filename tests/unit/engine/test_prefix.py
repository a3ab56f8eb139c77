"""A target whose beginning is given: the answer is what searching on from there finds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_export.reference_search import NextLogprobs, SearchTrace, reference_search
from beamline_server.engine.admission import MOST_ROWS, Capacity, cost
from beamline_server.engine.errors import RequestCancelled, StepFailed
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    Event,
    Failed,
    GenerationRequest,
    LengthPenaltyKind,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.step import EngineCore, ModelRules
from doubles.core import alone, assert_as_alone, bench, outcomes, pieces, request, source_of
from doubles.engine import LogprobTable, ManualClock, RandomTable, TableBackend, run_alone, table_rules
from doubles.memory import Tokens, TracedStep

VOCABULARY = 12
LENGTHS = (0, 1, 15, 16, 17, 40)
"""Of prefixes: with the decoder start, some of them just fill the rows of a step, or just do not."""
RULES = SearchRules(eos=(1, 2), banned=(3,), banned_at_start=(4, 5), forced_first=6, forced_last=1)


def prefix_of(length: int, seed: int = 0) -> Tokens:
    """Any tokens, those among them that the search may not generate."""
    return tuple(np.random.default_rng([seed, length]).integers(0, VOCABULARY, length).tolist())


def oracle(table: LogprobTable, rules: ModelRules, asked: GenerationRequest) -> SearchTrace:
    """The reference search on a model that has read the prefix; its tokens are counted from there."""

    def next_logprobs(generated: Sequence[Sequence[int]]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        first = rules.decoder_start if asked.decoder_start is None else asked.decoder_start
        start = (first, *asked.target_prefix)
        return np.stack([table(asked.source, (*start, *tokens[1:])) for tokens in generated])

    search: NextLogprobs = next_logprobs
    # A token that is forced to be the target's first is not, once the target has begun.
    processors = replace(rules.search, forced_first=None) if asked.target_prefix else rules.search
    first = None if asked.target_prefix else asked.forced_first
    return reference_search(search, processors, asked.options, rules.decoder_start, forced_first=first)


def assert_as_oracle(
    outcome: Completed | Failed, table: LogprobTable, rules: ModelRules, asked: GenerationRequest
) -> None:
    expected = oracle(table, rules, asked)
    if not expected.hypotheses:
        assert isinstance(outcome, Failed)
        assert isinstance(outcome.error, StepFailed)
        return
    assert isinstance(outcome, Completed)
    best = expected.hypotheses[: asked.options.n_best]
    assert [(h.tokens, h.score) for h in outcome.hypotheses] == [(h.tokens, h.score) for h in best]
    parts = -(-(1 + len(asked.target_prefix)) // MOST_ROWS)
    assert outcome.timing.steps == parts - 1 + len(expected.steps)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("beam_size", [1, 2, 4, 16])
@pytest.mark.parametrize("early_stopping", EarlyStopping)
def test_a_prefix_is_searched_on_from(length: int, beam_size: int, early_stopping: EarlyStopping) -> None:
    rules = table_rules(VOCABULARY, RULES)
    for seed, penalty in enumerate((-0.5, 0.0, 0.6, 1.0)):
        table = RandomTable(VOCABULARY, seed)
        options = SearchOptions(beam_size, beam_size, penalty, early_stopping=early_stopping, max_new_tokens=9)
        asked = GenerationRequest(RequestId(1), (7, 8), options, target_prefix=prefix_of(length, seed))
        assert_as_oracle(run_alone(TableBackend(table, rules), rules, asked), table, rules, asked)


@dataclass(frozen=True)
class Batch:
    """Requests, and the steps at which they come."""

    table: RandomTable
    rules: ModelRules
    coming: list[tuple[int, GenerationRequest]]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    tokens = st.integers(0, VOCABULARY - 1)
    rules = SearchRules(
        eos=tuple(draw(st.lists(tokens, max_size=2, unique=True))),
        banned=tuple(draw(st.lists(tokens, max_size=2, unique=True))),
        banned_at_start=tuple(draw(st.lists(tokens, max_size=2, unique=True))),
        forced_first=draw(st.none() | tokens),
        forced_last=draw(st.none() | tokens),
    )
    coming = []
    for number in range(draw(st.integers(1, 8))):
        beams, new = draw(st.integers(1, 16)), draw(st.integers(1, 8))
        options = SearchOptions(
            beam_size=beams,
            n_best=draw(st.integers(1, beams)),
            length_penalty=draw(st.sampled_from([-1.0, 0.0, 1.0])),
            length_penalty_kind=draw(st.sampled_from(LengthPenaltyKind)),
            early_stopping=draw(st.sampled_from(EarlyStopping)),
            min_new_tokens=draw(st.integers(0, new)),
            max_new_tokens=new,
        )
        prefix = prefix_of(draw(st.sampled_from(LENGTHS)), number)
        start, first = draw(st.none() | tokens), draw(st.none() | tokens)
        asked = GenerationRequest(
            RequestId(number), (9, number), options, target_prefix=prefix, decoder_start=start, forced_first=first
        )
        coming.append((draw(st.integers(0, 5)), asked))
    levels = draw(st.none() | st.integers(1, 6))
    table = RandomTable(VOCABULARY, draw(st.integers(0, 1 << 16)), levels=levels)
    return Batch(table, table_rules(VOCABULARY, rules), coming)


@given(batches(), st.sampled_from(["cpu", "cuda"]))
@settings(max_examples=6 * settings().max_examples // 10)
def test_prefixes_of_all_lengths_run_beside_each_other(batch: Batch, device: str) -> None:
    backend = TableBackend(batch.table, batch.rules, device=device, starts=range(VOCABULARY))
    core = EngineCore(backend, batch.rules, Capacity(64, 1 << 16), clock=ManualClock(), observer=NullObserver())
    events: list[Event] = []
    for step in range(6):
        core.accept([asked for at, asked in batch.coming if at == step])
        events += core.step()
        core.check()
    while not core.idle:
        events += core.step()
        core.check()
    ends = outcomes(events)
    for _, asked in batch.coming:
        assert_as_oracle(ends[asked.id], batch.table, batch.rules, asked)


def steps_of(trace: Sequence[TracedStep], source: Tokens) -> list[tuple[int, Tokens]]:
    """(position of the last row, slots taken) of a sequence, step by step."""
    at = [(step, step.sources.index(source)) for step in trace if source in step.sources]
    return [(step.positions[b], step.taken[b]) for step, b in at]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_prefix_takes_consecutive_slots_in_as_few_steps_as_there_are_rows_for(length: int, beams: int) -> None:
    engine = bench()
    asked = replace(request(1, beams=beams, tokens=4), target_prefix=(3,) * length)
    # Beside others, one of which is in the same bucket for longer.
    engine.core.accept([request(2, beams=5, tokens=9), asked, request(3)])
    engine.finish()
    steps = steps_of(engine.backend.trace, asked.source)
    parts = [tuple(range(first, min(first + MOST_ROWS, 1 + length))) for first in range(0, 1 + length, MOST_ROWS)]
    assert [slots for _, slots in steps[: len(parts)]] == parts
    assert [position for position, _ in steps] == [*(part[-1] for part in parts), *range(length + 1, length + 4)]
    assert {len(slots) for _, slots in steps[len(parts) :]} == {beams}
    needed = cost(asked)
    assert max(len(slots) for _, slots in steps) <= needed.rows
    assert max(slot for _, slots in steps for slot in slots) < needed.slots


def test_a_prefix_costs_its_neighbours_nothing() -> None:
    engine = bench()
    neighbours = [request(number, beams=number, tokens=6) for number in (1, 2, 3)]
    engine.core.accept([*neighbours, replace(request(4, beams=2), target_prefix=(3,) * 40)])
    ends = engine.finish()
    for each in neighbours:
        assert_as_alone(ends[each.id], each)
        assert len(steps_of(engine.backend.trace, each.source)) == 6


def test_a_prefix_that_is_too_wide_waits_for_its_rows() -> None:
    """Rows are counted at their worst: eleven while the prefix is fed, although the search has one."""
    engine = bench(rows=16)
    with_prefix = replace(request(2), target_prefix=(3,) * 10)
    engine.core.accept([request(1, beams=6, tokens=3), with_prefix])
    engine.step()
    assert (engine.core.running_rows, engine.core.queued_rows) == (6, 11)
    ends = engine.finish()
    assert_as_alone(ends[with_prefix.id], with_prefix)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_request_can_be_cancelled_while_its_prefix_is_fed(steps: int) -> None:
    """Whoever takes the rows, the slots and the index then gets what it would get alone."""
    engine = bench(rows=16)
    engine.core.accept([replace(request(1, beams=2, tokens=9), target_prefix=(3,) * 40)])
    for _ in range(steps):
        engine.step()
    following = [request(2, beams=16), replace(request(3, beams=4), target_prefix=(4,) * 17)]
    engine.core.accept(following)
    engine.core.cancel([RequestId(1)])
    ends = engine.finish()
    outcome = ends[RequestId(1)]
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, RequestCancelled)
    for each in following:
        assert_as_alone(ends[each.id], each)


@pytest.mark.parametrize("beams", [1, 4])
def test_what_is_streamed_begins_after_the_prefix(beams: int) -> None:
    engine = bench()
    asked = replace(request(1, beams=beams, tokens=9, stream=True), target_prefix=(3,) * 20)
    engine.core.accept([asked])
    events = [engine.step(), engine.step()]
    assert events[0] == [], "a part of a prefix generates nothing"
    while not engine.core.idle:
        events.append(engine.step())
    told = [event for step in events for event in step]
    best = alone(asked).hypotheses[0].tokens
    streamed = pieces(told, 1)
    assert streamed == best[: len(streamed)]
    assert len(best) == 9
    if beams == 1:
        assert streamed == best[:-1]


def test_what_the_rows_of_a_prefix_say_but_for_the_last_one_is_not_looked_at() -> None:
    """Not even if it is no number."""

    def blank(source: Tokens, prefix: Tokens) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return RandomTable(8)(source, prefix) if len(prefix) >= 20 else np.full(8, np.nan, np.float32)

    rules = table_rules(8)
    asked = replace(request(1, beams=3), target_prefix=(3,) * 19)
    outcome = run_alone(TableBackend(blank, rules), rules, asked)
    assert isinstance(outcome, Completed)
    assert outcome.hypotheses == alone(asked).hypotheses


def test_on_a_padded_device_as_well() -> None:
    engine = bench(rows=128, make_backend=partial(TableBackend, device="cuda"))
    asked = [
        replace(request(number, beams=1 + number % 5, tokens=5), target_prefix=(3,) * length)
        for number, length in enumerate(LENGTHS * 2)
    ]
    engine.core.accept(asked)
    ends = engine.finish()
    for each in asked:
        assert_as_alone(ends[each.id], each)
    assert engine.backend.encoded[0][0] == source_of(0, 3)
