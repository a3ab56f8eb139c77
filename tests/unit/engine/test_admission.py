"""What a request costs, and that it costs no more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_server.engine.admission import LANE_WIDTHS, Capacity, Cost, check_fits, cost, lane_of
from beamline_server.engine.errors import RequestTooLarge
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import EngineCore
from doubles.engine import ManualClock, RandomTable, TableBackend, table_rules


def request(
    beam_size: int, max_new_tokens: int, source_tokens: int = 4, *, number: int = 0, min_new_tokens: int = 0
) -> GenerationRequest:
    options = SearchOptions(beam_size=beam_size, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
    return GenerationRequest(RequestId(number), (number, *range(source_tokens - 1)), options)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(request(1, 64), Cost(1, 64), id="narrowest lane"),
        pytest.param(request(1, 65), Cost(1, 256), id="a token more"),
        pytest.param(request(4, 64), Cost(4, 256), id="every beam counts"),
        pytest.param(request(1, 10, source_tokens=300), Cost(1, 1024), id="a long source"),
        pytest.param(request(16, 4096), Cost(16, 65536), id="the largest of a large model"),
    ],
)
def test_cost_is_rows_and_the_lane_of_the_worst_case(asked: GenerationRequest, expected: Cost) -> None:
    assert cost(asked) == expected


@given(st.integers(1, LANE_WIDTHS[-1]))
def test_a_sentence_belongs_to_the_narrowest_lane_that_holds_it(width: int) -> None:
    lane = lane_of(width)
    assert width <= LANE_WIDTHS[lane]
    assert lane == 0 or width > LANE_WIDTHS[lane - 1]


def test_what_fits_exactly_is_admitted() -> None:
    check_fits(request(4, 64), Capacity(4, 256))


@pytest.mark.parametrize(
    ("asked", "capacity", "error"),
    [
        pytest.param(request(5, 10), Capacity(4, 1 << 20), RequestTooLarge("rows", 5, 4), id="rows"),
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
        st.tuples(st.integers(1, 16), st.integers(1, 70), st.integers(1, 90), st.integers(0, 6)),
        min_size=1,
        max_size=10,
    ),
    st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_running_sentences_never_occupy_more_than_they_cost(asked: list[tuple[int, int, int, int]], seed: int) -> None:
    """Seats times their width, padding included, over all lanes of a step; and rows."""
    requests = [
        request(beams, new, source, number=number, min_new_tokens=new if number % 2 else 0)
        for number, (beams, new, source, _) in enumerate(asked)
    ]
    rules = table_rules(6)
    backend = TableBackend(RandomTable(6, seed), rules)
    core = EngineCore(backend, rules, Capacity(48, 8192), clock=ManualClock(), observer=NullObserver())
    of_source = {request.source: cost(request) for request in requests}
    waiting = sorted(zip((at for *_, at in asked), requests, strict=True), key=lambda entry: entry[0])
    now = 0
    while waiting or not core.idle:
        core.accept([request for at, request in waiting if at <= now])
        waiting = [entry for entry in waiting if entry[0] > now]
        lanes_before = len(backend.trace)
        core.step()
        core.check()
        lanes = backend.trace[lanes_before:]
        costs = [of_source[source] for lane in lanes for source in lane.sources]
        assert sum(len(lane.sources) * max(lane.slots, lane.source_width) for lane in lanes) <= sum(
            c.slots for c in costs
        )
        assert sum(lane.rows for lane in lanes) <= sum(c.rows for c in costs) <= 48
        assert sum(c.slots for c in costs) <= 8192
        now += 1
