"""Comparing reports: made-up runs whose truth is known."""

import io
import json
from statistics import NormalDist

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from beamline_client.load import bootstrap
from beamline_client.load.compare import (
    Comparison,
    NotComparable,
    compare,
    exit_status,
    judge,
    measured_windows,
    print_comparison,
    to_json,
)
from beamline_client.load.histograms import decoded, encoded, new_histogram, percentile_ms, record
from beamline_client.load.report import FindMaxReport, RunReport, Verdict, Window
from beamline_client.load.testing import example_find_max, example_run

RATIOS = st.floats(0.1, 10)
TOLERANCES = st.floats(0, 0.5)
MIRRORED = {"same": "same", "unclear": "unclear", "better": "worse", "worse": "better"}


def window(start_s: float, seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Window:
    """A window of a second whose answers took so long, shape [n]."""
    histogram = new_histogram()
    record(histogram, seconds)
    return Window(
        start_s=start_s,
        seconds=1.0,
        offered=len(seconds),
        answered=len(seconds),
        failed=0,
        tokens=0,
        p50_ms=None,
        p99_ms=None,
        queue_ms=None,
        encode_ms=None,
        decode_ms=None,
        histogram=encoded(histogram) if len(seconds) else None,
    )


def windows(seed: int, count: int, per_window: float = 60.0, slower: float = 1.0) -> list[Window]:
    """Windows with Poisson numbers of exponentially distributed latencies, 20 ms in the mean."""
    random = np.random.default_rng(seed)
    sizes = random.poisson(per_window, count).tolist()
    return [window(float(i), random.exponential(0.02 * slower, size)) for i, size in enumerate(sizes)]


def merged(report: RunReport) -> HdrHistogram:
    together = new_histogram()
    for each in measured_windows(report):
        if each.histogram is not None:
            together.add(decoded(each.histogram))
    return together


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {change.name: change.verdict for change in comparison.changes}


def printed(comparison: Comparison) -> str:
    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream, width=80))
    return stream.getvalue()


def found(highest: float | None, step: float | None) -> FindMaxReport:
    return example_find_max(highest_rate_per_s=highest, step_per_s=step)


def test_figures_are_those_of_the_windows_after_the_warm_up() -> None:
    before, after = example_run(seed=1), example_run(seed=2)

    p50, p99, answered = compare(before, after).changes

    assert (p50.before, p99.before) == (percentile_ms(merged(before), 50), percentile_ms(merged(before), 99))
    assert (p50.after, p99.after) == (percentile_ms(merged(after), 50), percentile_ms(merged(after), 99))
    assert answered.before == pytest.approx(before.throughput.answered_per_s)
    assert (p50.ratio, p99.ratio) == (p50.after / p50.before, p99.after / p99.before)


def test_a_run_is_the_same_as_itself() -> None:
    run = example_run()

    comparison = compare(run, run)

    assert [change.ratio for change in comparison.changes] == [1, 1, 1]
    assert verdicts(comparison) == {"p50": "same", "p99": "same", "answered": "same"}
    assert all(change.low <= 1 <= (change.high or 0) for change in comparison.changes)
    assert exit_status(comparison) == 0


@pytest.mark.parametrize("seed", [2, 4, 6, 8])
def test_runs_of_the_same_server_are_not_worse(seed: int) -> None:
    comparison = compare(example_run(seed=seed), example_run(seed=seed + 1))

    assert set(verdicts(comparison).values()) == {"same"}
    assert exit_status(comparison) == 0


def test_a_slower_server_is_worse_and_a_faster_one_better() -> None:
    normal, slow = example_run(seed=1), example_run(seed=2, slower=1.3)

    assert verdicts(compare(normal, slow)) == {"p50": "worse", "p99": "worse", "answered": "same"}
    assert exit_status(compare(normal, slow)) == 1
    assert verdicts(compare(slow, normal)) == {"p50": "better", "p99": "better", "answered": "same"}
    assert exit_status(compare(slow, normal)) == 0


def test_fewer_answers_are_worse() -> None:
    comparison = compare(example_run(rate_per_s=100), example_run(rate_per_s=60))

    assert verdicts(comparison)["answered"] == "worse"
    assert "rate differs: 100 before, 60 after" in comparison.remarks


def test_a_wide_tolerance_forgives() -> None:
    comparison = compare(example_run(seed=1), example_run(seed=2, slower=1.3), tolerance=1.0)

    assert exit_status(comparison) == 0


def test_the_same_seed_draws_the_same_intervals() -> None:
    runs = example_run(seed=1), example_run(seed=2)

    assert compare(*runs, seed=3) == compare(*runs, seed=3)
    assert compare(*runs, seed=3).changes != compare(*runs, seed=4).changes


@given(RATIOS, RATIOS, TOLERANCES, st.booleans())
def test_a_verdict_is_turned_round_by_swapping(one: float, other: float, tolerance: float, more: bool) -> None:
    low, high = sorted((one, other))

    verdict = judge(low, high, tolerance, more_is_better=more)

    assert judge(low, high, tolerance, more_is_better=not more) == MIRRORED[verdict]
    assert verdict == "same" or not low <= 1 <= high
    # 1 / x is not exact: a bound may come to lie on the other side of the tolerance.
    if all(abs(bound * (1 + tolerance) ** sign - 1) > 1e-9 for bound in (low, high) for sign in (-1, 0, 1)):
        assert judge(1 / high, 1 / low, tolerance, more_is_better=more) == MIRRORED[verdict]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.9, 1.1, "same"),
        (1.01, 1.04, "same"),
        (0.96, 0.99, "same"),
        (1.01, 1.06, "unclear"),
        (1.06, 1.2, "worse"),
        (0.8, 0.94, "better"),
        (0.94, 0.97, "unclear"),
    ],
)
def test_only_what_lies_wholly_beyond_the_tolerance_is_worse(low: float, high: float, verdict: str) -> None:
    assert judge(low, high, 0.05, more_is_better=False) == verdict


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    pairs, truth = 60, 1.2
    hits = np.zeros(3)
    for seed in range(pairs):
        before = bootstrap.cut(windows(seed, 12))
        after = bootstrap.cut(windows(seed + pairs, 12, slower=truth))
        random = np.random.default_rng(seed)
        drawn = [bootstrap.drawn_again(blocks, 300, random) for blocks in (before, after)]
        for i, (name, expected) in enumerate((("p50_ms", truth), ("p99_ms", truth), ("answered_per_s", 1.0))):
            numbers = (len(before.seconds), len(after.seconds))
            low, high = bootstrap.interval(getattr(drawn[0], name), getattr(drawn[1], name), numbers)
            hits[i] += low <= expected <= high

    assert np.all(hits / pairs >= 0.85)
    assert np.any(hits < pairs)  # nor by being too wide


def test_longer_runs_know_more() -> None:
    def width(count: int) -> float:
        blocks = bootstrap.cut(windows(1, count))
        drawn = bootstrap.drawn_again(blocks, 500, np.random.default_rng(0)).p50_ms
        low, high = bootstrap.interval(drawn, drawn[::-1], (len(blocks.seconds),) * 2)
        return high - low

    assert width(120) < width(30) < width(6)


@pytest.mark.parametrize("count", [5, 6, 9, 10, 17, 30, 64, 121])
def test_blocks_hold_every_window_once(count: int) -> None:
    every = windows(7, count, per_window=5)

    blocks = bootstrap.cut(every)

    assert bootstrap.FEWEST_BLOCKS <= len(blocks.seconds) <= count
    assert blocks.seconds.sum() == count
    assert blocks.answered.sum() == sum(each.answered for each in every)
    assert blocks.counts[:, -1].sum() == blocks.answered.sum()
    assert np.ptp(blocks.seconds) <= 1
    assert np.all(np.diff(blocks.values_ms) > 0)
    assert np.all(np.diff(blocks.counts, axis=1) >= 0)


@given(
    st.lists(st.lists(st.floats(1e-5, 100), max_size=8), min_size=5, max_size=12).filter(any),
)
def test_figures_of_blocks_are_those_of_the_histogram(latencies: list[list[float]]) -> None:
    together = new_histogram()
    record(together, np.array([each for seconds in latencies for each in seconds]))

    figures = bootstrap.measured(bootstrap.cut([window(i, np.array(each)) for i, each in enumerate(latencies)]))

    assert figures.p50_ms.tolist() == [percentile_ms(together, 50)]
    assert figures.p99_ms.tolist() == [percentile_ms(together, 99)]


def test_draws_in_parts_are_the_draws() -> None:
    blocks = bootstrap.cut(windows(1, 20))
    drawn = bootstrap.drawn_again(blocks, 2000, np.random.default_rng(0))

    assert {len(values) for values in (drawn.p50_ms, drawn.p99_ms, drawn.answered_per_s)} == {2000}
    assert np.all(np.isin(drawn.p50_ms, blocks.values_ms))
    assert np.all(drawn.p50_ms <= drawn.p99_ms)


def test_draws_without_answers_are_left_out() -> None:
    some = [window(float(i), np.full(5, 0.01) if i == 3 else np.zeros(0)) for i in range(6)]
    drawn = bootstrap.drawn_again(bootstrap.cut(some), 500, np.random.default_rng(0))

    assert np.isnan(drawn.p50_ms).any()
    assert bootstrap.interval(drawn.p50_ms, drawn.p50_ms[::-1], (6, 6)) == pytest.approx((1, 1))


@pytest.mark.parametrize(
    ("blocks", "quantile", "correction"),
    [((5, 5), 2.306, 5 / 4), ((20, 20), 2.0244, 20 / 19), ((5, 25), 2.0484, 5 / 4)],
)
def test_fewer_blocks_are_cut_off_less(blocks: tuple[int, int], quantile: float, correction: float) -> None:
    """Student's t at 97.5 %, from its table."""
    assert bootstrap.expanded_tail(blocks) == pytest.approx(NormalDist().cdf(-quantile * correction**0.5), rel=1e-2)
    assert bootstrap.expanded_tail(blocks) < 0.025


def test_too_short_runs_are_refused() -> None:
    run = example_run()
    short = example_run(windows=run.windows[:7])

    with pytest.raises(NotComparable, match=r"the run after has 4 windows after its warm-up, .*: run longer"):
        compare(run, short)
    with pytest.raises(NotComparable, match="the run before has 0 windows"):
        compare(example_run(windows=[]), run)


def test_runs_without_answers_are_refused() -> None:
    run = example_run()
    silent = [each.model_copy(update={"answered": 0, "histogram": None}) for each in run.windows]

    with pytest.raises(NotComparable, match="the run after has no answers"):
        compare(run, example_run(windows=silent))


def test_a_warm_up_that_ends_within_a_window_takes_it_along() -> None:
    run = example_run()
    configuration = run.configuration.model_copy(update={"warm_up_s": 2.5})

    assert measured_windows(example_run(configuration=configuration)) == measured_windows(run)
    assert measured_windows(run)[0].start_s == 3.0


def test_invalid_reports_are_refused_unless_allowed() -> None:
    verdict = Verdict(valid=False, invalid_because=["it was late"], interrupted=True, failures=["wrong"], remarks=[])
    run, bad = example_run(), example_run(verdict=verdict)

    with pytest.raises(NotComparable, match=r"the report after is INVALID \(it was late\)"):
        compare(run, bad)
    remarks = compare(run, bad, allow_invalid=True).remarks
    assert remarks == [
        "the report after is INVALID: the generator may have made its figures",
        "the report after is of a run that was interrupted",
        "after: wrong",
    ]


def test_what_differs_besides_is_told() -> None:
    run = example_run()
    assert run.server is not None
    changed = {"workload": {**run.configuration.workload, "beams": "8", "new": "x"}, "mode": "closed", "concurrency": 4}
    other = example_run(
        configuration=run.configuration.model_copy(update=changed),
        server=run.server.model_copy(update={"precision": "fp32"}),
        environment=run.environment.model_copy(update={"cores": 64, "commit": None}),
    )

    assert compare(run, run).remarks == []
    assert compare(run, other).remarks == [
        "mode differs: open before, closed after",
        "concurrency differs: – before, 4 after",
        "server's precision differs: int8 before, fp32 after",
        "generator's cores differs: 2 before, 64 after",
        "workload's beams differs: 1:50%,4:50% before, 8 after",
        "workload's new differs: – before, x after",
    ]


def test_failures_that_flatter_the_latency_are_told() -> None:
    run = example_run()
    failing = [each.model_copy(update={"failed": each.offered // 2}) for each in run.windows]

    remarks = compare(run, example_run(windows=failing)).remarks

    assert len(remarks) == 1
    assert "p50 and p99 are of those that were answered" in remarks[0]


def test_an_interval_that_hides_changes_is_told() -> None:
    run = example_run(windows=windows(1, 10, per_window=3))

    remarks = compare(run, run).remarks

    assert "p99 is not known well enough to see a change of 25%: measure longer" in remarks


@pytest.mark.parametrize(
    ("before", "after", "low", "high", "verdict"),
    [
        ((100, 10), (100, 10), 100 / 110, 110 / 100, "same"),
        ((100, 10), (80, 5), 80 / 110, 85 / 100, "worse"),
        ((80, 5), (100, 10), 100 / 85, 110 / 80, "better"),
        ((100, 2), (97, 4), 97 / 102, 101 / 100, "same"),
        ((100, 2), (95, 4), 95 / 102, 99 / 100, "unclear"),
        ((100, 10), (200, None), 200 / 110, None, "better"),
        ((100, None), (50, 1), 0.0, 51 / 100, "worse"),
        ((100, None), (100, None), 0.0, None, "same"),
    ],
)
def test_searches_are_compared_by_what_their_steps_allow(
    before: tuple[float, float | None],
    after: tuple[float, float | None],
    low: float,
    high: float | None,
    verdict: str,
) -> None:
    comparison = compare(found(*before), found(*after))

    (change,) = comparison.changes
    assert (change.before, change.after, change.ratio) == (before[0], after[0], after[0] / before[0])
    assert change.low == pytest.approx(low)
    assert change.high == (None if high is None else pytest.approx(high))
    assert change.verdict == verdict
    assert exit_status(comparison) == (verdict == "worse")
    assert printed(comparison)
    assert json.loads(to_json(comparison))["changes"][0]["high"] == change.high


def test_searches_for_different_objectives_are_told() -> None:
    remarks = compare(example_find_max(), example_find_max(slo="p99<=1s")).remarks

    assert remarks == ["the SLO differs: p99<=500ms,errors<=1% before, p99<=1s after"]


def test_a_search_that_found_nothing_is_refused() -> None:
    with pytest.raises(NotComparable, match="the search after found no rate"):
        compare(found(100, 10), found(None, 10))


def test_a_run_and_a_search_are_refused() -> None:
    with pytest.raises(NotComparable, match="compare two of a kind"):
        compare(example_run(), example_find_max())


def test_a_comparison_fits_80_columns() -> None:
    comparison = compare(example_run(seed=1), example_run(seed=2, slower=1.3))

    text = printed(comparison)

    assert max(map(len, text.splitlines())) <= 80
    for word in ("p50, ms", "p99, ms", "answered, per s", "95 % interval", "worse", "same", "up to 5 %"):
        assert word in text
    assert "before: 2025-01-02T03:04:05Z, commit 0123456789ab\n" in text


def test_a_comparison_is_json() -> None:
    comparison = compare(example_run(seed=1), example_run(seed=2))

    assert Comparison.model_validate_json(to_json(comparison)) == comparison
