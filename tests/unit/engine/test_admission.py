"""What a request costs, that it costs no more, and who starts."""

from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_server.engine.admission import (
    ENCODE_TOGETHER,
    MOST_ROWS,
    WIDTHS,
    Capacity,
    Cost,
    Room,
    check_fits,
    cost,
    encoded_with,
    number_of,
    starters,
)
from beamline_server.engine.errors import RequestTooLarge
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import EngineCore
from doubles.engine import ManualClock, RandomTable, TableBackend, table_rules


def request(
    beam_size: int = 1,
    max_new_tokens: int = 16,
    source_tokens: int = 4,
    *,
    prefix: int = 0,
    number: int = 0,
    min_new_tokens: int = 0,
) -> GenerationRequest:
    options = SearchOptions(beam_size=beam_size, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
    source = (*range(source_tokens - 1), number)
    return GenerationRequest(
        RequestId(number), source, options, target_prefix=(2, 3, 4, 5) * (prefix // 4) + (2,) * (prefix % 4)
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(request(1, 64), Cost(1, 64), id="shared bucket"),
        pytest.param(request(1, 65), Cost(1, 256), id="a token more"),
        pytest.param(request(4, 64), Cost(4, 256), id="every beam counts"),
        pytest.param(request(1, 10, source_tokens=300), Cost(1, 1024), id="a long source"),
        pytest.param(request(16, 4096), Cost(16, 65536), id="the largest of a large model"),
        pytest.param(request(1, 61, prefix=3), Cost(4, 64), id="a prefix"),
        pytest.param(request(1, 61, prefix=4), Cost(5, 256), id="a prefix of a token more"),
        pytest.param(request(8, 10, prefix=3), Cost(8, 256), id="a prefix narrower than the search"),
        pytest.param(request(2, 10, prefix=40), Cost(16, 64), id="a prefix that takes several steps"),
    ],
)
def test_cost_is_rows_and_the_bucket_of_the_worst_case(asked: GenerationRequest, expected: Cost) -> None:
    assert cost(asked) == expected


@given(st.integers(1, WIDTHS[-1]))
def test_a_sequence_belongs_to_the_narrowest_bucket_that_holds_it(width: int) -> None:
    number = number_of(width)
    assert width <= WIDTHS[number]
    assert number == 0 or width > WIDTHS[number - 1]


def test_no_bucket_is_wider_than_the_widest() -> None:
    with pytest.raises(ValueError, match="no bucket"):
        number_of(WIDTHS[-1] + 1)


def test_what_fits_exactly_is_admitted() -> None:
    check_fits(request(4, 64), Capacity(4, 256))


@pytest.mark.parametrize(
    ("asked", "capacity", "error"),
    [
        pytest.param(request(5, 10), Capacity(4, 1 << 20), RequestTooLarge("rows", 5, 4), id="rows"),
        pytest.param(request(prefix=9), Capacity(9, 1 << 20), RequestTooLarge("rows", 10, 9), id="rows of a prefix"),
        pytest.param(request(4, 65), Capacity(4, 1023), RequestTooLarge("cache slots", 1024, 1023), id="slots"),
        pytest.param(
            request(1, 10, source_tokens=65), Capacity(4, 255), RequestTooLarge("cache slots", 256, 255), id="source"
        ),
    ],
)
def test_what_could_never_run_is_refused(asked: GenerationRequest, capacity: Capacity, error: RequestTooLarge) -> None:
    with pytest.raises(RequestTooLarge) as caught:
        check_fits(asked, capacity)
    assert caught.value == error


def test_an_absurdly_large_request_is_refused_like_any_other() -> None:
    """A server without a limit of its own must not fail on arithmetic."""
    with pytest.raises(RequestTooLarge):
        check_fits(request(16, 2**31), Capacity(128, 1 << 20))


@given(
    st.lists(
        st.tuples(st.integers(1, 16), st.integers(1, 70), st.integers(1, 90), st.integers(0, 40), st.integers(0, 6)),
        min_size=1,
        max_size=10,
    ),
    st.integers(0, 2**16),
    st.sampled_from(["cpu", "cuda"]),
)
@settings(max_examples=4 * settings().max_examples // 10)
def test_running_sequences_never_occupy_more_than_they_cost(
    asked: list[tuple[int, int, int, int, int]], seed: int, device: str
) -> None:
    """Batch indices times their width, padding included, over all buckets of a step; and rows."""
    requests = [
        request(beams, new, source, prefix=prefix, number=number, min_new_tokens=new if number % 2 else 0)
        for number, (beams, new, source, prefix, _) in enumerate(asked)
    ]
    rules = table_rules(6)
    backend = TableBackend(RandomTable(6, seed), rules, device=device)
    core = EngineCore(backend, rules, Capacity(48, 8192), clock=ManualClock(), observer=NullObserver())
    of_source = {request.source: cost(request) for request in requests}
    waiting = sorted(zip((at for *_, at in asked), requests, strict=True), key=lambda entry: entry[0])
    now = 0
    while waiting or not core.idle:
        core.accept([request for at, request in waiting if at <= now])
        waiting = [entry for entry in waiting if entry[0] > now]
        before = len(backend.trace)
        core.step()
        core.check()
        buckets = backend.trace[before:]
        costs = [of_source[source] for bucket in buckets for source in bucket.sources]
        occupied = sum(len(bucket.sources) * max(bucket.slots, bucket.source_width) for bucket in buckets)
        assert occupied <= sum(c.slots for c in costs) <= 8192
        # Rows that a prefix has been fed in are given back: others may hold them now.
        assert sum(bucket.rows for bucket in buckets) <= min(sum(c.rows for c in costs), 48)
        now += 1


# -- who starts -------------------------------------------------------------------------------------------------------

requests = st.builds(
    request, st.integers(1, 16), st.integers(1, 200), st.integers(1, 300), prefix=st.sampled_from([0, 0, 0, 3, 20])
)
rooms = st.builds(Room, st.integers(0, 64), st.integers(0, 1 << 15))


def fit(chosen: Sequence[GenerationRequest], room: Room) -> bool:
    costs = [cost(request) for request in chosen]
    return sum(c.rows for c in costs) <= room.rows and sum(c.slots for c in costs) <= room.slots


@given(requests, rooms)
def test_room_that_is_taken_and_given_back_is_what_it_was(asked: GenerationRequest, room: Room) -> None:
    assert 1 <= cost(asked).rows <= MOST_ROWS
    assert room.less(cost(asked)).more(cost(asked)) == room


@given(st.lists(requests, max_size=12), rooms, st.integers(1, 1000))
def test_as_many_start_from_the_head_as_there_is_room_for(
    queue: list[GenerationRequest], room: Room, encode_tokens: int
) -> None:
    starting = starters(deque(queue), room, encode_tokens=encode_tokens)
    count = len(starting)
    assert starting == queue[:count]
    assert fit(starting, room)
    tokens = [len(request.source) for request in queue]
    assert count <= 1 or count * max(tokens[:count]) <= encode_tokens
    if count < len(queue):
        one_more = queue[: count + 1]
        assert not fit(one_more, room) or (count and (count + 1) * max(tokens[: count + 1]) > encode_tokens)


def test_a_wide_request_at_the_head_holds_back_what_came_after_it() -> None:
    queue = [request(16), request(1), request(1)]
    assert starters(queue, Room(15, 1 << 15), encode_tokens=1000) == []


def test_a_source_longer_than_the_bound_starts_alone() -> None:
    queue = [request(source_tokens=300), request()]
    assert starters(queue, Room(8, 1 << 15), encode_tokens=100) == queue[:1]


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
