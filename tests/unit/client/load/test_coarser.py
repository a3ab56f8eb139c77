"""Windows and samples put together for the plots."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.coarser import coarser_samples, coarser_windows
from beamline_client.load.histograms import decoded
from beamline_client.load.report import Window
from beamline_client.load.testing import example_run

RUN = example_run()


def answers(window: Window) -> int:
    return int(decoded(window.histogram).get_total_count()) if window.histogram else 0


@given(st.integers(1, 40), st.integers(1, 30))
def test_no_more_windows_are_left_and_nothing_is_lost(at_most: int, count: int) -> None:
    windows = RUN.windows[:count]
    fewer = coarser_windows(windows, at_most)

    assert len(fewer) <= at_most
    assert fewer[0].start_s == windows[0].start_s
    assert [window.start_s for window in fewer[1:]] == [window.start_s + window.seconds for window in fewer[:-1]]
    for total in (lambda w: w.seconds, lambda w: w.offered, lambda w: w.failed, lambda w: w.tokens, answers):
        assert sum(map(total, fewer)) == sum(map(total, windows))


def test_few_windows_stay_as_they_are() -> None:
    assert coarser_windows(RUN.windows, len(RUN.windows)) == RUN.windows
    assert coarser_samples(RUN.server_samples, len(RUN.server_samples)) == RUN.server_samples
    assert coarser_windows([], 10) == []
    assert coarser_samples([], 10) == []


def test_all_windows_together_have_the_runs_figures() -> None:
    measured = [window for window in RUN.windows if window.start_s >= RUN.configuration.warm_up_s]
    (whole,) = coarser_windows(measured, 1)
    assert RUN.latency is not None

    assert answers(whole) == RUN.latency.count
    assert (whole.p50_ms, whole.p99_ms) == (RUN.latency.percentiles_ms["50"], RUN.latency.percentiles_ms["99"])
    assert whole.decode_ms == pytest.approx(RUN.phases["decode"].mean_ms, rel=1e-3)


def test_what_no_window_knows_is_not_known() -> None:
    silent = [
        window.model_copy(update={"histogram": None, "p50_ms": None, "p99_ms": None, "queue_ms": None})
        for window in RUN.windows
    ]
    (whole,) = coarser_windows(silent, 1)

    assert (whole.histogram, whole.p50_ms, whole.p99_ms, whole.queue_ms) == (None, None, None, None)


def test_samples_are_means_over_those_that_know() -> None:
    first, second = RUN.server_samples[:2]
    (whole,) = coarser_samples([first.model_copy(update={"step_ms": None, "queued_requests": 2.0}), second], 1)

    assert whole.step_ms == second.step_ms
    assert whole.queued_requests == (2.0 + second.queued_requests) / 2
    assert whole.at_s == second.at_s
