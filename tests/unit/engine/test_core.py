"""One worker's engine, stepped by hand: everybody gets the answer that they would get alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_server.engine.admission import SHARED_WIDTH, Capacity
from beamline_server.engine.beam import SearchRules
from beamline_server.engine.core import EngineCore
from beamline_server.engine.errors import DeadlineExceeded, EngineStopped, RequestCancelled, StepFailed
from beamline_server.engine.observer import NullObserver, StepObserver
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
from beamline_server.engine.runner import Cache
from beamline_server.engine.scheduler import FINE_LANES_FROM, SEAT_GRANULE
from beamline_server.engine.testing import (
    Faults,
    ManualClock,
    RandomTable,
    TableRunner,
    Tokens,
    run_alone,
    run_until_idle,
    table_rules,
)

RULES = table_rules(8)
TABLE = RandomTable(8)


@dataclass
class Bench:
    """A core with what it stands on. One step takes one second."""

    core: EngineCore
    runner: TableRunner
    clock: ManualClock

    def step(self) -> list[Event]:
        events = self.core.step()
        self.core.check()
        self.clock.advance(1.0)
        return events

    def finish(self) -> dict[RequestId, Completed | Failed]:
        """Step until idle; the outcomes from now on."""
        events: list[Event] = []
        while not self.core.idle:
            events += self.step()
        return outcomes(events)


def bench(
    *,
    rows: int = 64,
    slots: int = 1 << 16,
    encode_tokens: int = 1024,
    faults: Faults | None = None,
    observer: StepObserver | None = None,
    make_runner: Callable[..., TableRunner] = TableRunner,
) -> Bench:
    runner, clock = make_runner(TABLE, RULES, faults=faults), ManualClock()
    core = EngineCore(
        runner,
        RULES,
        Capacity(rows, slots),
        clock=clock,
        observer=observer or NullObserver(),
        encode_tokens=encode_tokens,
    )
    return Bench(core, runner, clock)


def request(
    number: int,
    *,
    beams: int = 1,
    tokens: int = 6,
    source_tokens: int = 3,
    deadline: float | None = None,
    stream: bool = False,
) -> GenerationRequest:
    """A request that generates exactly so many tokens; its source tells it from all others."""
    options = SearchOptions(beam_size=beams, n_best=beams, min_new_tokens=tokens, max_new_tokens=tokens)
    return GenerationRequest(RequestId(number), source_of(number, source_tokens), options, deadline, stream)


def source_of(number: int, length: int) -> Tokens:
    return (*range(length - 1), number)


def outcomes(events: Sequence[Event]) -> dict[RequestId, Completed | Failed]:
    ends = [event for event in events if not isinstance(event, Piece)]
    assert len({end.id for end in ends}) == len(ends), "a request has more than one outcome"
    return {end.id: end for end in ends}


def pieces(events: Sequence[Event], number: int) -> Tokens:
    return tuple(token for e in events if isinstance(e, Piece) and e.id == number for token in e.tokens)


def alone(asked: GenerationRequest) -> Completed:
    outcome = run_alone(TableRunner(TABLE, RULES), RULES, asked)
    assert isinstance(outcome, Completed)
    return outcome


def assert_as_alone(outcome: Completed | Failed, asked: GenerationRequest) -> None:
    assert isinstance(outcome, Completed)
    assert outcome.hypotheses == alone(asked).hypotheses


def failure(outcome: Completed | Failed) -> Exception:
    assert isinstance(outcome, Failed)
    return outcome.error


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


def slots_taken(runner: TableRunner, source: Tokens) -> list[Tokens]:
    return [step.taken[step.sources.index(source)] for step in runner.trace if source in step.sources]


@given(arrivals())
@settings(max_examples=60)
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
        by_itself = TableRunner(TABLE, RULES)
        expected = run_alone(by_itself, RULES, asked)
        assert isinstance(expected, Completed)
        assert outcome.hypotheses == expected.hypotheses
        assert outcome.timing.steps == expected.timing.steps
        assert slots_taken(engine.runner, asked.source) == slots_taken(by_itself, asked.source)
        told = pieces(events, asked.id)
        assert told == outcome.hypotheses[0].tokens[: len(told)]
        assert asked.stream or not told


@given(arrivals())
def test_requests_start_in_the_order_in_which_they_came(traffic: list[Arrival]) -> None:
    engine = bench(rows=20, slots=4096, encode_tokens=60)
    simulate(engine, traffic)
    started = [source[-1] for batch in engine.runner.encoded for source in batch]
    came = [a.request.id for a in sorted(traffic, key=lambda arrival: arrival.at)]
    assert started == [number for number in came if number in set(started)]


# -- coming and going -------------------------------------------------------------------------------------------------


def test_an_empty_engine_is_idle() -> None:
    engine = bench()
    assert engine.core.idle
    assert engine.step() == []
    assert engine.runner.trace == []
    assert engine.core.last_step_at is None


def test_a_newcomer_joins_at_the_next_step() -> None:
    engine = bench()
    engine.core.accept([request(1)])
    engine.step()
    engine.core.accept([request(2)])
    engine.step()
    assert engine.runner.trace[-1].sources == (source_of(1, 3), source_of(2, 3))
    assert engine.runner.trace[-1].positions == (1, 0)


def test_a_finished_sentence_leaves_at_its_step_and_a_newcomer_takes_its_seat() -> None:
    engine = bench(rows=2)
    engine.core.accept([request(1, tokens=1), request(2, tokens=5), request(3)])
    assert list(outcomes(engine.step())) == [1]
    engine.step()
    assert engine.runner.trace[-1].sources == (source_of(3, 3), source_of(2, 3))


def test_rows_are_packed_whatever_the_widths() -> None:
    """A wide request costs its rows, its greedy neighbour one."""
    engine = bench()
    engine.core.accept([request(1, beams=16), request(2)])
    engine.step()
    assert engine.runner.trace[-1].rows == 2
    engine.step()
    # Seven tokens but the end follow the first: the beams of the second step.
    assert engine.runner.trace[-1].rows == 7 + 1
    engine.step()
    assert engine.runner.trace[-1].rows == 16 + 1


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
    assert [len(batch) for batch in engine.runner.encoded] == [2, 2, 1]


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
    assert engine.runner.trace[-1].sources == (source_of(2, 3),)


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
    assert engine.runner.trace[-1].sources == (source_of(2, 3),)


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
    assert engine.runner.encoded == []


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


def test_a_failed_step_fails_its_lane_and_the_next_request_is_served() -> None:
    """The long source sits in a lane of its own, which goes on."""
    engine = bench(faults=Faults(step={2: RuntimeError("no")}))
    engine.core.accept([request(1), request(2, beams=3), request(3, source_tokens=80)])
    engine.step()
    ends = outcomes(engine.step())
    assert {number: type(failure(end)) for number, end in ends.items()} == {1: StepFailed, 2: StepFailed}
    engine.core.accept([request(4, beams=2)])
    ends = engine.finish()
    assert_as_alone(ends[RequestId(3)], request(3, source_tokens=80))
    assert_as_alone(ends[RequestId(4)], request(4, beams=2))


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


class OutOfMemory(TableRunner):
    """Has no memory for its first cache."""

    failed = False

    def new_cache(self) -> Cache:
        if not self.failed:
            self.failed = True
            raise MemoryError
        return super().new_cache()


def test_a_failed_seating_fails_who_runs_and_the_next_request_is_served() -> None:
    engine = bench(make_runner=OutOfMemory)
    engine.core.accept([request(1), request(2)])
    ends = engine.finish()
    assert {number: type(failure(end)) for number, end in ends.items()} == {1: StepFailed, 2: StepFailed}
    engine.core.accept([request(3)])
    assert_as_alone(engine.finish()[RequestId(3)], request(3))


def test_a_search_without_any_result_fails_alone() -> None:
    """All tokens but the end are banned, and the end is too early."""
    rules = table_rules(3, SearchRules(eos=(1,), banned=(0, 2)))
    runner = TableRunner(RandomTable(3), rules)
    core = EngineCore(runner, rules, Capacity(8, 1024), clock=ManualClock(), observer=NullObserver())
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


# -- lanes ------------------------------------------------------------------------------------------------------------


def test_a_long_source_does_not_widen_the_lane_of_short_ones() -> None:
    engine = bench()
    engine.core.accept([request(1), request(2, source_tokens=200), request(3)])
    engine.step()
    short, long = engine.runner.trace
    assert (short.sources, short.source_width) == ((source_of(1, 3), source_of(3, 3)), 8)
    assert (long.sources, long.source_width) == ((source_of(2, 200),), 200)


def test_a_sentence_that_grows_moves_to_a_wider_lane() -> None:
    """The short ones that come and go meanwhile keep their narrow seats, and all get what they would get alone."""
    engine = bench()
    grower = request(0, beams=2, tokens=90)
    short = [request(number, beams=3, tokens=7) for number in range(1, 31)]
    engine.core.accept([grower])
    events: list[Event] = []
    for asked in short:
        engine.core.accept([asked])
        events += [event for _ in range(3) for event in engine.step()]
    ends = outcomes(events) | engine.finish()
    for asked in [grower, *short]:
        assert_as_alone(ends[asked.id], asked)
    with_grower = [step for step in engine.runner.trace if grower.source in step.sources]
    assert max(step.slots for step in with_grower) > SHARED_WIDTH
    assert {len(step.sources) for step in with_grower if step.slots > SHARED_WIDTH} == {1}
    others = [step.slots for step in engine.runner.trace if grower.source not in step.sources]
    assert max(others) <= SHARED_WIDTH


def test_a_lane_shrinks_when_a_long_sentence_has_left_it() -> None:
    engine = bench(rows=128)
    engine.core.accept([request(0, tokens=40)])
    for _ in range(38):
        engine.step()
    engine.core.accept(request(number, tokens=6) for number in range(1, 41))
    engine.finish()
    widths = [step.slots for step in engine.runner.trace if len(step.sources) > 32]
    assert widths[0] > 32
    assert widths[-1] == SEAT_GRANULE


def test_many_sentences_sit_in_lanes_by_length_and_few_together() -> None:
    """As they grow they move from lane to lane, and when most have ended the rest comes together again."""
    engine = bench(rows=128)
    asked = [request(number, beams=1 + number % 2, tokens=3 + number % 40) for number in range(1, 71)]
    engine.core.accept(asked)
    ends = engine.finish()
    for each in asked:
        assert_as_alone(ends[each.id], each)
    runs = [(len(step.sources), step.slots) for step in engine.runner.trace]
    assert {16, 32} <= {slots for _, slots in runs}
    assert sum(count for count, _ in runs) == sum(3 + number % 40 for number in range(1, 71)), "a run per token"
    first, last = runs[0], runs[-1]
    assert first[0] >= FINE_LANES_FROM
    assert first[1] <= 16
    assert last[0] < FINE_LANES_FROM
    assert last[1] > 32
    # The rest of them, few as they are by then, runs in one lane.
    positions = [step.positions for step in engine.runner.trace if max(step.positions) >= 38]
    assert len(positions) == len({position for each in positions for position in each})


def test_a_sentence_moves_although_nobody_comes_or_goes() -> None:
    engine = bench()
    first, second = request(1, tokens=100), request(2, tokens=100)
    engine.core.accept([first])
    for _ in range(40):
        engine.step()
    engine.core.accept([second])
    ends = engine.finish()
    assert_as_alone(ends[first.id], first)
    assert_as_alone(ends[second.id], second)
    wide = [step for step in engine.runner.trace if step.slots > SHARED_WIDTH]
    # One after the other, each as soon as it needs to and not before.
    assert [step.positions for step in wide] == [(position,) for position in (*range(64, 100), *range(64, 100))]


def test_several_sentences_change_lanes_at_once() -> None:
    """Those that move, those that stay and those that come are seated in one step, from wide lanes to narrow ones."""
    engine = bench(rows=40)
    movers = [request(number, beams=1 + number % 2, tokens=80) for number in range(4)]
    stayers = [request(number, tokens=90, source_tokens=30) for number in range(4, 8)]
    engine.core.accept([movers[0], stayers[0], movers[1], stayers[1], stayers[2], movers[2], movers[3], stayers[3]])
    events: list[Event] = []
    others = [request(number, beams=2, tokens=number % 5 + 1) for number in range(10, 90)]
    for asked in others:
        engine.core.accept([asked])
        events += engine.step()
    ends = outcomes(events) | engine.finish()
    for asked in [*movers, *stayers, *others]:
        assert_as_alone(ends[asked.id], asked)


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


def test_a_result_says_why_it_ended() -> None:
    engine = bench()
    engine.core.accept([request(1, tokens=3)])
    (outcome,) = engine.finish().values()
    assert isinstance(outcome, Completed)
    assert outcome.hypotheses[0].finish is Finish.LENGTH
