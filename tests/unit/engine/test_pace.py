"""What a worker learns of its own pace, and what follows from it for a newcomer."""

import pytest

from beamline_server.engine.pace import Pace
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions


def asked(tokens: int, *, beams: int = 4, least: int = 0, most: int = 128) -> GenerationRequest:
    options = SearchOptions(beam_size=beams, min_new_tokens=least, max_new_tokens=most)
    return GenerationRequest(RequestId(1), (5,) * tokens, options)


def test_who_knows_nothing_expects_no_wait() -> None:
    pace = Pace()
    assert pace.wait_s(1e9) == 0
    assert pace.service_s(asked(10)) == 0


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.001), (128, 0.02), (1024, 1.5)])
def test_a_steady_pace_is_told_as_it_is(rows: int, seconds: float) -> None:
    pace = Pace()
    for _ in range(20):
        pace.stepped(rows, seconds)
    assert pace.row_steps_per_s == pytest.approx(rows / seconds)
    assert pace.step_s == pytest.approx(seconds)
    assert pace.wait_s(10 * rows) == pytest.approx(10 * seconds)


def test_a_change_is_followed_within_seconds_of_work() -> None:
    pace = Pace()
    for _ in range(1000):
        pace.stepped(100, 0.01)
    for _ in range(100):
        pace.stepped(100, 0.1)
    assert pace.step_s == pytest.approx(0.1, rel=0.1)


def test_answers_are_expected_to_be_as_long_for_their_sources_as_others_were() -> None:
    pace = Pace()
    for _ in range(500):
        pace.answered(asked(10, beams=2), steps=20)
    assert pace.steps(asked(10)) == pytest.approx(20)
    assert pace.steps(asked(30)) == pytest.approx(60)
    assert pace.work(asked(10, beams=3)) == pytest.approx(60)
    assert pace.steps_per_answer == pytest.approx(20)
    assert pace.work_per_answer == pytest.approx(40)


def test_no_answer_is_expected_to_be_shorter_or_longer_than_it_may_be() -> None:
    pace = Pace()
    pace.answered(asked(10, beams=2), steps=20)
    assert pace.steps(asked(10, least=50)) == 50
    assert pace.steps(asked(10, most=7)) == 7
    assert Pace().steps(asked(10)) == 1
