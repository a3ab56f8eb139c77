"""Who holds how much: nothing is lost, and what is expected follows from it."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import cost
from beamline_server.engine.errors import QueueFull, WouldBeLate
from beamline_server.engine.ledger import Ledger
from beamline_server.engine.pace import Pace
from beamline_server.engine.request import GenerationRequest, Priority, RequestId, SearchOptions


def asked(number: int, beams: int, caller: str = "", deadline: float | None = None) -> GenerationRequest:
    options = SearchOptions(beam_size=beams, min_new_tokens=2, max_new_tokens=2)
    return GenerationRequest(RequestId(number), (5, 6), options, deadline, caller=caller)


def known_pace() -> Pace:
    """A row-step takes a second, and so does a step."""
    pace = Pace()
    for _ in range(50):
        pace.stepped(1, 1.0)
    return pace


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 2), st.sampled_from("abc")), max_size=20), st.randoms())
def test_what_is_held_is_what_its_requests_hold_and_nothing_when_they_have_ended(
    coming: list[tuple[int, int, str]], order: random.Random
) -> None:
    ledger = Ledger([Pace() for _ in range(3)], 16, 64, 0.0)
    open_requests: dict[RequestId, tuple[GenerationRequest, int]] = {}
    for number, (beams, worker, caller) in enumerate(coming):
        request = asked(number, beams, caller)
        ledger.hold(request, worker)
        open_requests[request.id] = (request, worker)
    leaving = list(open_requests)
    order.shuffle(leaving)
    for number in leaving:
        for worker in range(3):
            mine = [cost(request).rows for request, of in open_requests.values() if of == worker]
            assert ledger.rows_of(worker) == sum(mine)
        assert ledger.worker_of(number) == open_requests.pop(number)[1]
        assert ledger.let_go(number)
        assert not ledger.let_go(number)
    ledger.check()


def test_a_prefix_is_held_as_the_beams_behind_it() -> None:
    """Its rows come back when it has been fed: long prompts are no reason to refuse so many others."""
    ledger = Ledger([Pace()], 16, 48, 0.0)
    for number in range(64):
        assert ledger.full("", 1, 1, 0.0) is None
        ledger.hold(replace(asked(number, 1), target_prefix=(7,) * 40), 0)
    assert ledger.rows_of(0) == 64
    assert ledger.full("", 1, 1, 0.0) is not None


def test_who_expects_to_wait_for_nothing_is_in_time_however_little_is_left() -> None:
    ledger = Ledger([known_pace()], 4, 16, 0.0)
    assert ledger.foreseen(0, "", -1.0, 0, 0.0) is None


@pytest.mark.parametrize(("deadline", "late"), [(10.5, True), (10.7, False)])
def test_being_late_follows_from_what_is_queued_and_from_what_it_takes(deadline: float, late: bool) -> None:
    """Eight row-steps are queued with its own, it takes two steps, and the margin is 0.6 s."""
    ledger = Ledger([known_pace()], 4, 16, 0.0)
    ledger.hold(asked(1, 4), 0)
    newcomer = asked(2, 4, deadline=deadline)
    ledger.hold(newcomer, 0)
    assert isinstance(ledger.late([newcomer], 0.0), WouldBeLate) == late


def test_a_share_of_the_room_is_kept_for_those_who_have_less_than_theirs() -> None:
    ledger = Ledger([Pace()], 4, 16, 0.0)
    for number in range(5):
        ledger.hold(asked(number, 4, "greedy"), 0)
    assert isinstance(ledger.full("greedy", 1, 1, 0.0), QueueFull)
    assert ledger.full("polite", 10, 1, 0.0) is None
    assert isinstance(ledger.full("polite", 11, 1, 0.0), QueueFull)


def test_what_others_go_before_finds_room_in_half_of_the_queue() -> None:
    ledger = Ledger([Pace()], 4, 16, 0.0)
    for number in range(3):
        ledger.hold(replace(asked(number, 4, "a"), priority=Priority.BATCH), 0)
    assert isinstance(ledger.full("a", 1, 1, 0.0, Priority.BATCH), QueueFull)
    assert ledger.full("a", 8, 1, 0.0, Priority.NORMAL) is None
    for number in range(3):
        ledger.let_go(RequestId(number))
    ledger.check()


def test_nobody_waits_for_what_it_goes_before() -> None:
    """Twelve row-steps of batch priority are queued, behind which a batch request waits."""
    ledger = Ledger([known_pace()], 4, 64, 0.0)
    for number in range(4):
        ledger.hold(replace(asked(number, 4, "a"), priority=Priority.BATCH), 0)
    normal, batch = asked(8, 1, "b", deadline=5.0), replace(asked(9, 1, "b", deadline=5.0), priority=Priority.BATCH)
    assert ledger.foreseen(0, "b", 4.0, 0, 0.0) is None
    ledger.hold(normal, 0)
    assert ledger.late([normal], 0.0) is None
    ledger.hold(batch, 0)
    assert isinstance(ledger.late([batch], 0.0), WouldBeLate)
