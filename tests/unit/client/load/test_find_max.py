from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.find_max import ATTEMPTS, Bracket, FindMaxOptions, Patience, Tried, agree, bracket, next_rate
from beamline_client.load.recorder import Frame, Recorder, window_length_s
from beamline_client.load.records import RECORD
from beamline_client.load.slo import parse_slo
from beamline_client.load.target import Outcome


def search(capacity: float, start: float, precision: float) -> list[Tried]:
    tried: list[Tried] = []
    while (rate := next_rate(tried, start, precision)) is not None:
        assert len(tried) < 200, "the search does not end"
        tried.append(Tried(rate, rate <= capacity))
    return tried


@given(st.floats(1, 5000), st.floats(0.5, 10_000), st.floats(0.01, 0.3))
def test_the_search_ends_with_the_capacity_between_two_rates_that_are_close(
    capacity: float, start: float, precision: float
) -> None:
    tried = search(capacity, start, precision)
    known = bracket(tried)
    assert known.met is not None
    assert known.missed is not None
    assert known.met <= capacity < known.missed
    assert known.missed - known.met <= precision * known.met * 1.001
    rates = [each.rate_per_s for each in tried]
    assert all(rates.count(each.rate_per_s) == (1 if each.met else ATTEMPTS) for each in tried)


def test_the_search_gives_up_where_nothing_is_met_or_nothing_is_missed() -> None:
    assert bracket(search(0.0, 10, 0.05)).met is None
    assert bracket(search(1e9, 10, 0.05)).missed is None


def test_a_rate_that_was_missed_has_another_chance() -> None:
    tried = [Tried(100, True), *[Tried(125, False)] * (ATTEMPTS - 1)]
    assert next_rate(tried, 100, 0.05) == 125
    assert bracket([*tried, Tried(125, True)]) == Bracket(125, None)
    assert bracket([*tried, Tried(125, False)]) == Bracket(100, 125)
    assert next_rate([*tried, Tried(125, False)], 100, 0.05) == 112.5


def test_a_rate_met_above_one_that_was_missed_does_not_count() -> None:
    tried = [Tried(100, True), Tried(150, False), Tried(200, True)]
    assert (bracket(tried).met, bracket(tried).missed) == (100, 150)


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=5), st.floats(0.01, 0.5))
def test_values_agree_when_all_are_near_their_mean(values: list[float], stability: float) -> None:
    mean = sum(values) / len(values)
    assert agree(values, stability) == all(abs(value - mean) <= stability * mean for value in values)
    assert agree([values[0]] * 3, stability)
    assert not agree([*values, None], stability)


RATE, WARM_UP_S = 20, 1.0
OPTIONS = FindMaxOptions(window_s=2.0, max_windows=6)


def recorded(latencies_s: Sequence[float], outcome: Outcome = Outcome.OK) -> Recorder:
    """A recorder of 20 requests per second, whose latencies in each second are the given ones."""
    n = RATE * len(latencies_s)
    records = np.zeros(n, RECORD)
    records["intended_s"] = records["sent_s"] = np.arange(n) / RATE
    records["done_s"] = records["intended_s"] + np.repeat(latencies_s, RATE)
    records["outcome"] = outcome
    records["queue_s"] = records["first_piece_s"] = np.nan
    made = Recorder(
        Frame(13.5, window_length_s(13.5), WARM_UP_S, 0.5, ("all",), np.zeros(1, np.uint16)),
        np.arange(13.5 * RATE) / RATE,
    )
    made.add(records)
    return made


def patience(slo: str = "p99<=500ms,errors<=1%") -> Patience:
    return Patience(parse_slo(slo), OPTIONS, WARM_UP_S, int(12.5 * RATE))


def test_three_windows_that_agree_are_enough_and_two_are_not() -> None:
    steady, waiting = recorded([0.1] * 13), patience()
    assert not waiting.enough(steady, 7.4)  # the third window ends at 7 s, and its answers may take 0.5 s
    assert waiting.enough(steady, 7.5)
    assert waiting.stable
    assert not waiting.hopeless


def test_windows_that_differ_are_not_enough() -> None:
    growing, waiting = recorded([0.02 * 1.2**second for second in range(13)]), patience()
    assert not waiting.enough(growing, 13.4)
    assert not waiting.stable


def test_a_rate_at_which_too_many_are_slow_is_given_up_at_once() -> None:
    waiting = patience()
    assert waiting.enough(recorded([0.1, 0.6]), 2.0)
    assert waiting.hopeless
    assert not waiting.stable


def test_slow_answers_that_the_slo_allows_are_no_reason_to_give_up() -> None:
    assert not patience("p50<=500ms").enough(recorded([0.1, 0.6]), 2.0)


def test_a_rate_at_which_too_many_fail_is_given_up_at_once() -> None:
    waiting = patience("errors<=1%")
    assert waiting.enough(recorded([0.1, 0.1], Outcome.REJECTED), 2.0)
    assert waiting.hopeless


def test_a_request_that_failed_was_not_answered_in_time() -> None:
    waiting = patience("p99<=500ms")
    assert waiting.enough(recorded([0.1, 0.1], Outcome.DEADLINE), 2.0)
    assert waiting.hopeless


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.NOT_SENT])
def test_what_we_gave_up_is_no_failure(outcome: Outcome) -> None:
    assert not patience("errors<=1%").enough(recorded([0.1, 0.1], outcome), 2.0)
