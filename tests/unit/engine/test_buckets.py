"""Which sequences run together, and where; answers know nothing of it."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import SHARED_WIDTH, WIDTHS
from beamline_server.engine.backend import Encoded
from beamline_server.engine.ort.cuda.buckets import FromBatch, FromEncoder, arranged, resized
from beamline_server.engine.ort.cuda.shapes import LEAST_SLOTS, LEAST_SOURCE_WIDTH
from beamline_server.engine.request import Event
from doubles.core import assert_as_alone, bench, outcomes, request, source_of
from doubles.engine import RandomTable, TableBackend, table_rules
from doubles.memory import BrokenContract

# -- where each stands ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrangement:
    """Who stood where, None where somebody has left; who stays, who comes."""

    old: list[int | None]
    staying: list[int]
    arriving: list[int]


@st.composite
def arrangements(draw: st.DrawFn) -> Arrangement:
    people = draw(st.permutations(range(30)))
    count = draw(st.integers(0, 12))
    before, strangers = people[:count], people[count:]
    what = draw(st.lists(st.sampled_from(["stays", "moves", "leaves"]), min_size=count, max_size=count))
    staying = [who for who, does in zip(before, what, strict=True) if does == "stays"]
    old = [None if does == "leaves" else who for who, does in zip(before, what, strict=True)]
    # Who has left may come back at once: an index of the table is taken again.
    left = [who for who, does in zip(before, what, strict=True) if does == "leaves"]
    arriving = draw(st.lists(st.sampled_from([*strangers, *left]), unique=True, max_size=8))
    return Arrangement(old, staying, arriving)


@given(arrangements())
def test_everybody_has_one_batch_index_and_there_are_no_gaps(case: Arrangement) -> None:
    result = arranged(case.old, [*case.staying, *case.arriving])
    assert sorted(result) == sorted([*case.staying, *case.arriving])


@given(arrangements())
def test_who_stays_keeps_the_batch_index_unless_it_would_be_beyond_the_end(case: Arrangement) -> None:
    result = arranged(case.old, [*case.staying, *case.arriving])
    for who in case.staying:
        before, after = case.old.index(who), result.index(who)
        # A mover comes from beyond the end: no place is taken before its sequence has moved, and nobody moves in vain.
        assert after == before or before >= len(result)


@given(arrangements())
def test_who_comes_takes_free_places_in_order(case: Arrangement) -> None:
    result = arranged(case.old, [*case.staying, *case.arriving])
    taken = [result.index(who) for who in case.arriving]
    assert taken == sorted(taken)


# -- how wide a bucket is ---------------------------------------------------------------------------------------------

lengths = st.integers(0, 7).map(lambda power: LEAST_SLOTS * 2**power)


@given(st.integers(1, 3000), lengths)
def test_batch_indices_hold_what_is_needed_and_less_than_four_times_as_much(needed: int, present: int) -> None:
    """But for the least that they ever have."""
    length = resized(present, needed, LEAST_SLOTS)
    assert needed <= length < max(4 * needed, 2 * LEAST_SLOTS)
    assert (length // LEAST_SLOTS).bit_count() == 1
    assert length % LEAST_SLOTS == 0


@given(st.integers(1, 3000), st.floats(0.51, 1))
def test_batch_indices_do_not_change_while_they_fit(needed: int, part: float) -> None:
    """A bucket whose need goes up and down keeps its length: every change copies it."""
    length = resized(0, needed, LEAST_SLOTS)
    assert resized(length, math.ceil(part * needed), LEAST_SLOTS) == length


def test_batch_indices_double_and_shrink_when_a_quarter_would_do() -> None:
    found = [resized(present, needed, 32) for present, needed in ((0, 1), (32, 33), (128, 33), (128, 32), (1024, 40))]
    assert found == [32, 64, 128, 32, 64]


@given(st.sampled_from(WIDTHS[:8]), st.data())
def test_no_batch_index_is_longer_than_its_bucket(width: int, data: st.DataObject) -> None:
    """Admission counts a bucket's width per sequence."""
    assert resized(0, data.draw(st.integers(1, width)), LEAST_SLOTS) <= width


# -- who runs together ------------------------------------------------------------------------------------------------


def test_a_long_source_does_not_widen_the_bucket_of_short_ones() -> None:
    engine = bench()
    engine.core.accept([request(1), request(2, source_tokens=200), request(3)])
    engine.step()
    short, long = engine.backend.trace
    assert (short.sources, short.source_width) == ((source_of(1, 3), source_of(3, 3)), LEAST_SOURCE_WIDTH)
    assert (long.sources, long.source_width) == ((source_of(2, 200),), 256)


def test_a_sequence_that_grows_moves_to_a_wider_bucket() -> None:
    """The short ones that come and go meanwhile keep their narrow bucket, and all get what they would get alone."""
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


def test_a_bucket_shrinks_when_a_long_sequence_has_left_it() -> None:
    engine = bench(rows=128)
    engine.core.accept([request(0, tokens=40)])
    for _ in range(38):
        engine.step()
    engine.core.accept(request(number, tokens=6) for number in range(1, 41))
    engine.finish()
    slots = [step.slots for step in engine.backend.trace if len(step.sources) > 32]
    assert slots[0] > LEAST_SLOTS
    assert slots[-1] == LEAST_SLOTS


def test_many_that_fit_run_together() -> None:
    engine = bench(rows=128)
    asked = [request(number, beams=1 + number % 2, tokens=3 + number % 40) for number in range(1, 71)]
    engine.core.accept(asked)
    ends = engine.finish()
    for each in asked:
        assert_as_alone(ends[each.id], each)
    assert len(engine.backend.trace) == engine.clock.now, "one bucket in every step"


def test_a_sequence_moves_although_nobody_comes_or_goes() -> None:
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


def test_several_sequences_change_buckets_at_once() -> None:
    """Who moves, who stays and who comes is arranged in one step, from wide buckets to narrow ones."""
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


def test_answers_do_not_depend_on_how_arrays_are_padded() -> None:
    asked = [
        request(number, beams=1 + number % 16, tokens=1 + number % 9, source_tokens=1 + number) for number in range(20)
    ]
    engine = bench(rows=128, make_backend=partial(TableBackend, device="cuda"))
    engine.core.accept(asked)
    ends = engine.finish()
    for each in asked:
        assert_as_alone(ends[each.id], each)


# -- what the double sees ---------------------------------------------------------------------------------------------


def test_a_memory_says_what_breaks_its_contract() -> None:
    """The tests of this folder rest on it."""
    rules = table_rules(8)
    memory = TableBackend(RandomTable(8), rules).new_memory()
    with pytest.raises(BrokenContract, match="does not fit"):
        memory.arrange([FromEncoder(Encoded(((1, 2, 3),), 0), 0)], slots=8, source_width=2)
    memory.arrange([FromEncoder(Encoded(((1, 2, 3), (4,)), 0), number) for number in (0, 1)], slots=8, source_width=8)
    with pytest.raises(BrokenContract, match="taken twice"):
        memory.arrange([FromBatch(0), FromBatch(0)], slots=8, source_width=8)
    with pytest.raises(BrokenContract, match="filled before"):
        memory.arrange([FromBatch(1), FromBatch(0)], slots=8, source_width=8)
    with pytest.raises(BrokenContract, match="which is this one"):
        memory.arrange([FromBatch(0, memory)], slots=8, source_width=8)
