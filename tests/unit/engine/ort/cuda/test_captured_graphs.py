"""Which runs get a graph, and what happens if capturing one fails."""

import logging
from dataclasses import dataclass, field

import onnxruntime as ort
import pytest

from beamline_server.engine.ort.cuda.captured_graphs import CAPTURED_FROM_USE, CapturedGraphs

PLAIN = "-1"


@dataclass
class Run:
    """A run that notes by which graph it was asked to run."""

    failing: bool = False
    uses: int = 0
    graph: int | None = None
    asked: list[str] = field(default_factory=list)

    def run(self, options: ort.RunOptions) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        self.asked.append(number)
        if self.failing and number != PLAIN:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")


def test_a_run_is_captured_once_it_has_come_often_enough() -> None:
    graphs, run = CapturedGraphs(8), Run()
    for _ in range(CAPTURED_FROM_USE + 2):
        graphs.run(run)
    assert run.asked == [PLAIN] * (CAPTURED_FROM_USE - 1) + ["1"] * 3
    assert len(graphs) == 1


def test_each_run_has_a_graph_of_its_own_until_there_are_enough() -> None:
    graphs, runs = CapturedGraphs(2), [Run(), Run(), Run()]
    for run in runs:
        for _ in range(CAPTURED_FROM_USE + 1):
            graphs.run(run)
    assert [run.asked[-1] for run in runs] == ["1", "2", PLAIN]
    assert len(graphs) == 2


def test_nothing_is_captured_where_graphs_are_off() -> None:
    graphs, run = CapturedGraphs(0), Run()
    for _ in range(CAPTURED_FROM_USE + 2):
        graphs.run(run)
    assert set(run.asked) == {PLAIN}


def test_a_failing_capture_costs_the_graphs_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    graphs, good, bad = CapturedGraphs(8), Run(), Run(failing=True)
    for _ in range(CAPTURED_FROM_USE):
        graphs.run(good)
    with caplog.at_level(logging.WARNING):
        for _ in range(CAPTURED_FROM_USE + 1):
            graphs.run(bad)
    assert bad.asked == [PLAIN] * (CAPTURED_FROM_USE - 1) + ["2", PLAIN, PLAIN]
    assert [record.message for record in caplog.records] == ["a CUDA graph could not be captured; no more will be"]
    # What was captured before goes on being replayed.
    graphs.run(good)
    assert good.asked[-1] == "1"
    third = Run()
    for _ in range(CAPTURED_FROM_USE + 1):
        graphs.run(third)
    assert set(third.asked) == {PLAIN}
