"""Objectives: read once, met exactly when what was measured says so."""

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.histograms import new_histogram, percentile_ms, record
from beamline_client.load.slo import SloUnusable, parse_slo


def answered(*times_ms: float) -> HdrHistogram:
    histogram = new_histogram()
    record(histogram, np.array(times_ms) / 1000)
    return histogram


def test_an_objective_is_its_conditions() -> None:
    objective = parse_slo(" p99 <= 500ms , p50<1.5s, p99.9<=900us, errors <= 0.1% ")

    assert [(clause.percentile, clause.limit_ms) for clause in objective.latencies] == [
        (99, 500),
        (50, 1500),
        (99.9, 0.9),
    ]
    assert objective.errors == 0.001
    assert [clause.text for clause in objective.check(answered(1), attempted=1, failed=0).clauses] == [
        *("p99<=500ms", "p50<1.5s", "p99.9<=900us", "errors<=0.1%")
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", " , ", "fast", "p99", "p99<=500", "p99>=500ms", "p99<=-5ms", "p99<=500 parsecs", "p<=5ms", "p99==5ms"),
        *("p0<=5ms", "p100<=5ms", "p99<=0ms", "p101<=1s", "errors<=0.1", "errors<=100%", "errors<=101%", "errors>=1%"),
        *("errors<=1%,errors<=2%", "p99<=5ms;errors<=1%", "p99<=nanms", "p99<=1e3ms"),
    ],
)
def test_what_is_no_objective_or_an_impossible_one_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SloUnusable) as refused:
        parse_slo(text)
    assert "\n" not in str(refused.value)


@given(text=st.text(max_size=30) | st.from_regex(r"(p|errors)[0-9.]{0,5}<?=?[0-9.]{0,5}(us|ms|s|%)?,?", fullmatch=True))
def test_any_text_is_an_objective_or_is_refused(text: str) -> None:
    try:
        objective = parse_slo(text)
    except SloUnusable:
        return
    assert objective.latencies or objective.errors is not None


@given(
    times_ms=st.lists(st.floats(0.001, 1e6), min_size=1, max_size=300),
    percentile=st.integers(1, 999).map(lambda tenths: tenths / 10),
    limit_ms=st.integers(1, 1_000_000),
)
def test_a_latency_condition_is_met_if_that_share_of_the_answers_was_in_time(
    times_ms: list[float], percentile: float, limit_ms: int
) -> None:
    slo = parse_slo(f"p{percentile}<={limit_ms}ms").check(answered(*times_ms), attempted=len(times_ms), failed=0)

    # Values are known to three digits, and microseconds: those near the limit may count either way.
    surely = sum(time_ms < limit_ms * 0.998 - 0.002 for time_ms in times_ms)
    perhaps = sum(time_ms < limit_ms * 1.002 + 0.002 for time_ms in times_ms)
    needed = percentile * len(times_ms) / 100
    if surely >= needed + 1e-6:
        assert slo.met
    if perhaps < needed - 1e-6:
        assert not slo.met
    assert slo.met == slo.clauses[0].met


@given(thousandths=st.integers(0, 999), attempted=st.integers(1, 5000), failed=st.integers(0, 5000))
def test_a_condition_on_errors_is_met_up_to_its_share_exactly(thousandths: int, attempted: int, failed: int) -> None:
    objective = parse_slo(f"errors<={thousandths / 10}%")

    for count in (min(failed, attempted), thousandths * attempted // 1000):
        slo = objective.check(answered(1), attempted=attempted, failed=count)
        assert slo.met == (count * 1000 <= thousandths * attempted)


def test_no_answers_meet_nothing() -> None:
    for text in ("p99<=1s", "errors<=50%", "p99<=1s,errors<=50%"):
        assert not parse_slo(text).check(answered(), attempted=0, failed=0).met
    assert parse_slo("p99<=1s").check(answered(), attempted=9, failed=9).clauses[0].measured == "no answers"


def test_each_condition_says_what_was_measured() -> None:
    times_ms = answered(*[5.0] * 500, *[20.0] * 489)
    slo = parse_slo("p50<=10ms,p98<=10ms,p99<=10ms,errors<=1%").check(times_ms, attempted=1000, failed=11)

    assert [(clause.met, clause.measured) for clause in slo.clauses] == [
        *((True, "5.0 ms"), (False, "20.0 ms"), (False, "1.1% failed"), (False, "1.100%"))
    ]
    assert not slo.met


def test_goodput_counts_answers_within_the_limit_of_the_highest_percentile() -> None:
    assert parse_slo("p50<=1s,p99.9<=2s,p99<=1500ms").limit_s == 2
    assert parse_slo("errors<=1%").limit_s is None


@given(count=st.integers(1, 400), percentile=st.sampled_from([50.0, 90.0, 99.0, 99.9]))
def test_met_means_that_at_least_that_share_was_in_time(count: int, percentile: float) -> None:
    """One late answer among few is more than 1 %, so it misses a 99th percentile."""
    late = answered(*[10.0] * (count - 1), 1000.0)

    slo = parse_slo(f"p{percentile:g}<=20ms").check(late, attempted=count, failed=0)

    assert slo.met == ((count - 1) * 1000 >= count * round(percentile * 10))
    assert slo.met == (percentile_ms(late, percentile) <= 20)


@given(st.lists(st.sampled_from([5.0, 50.0]), min_size=1, max_size=60), st.integers(0, 60), st.integers(1, 99))
def test_a_request_that_failed_took_longer_than_any_limit(times_ms: list[float], failed: int, percentile: int) -> None:
    """As if it had been answered far too late."""
    objective = parse_slo(f"p{percentile}<=10ms")
    with_failures = objective.check(answered(*times_ms), attempted=len(times_ms) + failed, failed=failed)
    as_late = objective.check(answered(*times_ms, *[1e5] * failed), attempted=len(times_ms) + failed, failed=0)
    assert with_failures.met == as_late.met
