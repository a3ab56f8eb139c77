"""Callers who hold little find room in a part of the rows that is theirs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import Capacity, Cost, Room, cost
from beamline_server.engine.request import Account, GenerationRequest, Priority, RequestId, SearchOptions
from beamline_server.engine.shares import Shares

CAPACITY = Capacity(64, 1 << 16)
SPARE = 8


def asked(caller: str, beams: int, number: int = 0, priority: Priority = Priority.NORMAL) -> GenerationRequest:
    search = SearchOptions(beam_size=beams, max_new_tokens=4)
    return GenerationRequest(RequestId(number), (1,), search, caller=caller, priority=priority)


def shares_of(*running: GenerationRequest, capacity: Capacity = CAPACITY) -> Shares:
    shares = Shares(capacity)
    for request in running:
        shares.start(request)
    return shares


def room_beside(*running: GenerationRequest, capacity: Capacity = CAPACITY) -> Room:
    room = capacity.whole
    for request in running:
        room = room.less(cost(request))
    return room


def startable(
    running: Sequence[GenerationRequest], *queue: GenerationRequest, capacity: Capacity = CAPACITY
) -> list[GenerationRequest]:
    waiting, room = Counter(request.account for request in queue), room_beside(*running, capacity=capacity)
    return list(shares_of(*running, capacity=capacity).startable(queue, waiting, room))


FULL = [asked("a", 16, number) for number in range(4)]


def test_one_caller_takes_the_capacity_and_no_more() -> None:
    assert startable([], *FULL, asked("a", 16)) == FULL
    assert startable(FULL[:3], *FULL[1:]) == FULL[1:2]
    assert startable(FULL, asked("a", 1)) == []


def test_who_has_nothing_starts_beside_whoever_has_everything() -> None:
    newcomers = [asked("b", 4), asked("c", 1)]
    assert startable(FULL, asked("a", 1), *newcomers, asked("a", 1)) == newcomers


def test_who_holds_little_has_no_more_than_the_spare_part_beside_whoever_has_everything() -> None:
    queue = [asked("b", 3, 1), asked("b", 3, 2), asked("b", 2, 3)]
    assert startable([*FULL, asked("b", 3)], *queue) == [queue[0], queue[2]]


def test_who_holds_few_rows_of_many_slots_holds_no_little() -> None:
    wide = Capacity(64, 8 * 1024)  # the spare part has 1,024 slots
    long_search = SearchOptions(beam_size=1, max_new_tokens=1000)
    running = [replace(asked("a", 1, number), options=long_search) for number in range(8)]
    assert startable(running[:7], running[7], running[0], asked("a", 1), capacity=wide) == [running[7]]
    assert startable(running, asked("a", 1), asked("b", 1), capacity=wide) == [asked("b", 1)]


def test_a_wide_request_is_kept_out_by_nobody_who_has_rows() -> None:
    running = [*FULL[:3], asked("b", 9)]
    wide, narrow = FULL[3], asked("b", 1, 5)
    assert startable(running, narrow) == [narrow]
    assert startable(running, wide, narrow) == []
    assert startable(running, wide, narrow, asked("c", 1)) == [asked("c", 1)]


def test_batch_requests_hold_up_no_others_of_their_own_caller() -> None:
    batch = [asked("a", 16, number, Priority.BATCH) for number in range(5)]
    assert startable([], *batch) == batch[:4]
    assert startable(batch[:4], asked("a", 8), batch[4]) == [asked("a", 8)]
    assert startable(batch[:4], asked("b", 1, priority=Priority.BATCH)) == []


def test_small_workers_have_no_spare_part() -> None:
    four = Capacity(4, 1 << 10)
    assert (four.spare.rows, four.whole.rows) == (0, 4)
    assert startable([asked("a", 3)], asked("a", 1, 1), asked("a", 1, 2), capacity=four) == [asked("a", 1, 1)]


def test_those_behind_are_not_looked_at_when_none_of_them_may_take_more() -> None:
    queue = [asked("a", 1, 1), asked("b", 1, 2), *(asked("a", 1, number) for number in range(3, 1000))]
    rest = iter(queue)
    waiting = Counter(request.account for request in queue)
    assert list(shares_of(*FULL).startable(rest, waiting, room_beside(*FULL))) == [queue[1]]
    assert next(rest) is queue[3]


callers, priorities = st.sampled_from("abc"), st.sampled_from([Priority.NORMAL] * 3 + [Priority.BATCH])
requests = st.builds(asked, callers, st.integers(1, 16), st.integers(0, 99), priorities)


@given(st.lists(requests, max_size=8), st.lists(requests, max_size=12))
def test_nobody_takes_the_spare_part_but_who_holds_little(
    running: list[GenerationRequest], queue: list[GenerationRequest]
) -> None:
    held, total = Counter[Account](), sum(cost(request).rows for request in running)
    for request in running:
        held[request.account] += cost(request).rows
    kept_out = False
    starting = startable(running, *queue)
    chosen = iter(starting)
    expected = next(chosen, None)
    for request in queue:
        rows, own = cost(request).rows, held[request.account]
        little = request.priority is Priority.NORMAL and (own == 0 or own + rows <= SPARE)
        if not little:
            kept_out = kept_out or total + rows > CAPACITY.rows
        if little or not kept_out:
            assert request is expected
            held[request.account] += rows
            total += rows
            expected = next(chosen, None)
    assert expected is None


@given(st.lists(requests, max_size=8))
def test_what_is_taken_is_given_back(running: list[GenerationRequest]) -> None:
    shares = shares_of(*running)
    assert sum(shares.rows.values()) == sum(cost(request).rows for request in running)
    for request in running:
        shares.end(request, cost(request))
    assert shares.rows == {}


@given(st.lists(requests, min_size=1, max_size=8))
def test_a_part_may_be_given_back_before(running: list[GenerationRequest]) -> None:
    shares, part = shares_of(*running), Cost(1, 0)
    for request in running:
        shares.give_back(request, part)
    assert sum(shares.rows.values()) == sum(cost(request).rows - 1 for request in running)
    for request in running:
        shares.end(request, cost(request) - part)
    assert shares.rows == {}
