"""Who starts, who sits where, how wide seats are."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import (
    ENCODE_TOGETHER,
    FINE_LANES_FROM,
    GRANULE,
    LANE_WIDTHS,
    SHARED_WIDTH,
    Room,
    cost,
    encoded_with,
    least_loaded,
    narrowest_lane,
    round_up,
    seat_width,
    seats,
    slot_granule,
    starters,
)
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions


def request(beam_size: int = 1, *, max_new_tokens: int = 16, source_tokens: int = 4) -> GenerationRequest:
    options = SearchOptions(beam_size=beam_size, max_new_tokens=max_new_tokens)
    return GenerationRequest(RequestId(0), (7,) * source_tokens, options)


requests = st.builds(request, st.integers(1, 16), max_new_tokens=st.integers(1, 200), source_tokens=st.integers(1, 300))
rooms = st.builds(Room, st.integers(0, 32), st.integers(0, 64), st.integers(0, 1 << 15))


def fit(chosen: Sequence[GenerationRequest], room: Room) -> bool:
    costs = [cost(request) for request in chosen]
    return (
        len(chosen) <= room.places
        and sum(c.rows for c in costs) <= room.rows
        and sum(c.slots for c in costs) <= room.slots
    )


@given(st.lists(requests, max_size=12), rooms, st.integers(1, 1000))
def test_as_many_start_from_the_head_as_there_is_room_for(
    queue: list[GenerationRequest], room: Room, encode_tokens: int
) -> None:
    count = starters(deque(queue), room, encode_tokens=encode_tokens)
    assert fit(queue[:count], room)
    tokens = [len(request.source) for request in queue]
    assert count <= 1 or count * max(tokens[:count]) <= encode_tokens
    if count < len(queue):
        one_more = queue[: count + 1]
        assert not fit(one_more, room) or (count and (count + 1) * max(tokens[: count + 1]) > encode_tokens)


def test_a_wide_request_at_the_head_holds_back_what_came_after_it() -> None:
    queue = [request(16), request(1), request(1)]
    assert starters(queue, Room(8, 15, 1 << 15), encode_tokens=1000) == 0


def test_a_source_longer_than_the_bound_starts_alone() -> None:
    queue = [request(source_tokens=300), request()]
    assert starters(queue, Room(8, 8, 1 << 15), encode_tokens=100) == 1


@dataclass(frozen=True)
class Seating:
    """Who sat, who stays, who comes."""

    old: list[int]
    staying: list[int]
    arriving: list[int]


@st.composite
def seatings(draw: st.DrawFn) -> Seating:
    people = draw(st.permutations(range(30)))
    count = draw(st.integers(0, 12))
    old = people[:count]
    stays = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    staying = [who for who, yes in zip(old, stays, strict=True) if yes]
    # Who has left may come back at once: a place is taken again.
    arriving = draw(st.lists(st.sampled_from([p for p in people if p not in staying]), unique=True, max_size=8))
    return Seating(old, staying, arriving)


@given(seatings())
def test_everybody_has_one_seat_and_there_are_no_gaps(seating: Seating) -> None:
    result = seats(seating.old, seating.staying, seating.arriving)
    assert sorted(result) == sorted([*seating.staying, *seating.arriving])


@given(seatings())
def test_who_stays_keeps_the_seat_unless_it_would_be_beyond_the_end(seating: Seating) -> None:
    result = seats(seating.old, seating.staying, seating.arriving)
    for who in seating.staying:
        before, after = seating.old.index(who), result.index(who)
        # A mover comes from beyond the end: no seat is taken before its sentence has moved, and nobody moves in vain.
        assert after == before or before >= len(result)


@given(seatings())
def test_who_comes_takes_seats_in_order(seating: Seating) -> None:
    result = seats(seating.old, seating.staying, seating.arriving)
    taken = [result.index(who) for who in seating.arriving]
    assert taken == sorted(taken)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.lists(st.integers(1, 60), max_size=20),
    st.sampled_from([50, 200, 1024]),
)
def test_who_is_encoded_ahead_makes_a_call_fuller_but_not_wasteful(
    starting: list[int], following: list[int], encode_tokens: int
) -> None:
    queue = [request(source_tokens=tokens) for tokens in following]
    ahead = encoded_with([request(source_tokens=tokens) for tokens in starting], queue, encode_tokens=encode_tokens)
    assert ahead == queue[: len(ahead)]
    assert not ahead or len(starting) + len(ahead) <= ENCODE_TOGETHER
    for count in range(1, len(ahead) + 1):
        lengths = [*starting, *following[:count]]
        assert len(lengths) * max(lengths) <= min(encode_tokens, 2 * sum(lengths))
    if len(starting) + len(ahead) < ENCODE_TOGETHER and len(ahead) < len(queue):
        lengths = [*starting, *following[: len(ahead) + 1]]
        assert len(lengths) * max(lengths) > min(encode_tokens, 2 * sum(lengths))


granules = st.integers(1, 8).map(lambda granules: granules * GRANULE)


@given(st.integers(0, 3000), st.integers(0, 3000), granules)
def test_seats_hold_what_is_needed_with_less_than_a_quarter_of_it_idle(needed: int, present: int, granule: int) -> None:
    """But for less than a granule."""
    present = round_up(present)
    width = seat_width(needed, present, granule)
    assert width >= round_up(needed)
    assert width % GRANULE == 0
    assert 3 * width < 4 * round_up(needed, granule) or width == round_up(needed, granule)
    if width != present:
        assert width - max(needed, 1) < granule


@given(st.integers(1, 3000), st.floats(0.76, 1), granules)
def test_seats_do_not_change_while_they_fit(needed: int, part: float, granule: int) -> None:
    """A lane whose need goes up and down by less than a quarter keeps its width: every change copies the lane."""
    width = seat_width(needed, 0, granule)
    assert seat_width(math.ceil(part * width), width, granule) == width


def test_seats_grow_by_granules_and_shrink_when_a_quarter_is_idle() -> None:
    assert seat_width(1, 0) == 8
    assert seat_width(9, 8) == 16
    assert seat_width(49, 64) == 64
    assert seat_width(48, 64) == 48
    assert seat_width(65, 64, 64) == 128


def test_few_seats_have_slots_enough_for_most_sentences_at_once() -> None:
    """One sentence alone is seated once, and not again every few tokens; many have next to nothing too many."""
    assert [slot_granule(seats) for seats in (1, 2, 3, 4, 8, 16, 32, 200)] == [64, 64, 32, 32, 16, 8, 8, 8]


@given(st.integers(1, 200), st.data())
def test_no_seat_is_wider_than_its_lane(seats: int, data: st.DataObject) -> None:
    """Admission counts a lane's width per sentence."""
    lane = data.draw(st.integers(narrowest_lane(seats, "cpu"), 8))
    needed = data.draw(st.integers(1, LANE_WIDTHS[lane]))
    assert seat_width(needed, 0, slot_granule(seats)) <= LANE_WIDTHS[lane]


def test_few_sentences_share_a_lane_and_many_sit_by_length() -> None:
    """However few slots they need, a handful of sentences costs one run and not several."""
    assert LANE_WIDTHS[narrowest_lane(1, "cpu")] == SHARED_WIDTH
    assert LANE_WIDTHS[narrowest_lane(FINE_LANES_FROM - 1, "cpu")] == SHARED_WIDTH
    assert narrowest_lane(FINE_LANES_FROM, "cpu") == 0
    assert LANE_WIDTHS[narrowest_lane(FINE_LANES_FROM, "cuda")] == SHARED_WIDTH


def test_the_least_loaded_worker_is_the_first_of_equals() -> None:
    assert least_loaded([3, 1, 1]) == 1
    assert least_loaded([0]) == 0
