"""Figures as words."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.wording import NOTHING, latency_limits_ms, number, percent, plain, rate


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, NOTHING), (0.0, "0.00"), (0.424, "0.42"), (48.15, "48.1"), (221.4, "221"), (1559.0, "1,559")],
)
def test_numbers_have_about_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@given(st.floats(0.1, 1e7))
def test_a_number_is_within_a_rounding_of_the_value(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.051)


@given(st.floats(0, 1))
def test_only_exact_shares_are_0_or_100_percent(share: float) -> None:
    text = percent(share)

    assert (text == "0 %") == (share == 0)
    assert (text == "100 %") == (share == 1)
    assert text not in ("0.0 %", "0.00 %", "100.0 %", "100.00 %")


def test_rates_that_were_set_keep_their_digits() -> None:
    assert [rate(value) for value in (150.0, 137.5, 0.25, 12345.5)] == ["150/s", "137.5/s", "0.25/s", "12,345.5/s"]


@given(st.text())
def test_plain_text_is_one_printable_line(text: str) -> None:
    assert plain(text).isprintable()


def test_limits_are_read_from_an_objective_and_only_from_one() -> None:
    assert latency_limits_ms("p99<=0.5s,p50<=100ms,errors<=1%") == [(50.0, 100.0), (99.0, 500.0)]
    assert latency_limits_ms("errors<=1%") == latency_limits_ms(None) == latency_limits_ms("whatever") == []
    assert math.isfinite(latency_limits_ms("p99.9<=1s")[0][1])
