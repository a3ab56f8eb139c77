"""Which runs are captured as CUDA graphs and replayed: those that come again and again, up to a limit.

onnxruntime captures a graph per number (run option gpu_graph_id) and calling thread, and keeps it, since nobody here
tells it that a run is gone: hence the limit, and hence a run has to come often before it gets one. Everything else runs
kernel by kernel.
"""

import itertools
import logging
from typing import Protocol

import onnxruntime as ort

CAPTURED_FROM_USE = 4
_KERNEL_BY_KERNEL = -1
_log = logging.getLogger(__name__)


class Replayable(Protocol):
    """A run at fixed addresses.

    Attributes:
        uses: How often it has run.
        graph: Number of its captured graph, if it has been given one.
    """

    uses: int
    graph: int | None

    def run(self, options: ort.RunOptions) -> None:
        """Compute; returns when the outputs are there."""
        ...


def run_options(graph: int) -> ort.RunOptions:
    """Options of a run that captures or replays a graph."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


class CapturedGraphs:
    """The graphs of one session.

    Args:
        limit: How many at most; none are captured if it is 0.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._numbers = itertools.count(1)
        self._plain = run_options(_KERNEL_BY_KERNEL)
        self._options: dict[int, ort.RunOptions] = {}

    def __len__(self) -> int:
        return len(self._options)

    def run(self, run: Replayable) -> None:
        """Run, by its graph if it has one or is due to get one.

        A first run by a graph computes several times, to allocate, to capture and to replay: what a run writes must
        not depend on what it wrote before.
        """
        run.uses += 1
        if run.graph is None and run.uses >= CAPTURED_FROM_USE and len(self) < self._limit:
            self._capture(run)
        else:
            run.run(self._plain if run.graph is None else self._options[run.graph])

    def _capture(self, run: Replayable) -> None:
        number = next(self._numbers)
        options = run_options(number)
        try:
            run.run(options)
        except Exception as error:  # whatever it was: without graphs it is slower, and works
            self._limit = 0
            _log.warning(
                "a CUDA graph could not be captured; no more will be",
                exc_info=error,
                extra={"event": "graph_capture_failed"},
            )
            run.run(self._plain)
        else:
            self._options[number] = options
            run.graph = number
