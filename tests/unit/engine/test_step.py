"""One worker's engine, stepped by hand: everybody gets the answer that they would get alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_server.engine.admission import ENCODE_TOGETHER, Capacity
from beamline_server.engine.backend import StepResult
from beamline_server.engine.errors import DeadlineExceeded, EngineStopped, RequestCancelled, StepFailed
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.pack import Extent
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    Event,
    Failed,
    Finish,
    GenerationRequest,
    LengthPenaltyKind,
    Piece,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.step import EngineCore
from beamline_server.engine.table import IntArray, Table
from doubles.core import (
    RULES,
    TABLE,
    Bench,
    alone,
    assert_as_alone,
    bench,
    failure,
    outcomes,
    pieces,
    request,
    source_of,
)
from doubles.engine import (
    Faults,
    ManualClock,
    RandomTable,
    TableBackend,
    run_alone,
    run_until_idle,
    table_rules,
)
from doubles.memory import TableMemory, Tokens

# -- random traffic ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request that comes at a step, and may be given up some steps later."""

    at: int
    request: GenerationRequest
    cancelled_at: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    result = []
    for number in range(draw(st.integers(1, 14))):
        at = draw(st.integers(0, 12))
        beams = draw(st.integers(1, 16))
        tokens = draw(st.sampled_from([1, 2, 4, 7, 12, 30]))
        options = SearchOptions(
            beam_size=beams,
            n_best=draw(st.integers(1, beams)),
            length_penalty=draw(st.sampled_from([-1.0, 0.0, 1.0, 2.0])),
            length_penalty_kind=draw(st.sampled_from(LengthPenaltyKind)),
            early_stopping=draw(st.sampled_from(EarlyStopping)),
            min_new_tokens=draw(st.sampled_from([0, 0, 1, tokens])),
            max_new_tokens=tokens,
        )
        asked = GenerationRequest(
            RequestId(number),
            source_of(number, draw(st.sampled_from([1, 2, 5, 20, 70]))),
            options,
            deadline=draw(st.none() | st.integers(at, at + 20).map(float)),
            stream=draw(st.booleans()),
        )
        result.append(Arrival(at, asked, draw(st.none() | st.integers(at, at + 12))))
    return result


def simulate(bench: Bench, traffic: Sequence[Arrival]) -> list[Event]:
    """Let the traffic through; rows and slots are recounted after every step."""
    events: list[Event] = []
    last = max(arrival.at for arrival in traffic)
    step = 0
    while step <= last or not bench.core.idle:
        bench.core.accept([arrival.request for arrival in traffic if arrival.at == step])
        bench.core.cancel([arrival.request.id for arrival in traffic if arrival.cancelled_at == step])
        told = bench.step()
        for arrival in traffic:
            given_up = [at for at in (arrival.cancelled_at, arrival.request.deadline) if at is not None]
            if arrival.at <= step and step == min(given_up, default=None):
                ended = {event.id for event in events if not isinstance(event, Piece)}
                end = outcomes(told).get(arrival.request.id)
                assert arrival.request.id in ended or isinstance(end, Failed), "given up, and not dropped at this step"
        events += told
        step += 1
    return events


def slots_taken(backend: TableBackend, source: Tokens) -> list[Tokens]:
    return [step.taken[step.sources.index(source)] for step in backend.trace if source in step.sources]


@given(arrivals())
@settings(max_examples=6 * settings().max_examples // 10)
def test_everybody_gets_one_outcome_and_it_is_the_one_they_would_get_alone(traffic: list[Arrival]) -> None:
    """Whatever comes, at any time, of any width and length, and whoever gives up: scores equal bit for bit."""
    engine = bench(rows=24, slots=4096, encode_tokens=60)
    events = simulate(engine, traffic)
    ends = outcomes(events)
    assert sorted(ends) == [arrival.request.id for arrival in traffic]
    for arrival in traffic:
        asked, outcome = arrival.request, ends[arrival.request.id]
        if isinstance(outcome, Failed):
            reasons = {RequestCancelled: arrival.cancelled_at, DeadlineExceeded: asked.deadline}
            assert reasons[type(outcome.error)] is not None
            continue
        by_itself = TableBackend(TABLE, RULES)
        expected = run_alone(by_itself, RULES, asked)
        assert isinstance(expected, Completed)
        assert outcome.hypotheses == expected.hypotheses
        assert outcome.timing.steps == expected.timing.steps
        assert slots_taken(engine.backend, asked.source) == slots_taken(by_itself, asked.source)
        told = pieces(events, asked.id)
        assert told == outcome.hypotheses[0].tokens[: len(told)]
        assert asked.stream or not told


@given(arrivals())
def test_requests_start_in_the_order_in_which_they_came(traffic: list[Arrival]) -> None:
    engine = bench(rows=20, slots=4096, encode_tokens=60)
    simulate(engine, traffic)
    started = [source[-1] for batch in engine.backend.encoded for source in batch]
    came = [a.request.id for a in sorted(traffic, key=lambda arrival: arrival.at)]
    assert started == [number for number in came if number in set(started)]


# -- coming and going -------------------------------------------------------------------------------------------------


def test_an_empty_engine_is_idle() -> None:
    engine = bench()
    assert engine.core.idle
    assert engine.step() == []
    assert engine.backend.trace == []
    assert engine.core.last_step_at is None


def test_a_newcomer_joins_at_the_next_step() -> None:
    engine = bench()
    engine.core.accept([request(1)])
    engine.step()
    engine.core.accept([request(2)])
    engine.step()
    assert engine.backend.trace[-1].sources == (source_of(1, 3), source_of(2, 3))
    assert engine.backend.trace[-1].positions == (1, 0)


def test_a_finished_sequence_leaves_at_its_step_and_a_newcomer_takes_its_place() -> None:
    engine = bench(rows=2)
    engine.core.accept([request(1, tokens=1), request(2, tokens=5), request(3)])
    assert list(outcomes(engine.step())) == [1]
    engine.step()
    assert engine.backend.trace[-1].sources == (source_of(3, 3), source_of(2, 3))


def test_rows_are_packed_whatever_the_widths() -> None:
    """A wide request costs its rows, its greedy neighbour one."""
    engine = bench()
    engine.core.accept([request(1, beams=16), request(2)])
    engine.step()
    assert engine.backend.trace[-1].rows == 2
    engine.step()
    # Seven tokens but the end follow the first: the beams of the second step.
    assert engine.backend.trace[-1].rows == 7 + 1
    engine.step()
    assert engine.backend.trace[-1].rows == 16 + 1


def test_timing_tells_where_the_time_went() -> None:
    engine = bench(rows=1)
    engine.core.accept([request(1, tokens=4), request(2, tokens=3)])
    ends = engine.finish()
    first, second = ends[RequestId(1)], ends[RequestId(2)]
    assert isinstance(first, Completed)
    assert isinstance(second, Completed)
    assert (first.timing.queue_s, first.timing.decode_s, first.timing.steps) == (0.0, 3.0, 4)
    assert (second.timing.queue_s, second.timing.decode_s, second.timing.steps) == (4.0, 2.0, 3)


def test_encoding_is_bounded_per_step() -> None:
    engine = bench(encode_tokens=10)
    engine.core.accept([request(number, source_tokens=4) for number in range(5)])
    engine.step()
    assert (engine.core.running_requests, engine.core.queued_requests, engine.core.queued_rows) == (2, 3, 3)
    engine.finish()
    assert [len(batch) for batch in engine.backend.encoded] == [2, 2, 1]


def test_who_waits_is_encoded_with_who_starts() -> None:
    """A few at a time; whoever is encoded when its turn comes starts without another call."""
    notes = Notes()
    engine = bench(rows=2, observer=notes)
    asked = [request(number, tokens=2) for number in range(ENCODE_TOGETHER + 3)]
    engine.core.accept(asked)
    ends = engine.finish()
    assert [note[2] for note in notes.notes if note[0] == "encoded"] == [ENCODE_TOGETHER, 3]
    for each in asked:
        assert_as_alone(ends[each.id], each)


def test_who_was_encoded_ahead_can_leave_before_it_starts() -> None:
    engine = bench(rows=1)
    engine.core.accept([request(1), request(2), request(3, deadline=2.0), request(4)])
    engine.step()
    engine.core.cancel([RequestId(2)])
    ends = engine.finish()
    assert isinstance(failure(ends[RequestId(2)]), RequestCancelled)
    assert isinstance(failure(ends[RequestId(3)]), DeadlineExceeded)
    assert_as_alone(ends[RequestId(4)], request(4))
    # The same number again is another request.
    engine.core.accept([request(5), replace(request(2), source=source_of(6, 4))])
    assert_as_alone(engine.finish()[RequestId(2)], replace(request(6), source=source_of(6, 4)))


def test_a_wide_request_starts_although_narrow_ones_keep_coming() -> None:
    engine = bench(rows=16)
    ends: dict[RequestId, Completed | Failed] = {}
    for second in range(40):
        engine.core.accept([request(100 + 4 * second + i, tokens=4) for i in range(4)])
        if second == 10:
            engine.core.accept([request(1, beams=16, tokens=4)])
        ends |= outcomes(engine.step())
    outcome = ends[RequestId(1)]
    assert isinstance(outcome, Completed)
    # All that run when it comes have left after the four steps that they need.
    assert outcome.timing.queue_s <= 4


def test_a_narrow_request_starts_although_wide_ones_keep_coming() -> None:
    engine = bench(rows=16)
    ends: dict[RequestId, Completed | Failed] = {}
    for second in range(40):
        if second % 4 == 0:
            engine.core.accept([request(100 + second, beams=16, tokens=4)])
        if second == 10:
            engine.core.accept([request(1, tokens=4)])
        ends |= outcomes(engine.step())
    outcome = ends[RequestId(1)]
    assert isinstance(outcome, Completed)
    assert outcome.timing.queue_s <= 4


# -- giving up --------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_rows_at_the_next_step() -> None:
    engine = bench(rows=8)
    engine.core.accept([request(1, beams=8, tokens=50), request(2, beams=8)])
    engine.step()
    assert engine.core.running_rows == 8
    engine.core.cancel([RequestId(1)])
    ends = outcomes(engine.step())
    assert isinstance(failure(ends[RequestId(1)]), RequestCancelled)
    assert engine.backend.trace[-1].sources == (source_of(2, 3),)


def test_a_request_can_be_cancelled_while_it_waits() -> None:
    engine = bench(rows=1)
    engine.core.accept([request(1), request(2), request(3)])
    engine.step()
    engine.core.cancel([RequestId(2)])
    ends = engine.finish()
    assert isinstance(failure(ends[RequestId(2)]), RequestCancelled)
    assert_as_alone(ends[RequestId(3)], request(3))


def test_cancelling_what_has_ended_changes_nothing() -> None:
    engine = bench()
    engine.core.accept([request(1)])
    engine.finish()
    engine.core.cancel([RequestId(1)])
    assert engine.step() == []


def test_a_late_cancellation_does_not_reach_a_new_request_of_the_same_id() -> None:
    engine = bench()
    engine.core.accept([request(1)])
    engine.finish()
    engine.core.cancel([RequestId(1)])
    engine.core.accept([request(1)])
    assert_as_alone(engine.finish()[RequestId(1)], request(1))


def test_a_deadline_ends_a_running_request() -> None:
    engine = bench(rows=1)
    engine.core.accept([request(1, tokens=50, deadline=3.0), request(2)])
    for _ in range(3):
        assert engine.step() == []
    ends = outcomes(engine.step())
    assert failure(ends[RequestId(1)]) == DeadlineExceeded("decoding")
    assert engine.backend.trace[-1].sources == (source_of(2, 3),)


def test_a_deadline_ends_a_request_that_waits() -> None:
    engine = bench(rows=1)
    engine.core.accept([request(1, tokens=50), request(2, deadline=3.0)])
    ends = outcomes([event for _ in range(4) for event in engine.step()])
    assert failure(ends[RequestId(2)]) == DeadlineExceeded("queueing")
    assert engine.core.queued_rows == 0


def test_every_deadline_counts_not_only_the_first() -> None:
    engine = bench()
    engine.core.accept([request(number, tokens=50, deadline=float(number)) for number in (5, 2, 3)])
    assert [list(outcomes(engine.step())) for _ in range(7)] == [[], [], [2], [3], [], [5], []]


def test_a_deadline_holds_although_others_have_ended() -> None:
    engine = bench()
    engine.core.accept([request(1, tokens=2, deadline=30.0), request(2, tokens=50, deadline=5.0), request(3, tokens=1)])
    assert [list(outcomes(engine.step())) for _ in range(6)] == [[3], [1], [], [], [], [2]]


def test_a_deadline_that_has_passed_costs_no_encoding() -> None:
    engine = bench()
    engine.core.accept([request(1, deadline=0.0)])
    assert failure(engine.finish()[RequestId(1)]) == DeadlineExceeded("queueing")
    assert engine.backend.encoded == []


# -- failing ----------------------------------------------------------------------------------------------------------


def test_a_failed_encoding_fails_only_those_it_would_have_started() -> None:
    engine = bench(faults=Faults(encode={1: RuntimeError("no")}))
    engine.core.accept([request(1)])
    engine.step()
    engine.core.accept([request(2), request(3)])
    ends = outcomes(engine.step())
    assert {number: type(failure(end)) for number, end in ends.items()} == {2: StepFailed, 3: StepFailed}
    engine.core.accept([request(4)])
    ends = engine.finish()
    assert_as_alone(ends[RequestId(1)], request(1))
    assert_as_alone(ends[RequestId(4)], request(4))


def test_a_failed_encoding_does_not_fail_those_who_wait() -> None:
    engine = bench(rows=2, faults=Faults(encode={0: RuntimeError("no")}))
    engine.core.accept([request(number) for number in range(5)])
    ends = outcomes(engine.step())
    assert {number: type(failure(end)) for number, end in ends.items()} == {0: StepFailed, 1: StepFailed}
    ends = engine.finish()
    for number in (2, 3, 4):
        assert_as_alone(ends[RequestId(number)], request(number))


def test_a_failed_step_fails_its_bucket_and_the_next_request_is_served() -> None:
    """The long source is in a bucket of its own, which goes on."""
    engine = bench(faults=Faults(step={2: RuntimeError("no")}))
    engine.core.accept([request(1), request(2, beams=3), request(3, source_tokens=80)])
    engine.step()
    ends = outcomes(engine.step())
    assert {number: type(failure(end)) for number, end in ends.items()} == {1: StepFailed, 2: StepFailed}
    engine.core.accept([request(4, beams=2)])
    ends = engine.finish()
    assert_as_alone(ends[RequestId(3)], request(3, source_tokens=80))
    assert_as_alone(ends[RequestId(4)], request(4, beams=2))


def test_when_every_bucket_fails_everybody_hears_of_it() -> None:
    engine = bench(faults=Faults(step={2: RuntimeError("no"), 3: RuntimeError("neither")}))
    engine.core.accept([request(1), request(2, source_tokens=80)])
    engine.step()
    ends = outcomes(engine.step())
    assert {number: type(failure(end)) for number, end in ends.items()} == {1: StepFailed, 2: StepFailed}
    assert engine.core.idle


class NoTokens(TableMemory):
    """Its first answer has tokens that nothing can be done with."""

    spoiled = False

    def run(self, table: Table, members: IntArray, needed: Extent, candidates: int, *, logprobs: bool) -> StepResult:
        result = super().run(table, members, needed, candidates, logprobs=logprobs)
        if self.spoiled:
            return result
        self.spoiled = True
        return replace(result, top_token=np.full(result.top_token.shape, None, np.object_))


class HalfBroken(TableBackend):
    """Nothing can be done with the first answer of its first memory: that of the bucket that short requests share."""

    memories = 0

    def new_memory(self) -> TableMemory:
        self.memories += 1
        return NoTokens(self, padded=False) if self.memories == 1 else super().new_memory()


def test_a_failed_decision_fails_its_bucket_and_the_next_request_is_served() -> None:
    """The long source is in a bucket of its own, which goes on."""
    engine = bench(make_backend=HalfBroken)
    engine.core.accept([request(1), request(2), request(3, source_tokens=80)])
    ends = outcomes(engine.step())
    assert {number: type(failure(end)) for number, end in ends.items()} == {1: StepFailed, 2: StepFailed}
    engine.core.accept([request(4)])
    ends = engine.finish()
    assert_as_alone(ends[RequestId(4)], request(4))
    assert_as_alone(ends[RequestId(3)], request(3, source_tokens=80))


def test_the_cause_of_a_failure_is_logged_under_its_id(caplog: pytest.LogCaptureFixture) -> None:
    engine = bench(faults=Faults(step={0: RuntimeError("the cause")}))
    engine.core.accept([request(1)])
    error = failure(engine.finish()[RequestId(1)])
    assert isinstance(error, StepFailed)
    assert "the cause" not in str(error)
    (record,) = caplog.records
    assert record.__dict__["error_id"] == error.error_id
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the cause"


class OutOfMemory(TableBackend):
    """Has no memory for its first bucket."""

    failed = False

    def new_memory(self) -> TableMemory:
        if not self.failed:
            self.failed = True
            raise MemoryError
        return super().new_memory()


def test_a_failed_placing_fails_who_runs_and_the_next_request_is_served() -> None:
    engine = bench(make_backend=OutOfMemory)
    engine.core.accept([request(1), request(2)])
    ends = engine.finish()
    assert {number: type(failure(end)) for number, end in ends.items()} == {1: StepFailed, 2: StepFailed}
    engine.core.accept([request(3)])
    assert_as_alone(engine.finish()[RequestId(3)], request(3))


def test_a_search_without_any_result_fails_alone() -> None:
    """All tokens but the end are banned, and the end is too early."""
    rules = table_rules(3, SearchRules(eos=(1,), banned=(0, 2)))
    backend = TableBackend(RandomTable(3), rules)
    core = EngineCore(backend, rules, Capacity(8, 1024), clock=ManualClock(), observer=NullObserver())
    hopeless, fine = request(1, beams=2), replace(request(2), options=SearchOptions(max_new_tokens=3))
    core.accept([hopeless, fine])
    ends = outcomes(run_until_idle(core))
    assert isinstance(failure(ends[RequestId(1)]), StepFailed)
    assert isinstance(ends[RequestId(2)], Completed)


def test_failing_all_leaves_an_engine_that_serves() -> None:
    engine = bench(rows=2)
    engine.core.accept([request(number) for number in range(5)])
    engine.step()
    ends = outcomes(engine.core.fail_all(EngineStopped))
    engine.core.check()
    assert sorted(ends) == [0, 1, 2, 3, 4]
    assert engine.core.idle
    engine.core.accept([request(7)])
    assert_as_alone(engine.finish()[RequestId(7)], request(7))


# -- streaming --------------------------------------------------------------------------------------------------------


def test_a_greedy_stream_tells_every_token_at_once() -> None:
    engine = bench()
    asked = request(1, tokens=6, stream=True)
    engine.core.accept([asked])
    best = alone(asked).hypotheses[0]
    events = [engine.step() for _ in range(6)]
    assert [event.tokens for step in events[:5] for event in step if isinstance(event, Piece)] == [
        (token,) for token in best.tokens[:5]
    ]
    # The last token comes with the result.
    assert list(map(type, events[5])) == [Completed]


@pytest.mark.parametrize("beams", [2, 4, 8])
def test_what_a_beam_stream_has_told_is_how_the_best_hypothesis_begins(beams: int) -> None:
    told_early = 0
    for number in range(30):
        engine = bench()
        options = SearchOptions(beam_size=beams, max_new_tokens=25, early_stopping=EarlyStopping.NEVER)
        asked = GenerationRequest(RequestId(number), (number,), options, stream=True)
        engine.core.accept([asked])
        events: list[Event] = []
        while not engine.core.idle:
            events += engine.step()
        told = pieces(events, number)
        told_early += len(told)
        assert told == alone(asked).hypotheses[0].tokens[: len(told)]
    assert told_early > 0


def test_streaming_changes_nothing_for_others() -> None:
    engine = bench()
    engine.core.accept([request(1, beams=3, stream=True), request(2, beams=3)])
    events: list[Event] = []
    while not engine.core.idle:
        events += engine.step()
    assert pieces(events, 2) == ()
    assert_as_alone(outcomes(events)[RequestId(2)], request(2, beams=3))


# -- telling ----------------------------------------------------------------------------------------------------------


class Notes:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.notes: list[tuple[object, ...]] = []

    def encoded(self, seconds: float, sentences: int, source_tokens: int, padded_tokens: int) -> None:
        self.notes.append(("encoded", seconds, sentences, source_tokens, padded_tokens))

    def stepped(self, seconds: float, rows: int, sentences: int) -> None:
        self.notes.append(("stepped", seconds, rows, sentences))

    def released(self, steps: int) -> None:
        self.notes.append(("released", steps))


def test_the_observer_hears_of_every_encoding_step_and_release() -> None:
    notes = Notes()
    engine = bench(observer=notes)
    engine.core.accept([request(1, tokens=2), request(2, source_tokens=5, tokens=9), request(3, source_tokens=80)])
    engine.step()
    assert notes.notes == [
        ("encoded", 0.0, 3, 88, 3 * 80 - 88),
        ("stepped", 0.0, 3, 3),
    ]
    notes.notes.clear()
    engine.core.cancel([RequestId(2), RequestId(3)])
    engine.step()
    assert notes.notes == [("released", 0), ("released", 0), ("stepped", 0.0, 1, 1)]


def test_a_release_tells_how_many_steps_ended_since_the_caller_gave_up() -> None:
    """Steps here end at 0, 1, 2, … seconds."""
    notes = Notes()
    engine = bench(observer=notes)
    engine.core.accept([request(number, tokens=9, deadline=3.5 if number == 4 else None) for number in range(1, 5)])
    for _ in range(3):
        engine.step()
    notes.notes.clear()
    engine.core.cancel([RequestId(1)], 2.0)
    engine.core.cancel([RequestId(2)], 1.5)
    engine.core.cancel([RequestId(3)], 0.5)
    engine.step()
    engine.step()
    assert [note for note in notes.notes if note[0] == "released"] == [("released", steps) for steps in (0, 1, 2, 0)]


def test_a_result_says_why_it_ended() -> None:
    engine = bench()
    engine.core.accept([request(1, tokens=3)])
    (outcome,) = engine.finish().values()
    assert isinstance(outcome, Completed)
    assert outcome.hypotheses[0].finish is Finish.LENGTH
