"""The scheduler by itself, on a clock that is counted: overload costs nobody but those who are refused."""

import pytest
from overload_simulation import Outcome, peak_per_s, simulated

SECONDS = 4.0


@pytest.fixture(scope="module")
def peak() -> float:
    return peak_per_s(SECONDS)


@pytest.mark.parametrize("deadline_s", [1.0, None])
@pytest.mark.parametrize(("load", "least"), [(0.7, 0.95), (2.0, 0.95), (10.0, 0.85)])
def test_goodput_does_not_collapse(peak: float, load: float, least: float, deadline_s: float | None) -> None:
    outcome = simulated(load * peak, SECONDS, deadline_s)
    assert outcome.in_time_per_s >= least * min(load * peak, peak)


def test_whoever_is_accepted_is_answered_in_time_but_for_few(peak: float) -> None:
    outcome = simulated(5 * peak, SECONDS, 1.0)
    assert outcome.refused > 0.5
    assert outcome.late < 0.03


def test_nobody_is_refused_below_the_peak(peak: float) -> None:
    outcome = simulated(0.7 * peak, SECONDS, 1.0)
    assert (outcome.refused, outcome.late) == (0.0, 0.0)


def test_the_same_requests_have_the_same_outcome() -> None:
    outcomes: set[Outcome] = {simulated(100.0, 2.0, 1.0, seed=7) for _ in range(2)}
    assert len(outcomes) == 1
