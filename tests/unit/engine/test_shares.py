"""The last rows of a worker are for callers who have none, as long as others are about."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import cost
from beamline_server.engine.request import GenerationRequest, Priority, RequestId, SearchOptions
from beamline_server.engine.shares import Shares

ROWS = 64
MOST = 56


def asked(caller: str, beams: int, number: int = 0) -> GenerationRequest:
    return GenerationRequest(RequestId(number), (1,), SearchOptions(beam_size=beams), caller=caller)


def startable(shares: Shares, queue: list[GenerationRequest], now: float = 0.0) -> list[GenerationRequest]:
    return list(shares.startable(queue, now))


def test_who_is_alone_takes_everything() -> None:
    shares, queue = Shares(ROWS), [asked("a", 16)] * 4
    shares.came("a", 0.0)
    assert startable(shares, queue) == queue


def test_who_is_not_alone_leaves_the_last_rows() -> None:
    shares, queue = Shares(ROWS), [asked("a", 16, number) for number in range(4)]
    shares.came("b", 0.0)
    for _ in queue:
        shares.came("a", 1.0)
    assert startable(shares, queue, 1.0) == queue[:3]
    for request in queue[:3]:
        shares.start(request)
    assert startable(shares, [asked("a", 9), asked("b", 16), asked("b", 1), asked("a", 8), asked("a", 1)], 1.0) == [
        asked("b", 16),
        asked("b", 1),
        asked("a", 8),
    ]
    shares.end(queue[0])
    assert startable(shares, queue[3:], 1.0) == queue[3:]


def test_others_are_forgotten_when_they_have_not_come_for_a_while() -> None:
    shares, queue = Shares(ROWS), [asked("a", 16)] * 4
    shares.came("b", 0.0)
    shares.came("a", 0.0)
    assert startable(shares, queue, 9.9) == queue[:3]
    assert startable(shares, queue, 10.0) == queue
    shares.came("b", 20.0)
    shares.came("c", 20.0)
    assert startable(shares, queue, 20.0) == queue[:3]


def test_who_has_nothing_may_always_start() -> None:
    shares, wide = Shares(16), asked("a", 16)
    shares.came("b", 0.0)
    shares.came("a", 0.0)
    assert startable(shares, [wide, wide]) == [wide]


def test_batch_requests_leave_the_last_rows_whoever_asks() -> None:
    shares, running = Shares(ROWS), asked("a", 16)
    for caller in "ab":
        shares.came(caller, 0.0)
    for _ in range(3):
        shares.start(running)
    batch = [replace(asked("c", 8, number), priority=Priority.BATCH) for number in range(2)]
    assert startable(shares, batch) == batch[:1]
    assert startable(Shares(ROWS), [replace(running, priority=Priority.BATCH)]) != []


callers = st.sampled_from("abc")
requests = st.builds(asked, callers, st.integers(1, 16), st.integers(0, 99))


@given(st.lists(requests, max_size=8), st.lists(requests, max_size=12))
def test_nobody_with_rows_comes_to_more_than_its_part(
    running: list[GenerationRequest], queue: list[GenerationRequest]
) -> None:
    shares = Shares(ROWS)
    for request in [*running, *queue]:
        shares.came(request.caller, 0.0)
    for request in running:
        shares.start(request)
    held = {caller: sum(cost(r).rows for r in running if r.caller == caller) for caller in "abc"}
    others = len({request.caller for request in [*running, *queue]}) > 1
    starting = startable(shares, queue)
    chosen = iter(starting)
    expected = next(chosen, None)
    for request in queue:
        rows, own = cost(request).rows, held[request.caller]
        if own == 0 or own + rows <= MOST or not others:
            assert request is expected
            held[request.caller] += rows
            expected = next(chosen, None)
    assert expected is None
    for request in running:
        shares.end(request)
    assert shares.rows == 0
