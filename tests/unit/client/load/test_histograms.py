"""Distributions of times: what a report tells of them is true to three digits, whatever they are."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_client.load.histograms import (
    FINEST_FROM,
    HIGHEST_US,
    PERCENTILES,
    decoded,
    encoded,
    latency,
    new_histogram,
    percentile_ms,
    record,
)

THREE_DIGITS = 1.1e-3
times_s = st.lists(st.floats(1e-6, 3600), min_size=1, max_size=200)
few_examples = settings(max_examples=20)
"""What a report tells of a histogram takes some 40 ms to find."""
told = st.sampled_from((*PERCENTILES, 99.99))


def exact_percentile(values_s: list[float], percentile: float) -> float:
    """The least of the values below or at which at least that share of them lies, in milliseconds."""
    rank = math.ceil(Fraction(str(percentile)) * len(values_s) / 100)
    return sorted(values_s)[max(rank, 1) - 1] * 1000


@given(values_s=times_s, percentile=told)
def test_percentiles_are_those_of_the_sorted_values(values_s: list[float], percentile: float) -> None:
    histogram = new_histogram()
    record(histogram, np.array(values_s))

    expected_ms = exact_percentile(values_s, percentile)
    assert percentile_ms(histogram, percentile) == pytest.approx(expected_ms, rel=THREE_DIGITS, abs=1e-3)


@pytest.mark.parametrize("count", [1, 59, 60, 101, 149, 999, 1000, 1001])
@pytest.mark.parametrize("percentile", PERCENTILES)
def test_ranks_are_rounded_up_and_only_up(count: int, percentile: float) -> None:
    histogram = new_histogram()
    record(histogram, np.arange(1, count + 1) / 1e6)  # microseconds below 2048 are told apart

    assert percentile_ms(histogram, percentile) * 1000 == math.ceil(Fraction(str(percentile)) * count / 100)


@few_examples
@given(values_s=times_s)
def test_a_report_tells_of_all_values(values_s: list[float]) -> None:
    histogram = new_histogram()
    record(histogram, np.array(values_s))

    found = latency(histogram)

    assert found is not None
    assert found.count == len(values_s)
    assert found.mean_ms == pytest.approx(np.mean(values_s) * 1000, rel=THREE_DIGITS, abs=1e-3)
    assert found.min_ms == pytest.approx(min(values_s) * 1000, rel=THREE_DIGITS, abs=1e-3)
    assert found.max_ms == pytest.approx(max(values_s) * 1000, rel=THREE_DIGITS, abs=1e-3)
    assert list(found.percentiles_ms) == ["50", "75", "90", "95", "99", "99.9"]
    assert list(found.percentiles_ms.values()) == sorted(found.percentiles_ms.values())


@few_examples
@given(parts=st.lists(times_s, min_size=1, max_size=5))
def test_order_and_batches_make_no_difference(parts: list[list[float]]) -> None:
    in_parts, at_once = new_histogram(), new_histogram()
    for part in parts:
        record(in_parts, np.array(part))
    record(at_once, np.array(sorted(itertools.chain(*parts))))

    assert latency(in_parts) == latency(at_once)


@few_examples
@given(values_s=times_s)
def test_an_encoding_is_read_as_it_was_written(values_s: list[float]) -> None:
    histogram = new_histogram()
    record(histogram, np.array(values_s))

    again = decoded(encoded(histogram))

    assert again.get_total_count() == len(values_s)
    assert [percentile_ms(again, p) for p in PERCENTILES] == [percentile_ms(histogram, p) for p in PERCENTILES]
    assert encoded(again) == encoded(histogram)


def test_nothing_tells_nothing() -> None:
    histogram = new_histogram()
    record(histogram, np.empty(0))

    assert latency(histogram) is None
    assert percentile_ms(histogram, 99) == 0
    assert decoded(encoded(histogram)).get_total_count() == 0


def test_times_out_of_range_count_at_its_ends() -> None:
    histogram = new_histogram()
    record(histogram, np.array([-1.0, 0.0, 1e-9, 1e9, np.inf]))

    assert histogram.get_total_count() == 5
    assert percentile_ms(histogram, 50) == 1e-3
    assert percentile_ms(histogram, 100) == pytest.approx(HIGHEST_US / 1000, rel=THREE_DIGITS)


def test_single_precision_is_enough() -> None:
    values_s = np.array([0.0123, 1.5, 59.9])
    single, double = new_histogram(), new_histogram()
    record(single, values_s.astype(np.float32))
    record(double, values_s)

    assert percentile_ms(single, 99) == pytest.approx(percentile_ms(double, 99), rel=THREE_DIGITS)


def test_the_finest_percentile_is_told_of_many_values_alone() -> None:
    histogram = new_histogram()
    histogram.record_value(1000, FINEST_FROM - 1)
    few = latency(histogram)
    histogram.record_value(1000)
    many = latency(histogram)

    assert few is not None
    assert many is not None
    assert "99.99" not in few.percentiles_ms
    assert many.percentiles_ms["99.99"] == many.percentiles_ms["50"]
