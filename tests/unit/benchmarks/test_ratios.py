"""Medians, spreads, ratios within a repetition."""

import pytest

from offline.ratios import Spread, ratios, spread


def test_a_spread_is_the_median_and_the_ends() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)
    assert spread([5.0]) == Spread(5.0, 5.0, 5.0)


def test_ratios_compare_what_was_measured_together() -> None:
    """A machine that is half as fast in one repetition changes rates, and no ratio."""
    assert ratios([30.0, 15.0], [20.0, 10.0]) == [1.5, 1.5]


def test_a_repetition_without_its_counterpart_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])
