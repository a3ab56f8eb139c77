"""The figures to reach: which there are, and how a measured one stands to its target."""

from collections.abc import Callable, Mapping, Sequence

import pytest

from offline.contenders import BEAMLINE_FP32, BEAMLINE_INT8, CTRANSLATE2_FP32, CTRANSLATE2_INT8, CTRANSLATE2_INT8_AVX512
from offline.models import BASE_16K, FR_EN
from offline.ratios import Spread
from offline.results import Figure, Results
from offline.targets import TARGETS, Target, Verdict

Compared = Callable[[str, int | None, Mapping[str, Sequence[float]]], Results]


def target(title: str) -> Target:
    (found,) = (target for target in TARGETS if target.title == title)
    return found


def median(title: str, results: Results) -> float | None:
    value = target(title).measured(results, {})
    return None if value is None else value.median


@pytest.mark.parametrize(("value", "verdict"), [(1.14, Verdict.SHORT), (1.15, Verdict.MET), (1.3, Verdict.STRETCH)])
def test_a_target_is_met_from_its_limit_on(value: float, verdict: Verdict) -> None:
    fp32 = target("fr-en test file, fp32 / CTranslate2 fp32")
    assert fp32.verdict(Spread(value, 0.0, 9.0)) is verdict


@pytest.mark.parametrize(("value", "verdict"), [(0.7, Verdict.MET), (0.71, Verdict.SHORT)])
def test_of_a_time_less_is_better(value: float, verdict: Verdict) -> None:
    latency = target("fr-en, one idle request, p50, int8 / CTranslate2 int8")
    assert latency.verdict(Spread(value, value, value)) is verdict


def test_nothing_measured_is_neither_met_nor_short() -> None:
    for each in TARGETS:
        assert each.measured(Results(), {}) is None
        assert each.verdict(None) is Verdict.MISSING
        assert each.told(None) == "–"


def test_no_two_targets_have_the_same_title() -> None:
    assert len({each.title for each in TARGETS}) == len(TARGETS)


def test_rates_and_latencies_are_found_in_their_comparisons(compared: Compared) -> None:
    whole = compared(FR_EN, None, {BEAMLINE_INT8: [1500.0], CTRANSLATE2_INT8: [1000.0]})
    alone = compared(FR_EN, 1, {BEAMLINE_INT8: [300.0], CTRANSLATE2_INT8: [150.0]})
    fp32 = compared(FR_EN, None, {BEAMLINE_FP32: [600.0], CTRANSLATE2_FP32: [500.0]})

    assert median("fr-en test file, int8 / CTranslate2 int8", whole) == pytest.approx(1.5)
    assert median("fr-en test file, fp32 / CTranslate2 fp32", whole) is None
    assert median("fr-en test file, fp32 / CTranslate2 fp32", fp32) == pytest.approx(1.2)
    assert median("fr-en, one idle request, p50, int8 / CTranslate2 int8", alone) == pytest.approx(0.5)


def test_ctranslate2_counts_at_its_best(compared: Compared) -> None:
    """Left alone it is slower than we are, with AVX-512 faster."""
    rates = {BEAMLINE_INT8: [100.0], CTRANSLATE2_INT8: [80.0], CTRANSLATE2_INT8_AVX512: [125.0]}

    assert median("fr-en test file, int8 / CTranslate2 int8", compared(FR_EN, None, rates)) == pytest.approx(0.8)
    latency = median("fr-en, one idle request, p50, int8 / CTranslate2 int8", compared(FR_EN, 1, rates))
    assert latency == pytest.approx(1.25)


def test_resident_memory_is_measured_by_what_is_allowed() -> None:
    facts = {"weights_bytes": 50_000_000, "pools_bytes": 5_000_000}
    results = Results(figures={f"resident when SERVING, {BASE_16K}, {BEAMLINE_INT8}": Figure((100e6, 200e6), facts)})
    title = f"{BASE_16K} int8, resident when SERVING / (120 MB + 1.5 × weights + pools)"

    assert median(title, results) == pytest.approx(150 / (120 + 1.5 * 50 + 5))


def test_the_loss_of_bleu_is_that_of_int8() -> None:
    figures = {f"BLEU, {BEAMLINE_FP32}": Figure((53.2,)), f"BLEU, {BEAMLINE_INT8}": Figure((53.1,))}

    assert median("fr-en, BLEU of fp32 - BLEU of int8", Results(figures=figures)) == pytest.approx(0.1)


def test_figures_of_the_service_come_from_its_own_file() -> None:
    wanted = target("online rate at p99 ≤ 500 ms, mixed / request-level batching")

    value = wanted.measured(Results(), {"request-level batching, mixed": Spread(2.1, 2.0, 2.3)})

    assert value == Spread(2.1, 2.0, 2.3)
    assert wanted.verdict(value) is Verdict.MET
    assert wanted.told(value) == "2.10 × (2.00–2.30)"


def test_a_share_is_told_in_percent() -> None:
    figure = Figure((0.05, 0.06, 0.07))
    outside = target("fr-en int8, 32 × 4 rows, time outside session.run")

    value = outside.measured(Results(figures={f"outside session.run, {FR_EN}, {BEAMLINE_INT8}": figure}), {})

    assert outside.told(value) == "6.0 % (5.0–7.0)"
    assert outside.wanted == "≤ 8 %"
