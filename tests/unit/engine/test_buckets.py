"""Sentences sit by length, and move as they grow; answers know nothing of it."""

from functools import partial

from beamline_server.engine.admission import FINE_LANES_FROM, GRANULE, SHARED_WIDTH
from beamline_server.engine.request import Event, GenerationRequest
from doubles.core import assert_as_alone, bench, outcomes, request, source_of
from doubles.engine import TableBackend


def test_a_long_source_does_not_widen_the_lane_of_short_ones() -> None:
    engine = bench()
    engine.core.accept([request(1), request(2, source_tokens=200), request(3)])
    engine.step()
    short, long = engine.backend.trace
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
    with_grower = [step for step in engine.backend.trace if grower.source in step.sources]
    assert max(step.slots for step in with_grower) > SHARED_WIDTH
    assert {len(step.sources) for step in with_grower if step.slots > SHARED_WIDTH} == {1}
    others = [step.slots for step in engine.backend.trace if grower.source not in step.sources]
    assert max(others) <= SHARED_WIDTH


def test_a_lane_shrinks_when_a_long_sentence_has_left_it() -> None:
    engine = bench(rows=128)
    engine.core.accept([request(0, tokens=40)])
    for _ in range(38):
        engine.step()
    engine.core.accept(request(number, tokens=6) for number in range(1, 41))
    engine.finish()
    widths = [step.slots for step in engine.backend.trace if len(step.sources) > 32]
    assert widths[0] > 32
    assert widths[-1] == GRANULE


def many() -> list[GenerationRequest]:
    """More sentences than there have to be for fine lanes, none of them wider than the shared lane."""
    return [request(number, beams=1 + number % 2, tokens=3 + number % 40) for number in range(1, 71)]


def test_many_sentences_sit_in_lanes_by_length_and_few_together() -> None:
    """As they grow they move from lane to lane, and when most have ended the rest comes together again."""
    engine = bench(rows=128)
    asked = many()
    engine.core.accept(asked)
    ends = engine.finish()
    for each in asked:
        assert_as_alone(ends[each.id], each)
    runs = [(len(step.sources), step.slots) for step in engine.backend.trace]
    assert {16, 32} <= {slots for _, slots in runs}
    assert sum(count for count, _ in runs) == sum(3 + number % 40 for number in range(1, 71)), "a run per token"
    assert len(runs) > engine.clock.now, "a lane is a run: some of the steps, of a second each, have had several"
    first, last = runs[0], runs[-1]
    assert first[0] >= FINE_LANES_FROM
    assert first[1] <= 16
    assert last[0] < FINE_LANES_FROM
    assert last[1] > 32
    # The rest of them, few as they are by then, runs in one lane.
    positions = [step.positions for step in engine.backend.trace if max(step.positions) >= 38]
    assert len(positions) == len({position for each in positions for position in each})


def test_on_a_gpu_many_sit_together_as_well() -> None:
    engine = bench(rows=128, make_backend=partial(TableBackend, device="cuda"))
    asked = many()
    engine.core.accept(asked)
    ends = engine.finish()
    for each in asked:
        assert_as_alone(ends[each.id], each)
    assert len(engine.backend.trace) == engine.clock.now, "one lane in every step"


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
    wide = [step for step in engine.backend.trace if step.slots > SHARED_WIDTH]
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
