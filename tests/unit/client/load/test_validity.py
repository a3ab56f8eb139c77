from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.report import GeneratorProcess
from beamline_client.load.target import Outcome
from beamline_client.load.validity import allowed_lag_ms, objections


def process(cpu_share: float) -> GeneratorProcess:
    return GeneratorProcess(
        name="generator 0",
        requests=1,
        cpu_share=cpu_share,
        memory_start_mib=1,
        memory_quarter_mib=1,
        memory_end_mib=1,
    )


def judged(
    lag_p99_ms: float | None = 0.5,
    median_ms: float | None = 10.0,
    cpu_share: float = 0.5,
    outcomes: Mapping[Outcome, int] = {Outcome.OK: 1},
) -> list[str]:
    return objections(
        lag_p99_ms=lag_p99_ms,
        median_ms=median_ms,
        processes=[process(cpu_share)],
        outcomes=outcomes,
        max_in_flight=7,
    )


def test_a_generator_on_time_and_not_busy_may_be_believed() -> None:
    assert judged() == []


@given(st.none() | st.floats(0, 1e5))
def test_the_lag_allowed_is_a_millisecond_or_two_percent_of_the_median(median_ms: float | None) -> None:
    assert allowed_lag_ms(median_ms) == max(1.0, 0.02 * (median_ms or 0))


@pytest.mark.parametrize(
    ("lag_ms", "median_ms", "late"), [(1.0, 10, False), (1.01, 10, True), (2.0, 100, False), (2.01, 100, True)]
)
def test_a_lag_beyond_it_is_an_objection(lag_ms: float, median_ms: float, late: bool) -> None:
    assert [text.startswith("the generator sent late") for text in judged(lag_ms, median_ms)] == [True] * late


def test_a_closed_loop_cannot_be_late() -> None:
    assert judged(lag_p99_ms=None) == []


def test_a_busy_process_is_named_with_what_to_do() -> None:
    assert judged(cpu_share=0.8) == []
    (text,) = judged(cpu_share=0.81)
    assert "generator 0 used 81%" in text
    assert "--workers" in text


def test_requests_that_were_not_sent_are_an_objection() -> None:
    (text,) = judged(outcomes={Outcome.OK: 1, Outcome.NOT_SENT: 3})
    assert text.startswith("3 requests were not sent, for 7 were in flight")


def test_requests_without_a_record_are_an_objection() -> None:
    (text,) = objections(
        lag_p99_ms=None, median_ms=None, processes=[], outcomes={Outcome.OK: 1}, max_in_flight=7, lost=2
    )
    assert text.startswith("2 requests have no record")


def test_every_reason_is_told() -> None:
    assert len(judged(99.0, 1.0, 0.9, {Outcome.NOT_SENT: 1})) == 3
