"""When wait_ready asks again, on a clock that the test holds."""

import pytest

from beamline_client import BeamlineError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from beamline_client.readiness import ReadinessWait

WAIT = ReadinessWait(target="host:1", started_s=100.0, timeout_s=10.0)


def test_pauses_double_up_to_a_second() -> None:
    pauses = [WAIT.pause_s(Unavailable("loading"), attempt=attempt, now_s=100.0) for attempt in (0, 1, 2, 3, 4, 5000)]

    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_time_left_never_falls_below_zero() -> None:
    assert WAIT.remaining_s(103.0) == 7.0
    assert WAIT.remaining_s(200.0) == 0.0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unavailable("loading"), "loading"),
        (Overloaded("full"), "full"),
        (DeadlineExceeded("x"), "nothing answers there"),
    ],
)
def test_no_time_left_is_unavailable(error: BeamlineError, reason: str) -> None:
    with pytest.raises(Unavailable, match=f"host:1 did not become ready within 10 s: {reason}"):
        WAIT.pause_s(error, attempt=0, now_s=109.95)


def test_other_errors_are_raised_as_they_are() -> None:
    error = InvalidRequest("no")

    with pytest.raises(InvalidRequest) as caught:
        WAIT.pause_s(error, attempt=0, now_s=100.0)
    assert caught.value is error
