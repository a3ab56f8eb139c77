"""What is kept in JSON comes back as it was."""

import json
from collections.abc import Callable, Mapping, Sequence

import pytest

from offline.contenders import BEAMLINE_INT8, CTRANSLATE2_INT8
from offline.models import FR_EN
from offline.ratios import Spread
from offline.results import Figure, Results, comparison_key

Compared = Callable[[str, int | None, Mapping[str, Sequence[float]]], Results]


def test_results_survive_json(compared: Compared) -> None:
    results = compared(FR_EN, None, {BEAMLINE_INT8: [900.0, 910.0], CTRANSLATE2_INT8: [800.0, 790.0]})
    results.about["cpu"] = "some"
    results.missing["optimum-onnx"] = "it does not install"
    results.figures["BLEU"] = Figure((53.1,), {"as_transformers": 0.97})

    assert Results.from_json(json.loads(json.dumps(results.as_json()))) == results


def test_results_of_another_format_are_refused() -> None:
    with pytest.raises(ValueError, match="format 0"):
        Results.from_json({"format": 0})


def test_a_speedup_is_of_rates_and_a_latency_ratio_of_times(compared: Compared) -> None:
    results = compared(FR_EN, 1, {BEAMLINE_INT8: [20.0, 30.0, 40.0], CTRANSLATE2_INT8: [10.0, 20.0, 10.0]})
    comparison = results.comparisons[comparison_key(FR_EN, 1)]

    assert comparison.speedup(BEAMLINE_INT8, CTRANSLATE2_INT8) == Spread(2.0, 1.5, 4.0)
    latency = comparison.latency_ratio(BEAMLINE_INT8, CTRANSLATE2_INT8)
    assert latency is not None
    assert latency.median == pytest.approx(0.5)
    assert comparison.speedup(BEAMLINE_INT8, "nobody") is None


def test_tokens_per_second_are_sentences_per_second_times_tokens(compared: Compared) -> None:
    results = compared(FR_EN, 8, {BEAMLINE_INT8: [100.0]})
    comparison = results.comparisons[comparison_key(FR_EN, 8)]

    rate = comparison.tokens_per_s(BEAMLINE_INT8)
    assert rate is not None
    assert rate.median == pytest.approx(900.0)
    assert comparison.tokens_per_s(CTRANSLATE2_INT8) is None
