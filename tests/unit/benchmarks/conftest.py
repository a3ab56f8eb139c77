"""Made-up results of the bench."""

from collections.abc import Callable, Mapping, Sequence

import pytest

from offline.results import Comparison, Results, Run, Series, comparison_key

Compared = Callable[[str, int | None, Mapping[str, Sequence[float]]], Results]


@pytest.fixture
def compared() -> Compared:
    """Makes results of one comparison: sentences per second of each contender, by repetition; 9 tokens each."""

    def make(model: str, batch: int | None, rates: Mapping[str, Sequence[float]]) -> Results:
        series = {
            name: Series({"workers": 2}, tuple(Run(100 / rate, 100, 900, 1e3 / rate) for rate in values), tried=3)
            for name, values in rates.items()
        }
        return Results(comparisons={comparison_key(model, batch): Comparison(model, batch, series)})

    return make
