"""What the scheduler alone makes of overload: the engine's queue, admission and search beside a model of known cost.

    python benchmarks/overload_simulation.py [--seconds 20] [--plot docs/benchmarks/overload.svg]

Callers come at random, at multiples of the rate that the workers can bear, and time is counted, not spent: nothing but
the decisions of `server/beamline_server/engine` is under test, no thread, no network and no interpreter's lock. So it
shows what the rest of the server has to reach. Deterministic.
"""

import argparse
import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import Encoded, StepResult
from beamline_server.engine.errors import EngineError
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.pack import Extent, extent
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import Completed, EarlyStopping, Event, GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import ModelRules
from beamline_server.engine.table import IntArray, Table
from beamline_server.engine.workers import Engine

STEP_S, ROW_S, SENTENCE_S = 0.5e-3, 80e-6, 1e-3
"""Of a decoder step, of each row in it, and of encoding a sentence: the embedded model on a core without VNNI."""
WORKERS, ROWS, QUEUE_ROWS = 2, 128, 1024
BEAMS, SHORTEST, LONGEST = 4, 5, 20
LOADS = (0.7, 1.2, 2.0, 5.0, 10.0)
MAX_DURATION_S = 30.0
EOS, FIRST_WORD, VOCABULARY = 1, 2, 64
_UNLIKELY = -20.0
MEASURED = Path(__file__).parent.parent / "docs" / "benchmarks" / "overload.json"


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """What time it is."""
        return self.now


class CostlyModel:
    """A backend whose answer to a source is as long as the source's first number says, and which takes its time.

    Args:
        clock: Is moved on by what computing takes.
    """

    device = "cpu"
    encode_tokens = 256
    has_encoder = True

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """As `Backend.encode`."""
        self.clock.now += SENTENCE_S * len(sources)
        return Encoded([source[0] for source in sources], 0)

    def new_cache(self) -> "_Cache":
        """As `Backend.new_cache`."""
        return _Cache(self.clock)


class _Cache:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lengths: dict[int, int] = {}
        self.members: IntArray = np.zeros(0, np.int64)
        self.needed = Extent(0, 0, 0, 0, 0, 0)

    def enter(self, index: int, encoded: Encoded, number: int) -> None:
        self._lengths[index] = encoded.tensors[number]

    def leave(self, index: int) -> None:
        del self._lengths[index]

    def place(self, table: Table, going: Sequence[int] | None = None) -> Sequence["_Cache"]:
        self.members = np.array(list(self._lengths) if going is None else going, np.int64)
        self.needed = extent(table, self.members)
        return [self] if len(self.members) else []

    def run(self, table: Table, candidates: int, *, logprobs: bool = False) -> StepResult:
        del logprobs
        self._clock.now += STEP_S + ROW_S * self.needed.rows
        logprob = np.tile(-np.arange(1.0, candidates + 1, dtype=np.float32), (self.needed.rows, 1))
        token = np.tile(np.arange(FIRST_WORD, FIRST_WORD + candidates), (self.needed.rows, 1))
        row = 0
        for index in self.members.tolist():
            sequence = table.sequences[index]
            if sequence.length + 1 >= self._lengths[index]:  # whoever goes on is far worse than whoever ends
                token[row : row + sequence.rows, 0] = EOS
                logprob[row : row + sequence.rows, 1:] += _UNLIKELY
            row += int(sequence.rows)
        return StepResult(logprob, token)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the requests of a simulated time.

    Attributes:
        offered_per_s: How many came.
        in_time_per_s: How many were answered before their deadline.
        refused: Part of them that was refused.
        late: Part of them that was accepted and came to nothing.
    """

    offered_per_s: float
    in_time_per_s: float
    refused: float
    late: float


def simulated(rate_per_s: float, seconds: float, deadline_s: float | None, *, seed: int = 0) -> Outcome:
    """Let requests come at this rate for so many seconds; count those that came after the first quarter."""
    clock = Clock()
    ends: dict[RequestId, tuple[float, bool]] = {}

    def deliver(events: Sequence[Event]) -> None:
        ends.update((event.id, (clock.now, isinstance(event, Completed))) for event in events)

    rules = ModelRules(SearchRules(eos=(EOS,)), 0, VOCABULARY, max_source_tokens=64)
    model, capacity = CostlyModel(clock), Capacity(ROWS, 1 << 30)
    engine = Engine(
        [model] * WORKERS,
        rules,
        capacity,
        queue_rows=QUEUE_ROWS,
        deliver=deliver,
        observer=NullObserver(),
        clock=clock,
    )
    random_numbers = random.Random(seed)
    options = SearchOptions(beam_size=BEAMS, max_new_tokens=50, early_stopping=EarlyStopping.WHEN_FULL)
    came: dict[RequestId, float] = {}
    refused: set[RequestId] = set()
    # When each worker is free, and when the next request comes: whoever is first acts.
    coming = [(0.0, worker) for worker in range(WORKERS)] + [(0.0, WORKERS)]
    while coming:
        now, who = heapq.heappop(coming)
        clock.now = now
        if who < WORKERS:
            worker = engine._workers[who]
            worker._receive_all()
            worker._tell(worker.core.step())
            if now < seconds or not worker.core.idle:
                heapq.heappush(coming, (max(clock.now, now + 1e-4), who))
        elif now < seconds:
            number, length = RequestId(len(came) + len(refused)), random_numbers.randint(SHORTEST, LONGEST)
            limit = MAX_DURATION_S if deadline_s is None else deadline_s
            source = (length, *[FIRST_WORD] * (length + random_numbers.randint(-2, 2)))
            came[number] = now
            try:
                engine.submit([GenerationRequest(number, source, options, now + limit)])
            except EngineError:
                refused.add(number)
            heapq.heappush(coming, (now + random_numbers.expovariate(rate_per_s), WORKERS))
    counted = [number for number, at in came.items() if at >= seconds / 4]
    answered = [number for number in counted if number in ends and ends[number][1]]
    limit = MAX_DURATION_S if deadline_s is None else deadline_s
    in_time = [number for number in answered if ends[number][0] <= came[number] + limit]
    # Those that are answered are counted in the time in which answers came.
    span = max(seconds * 3 / 4, max((ends[number][0] for number in in_time), default=0.0) - seconds / 4)
    turned_away = sum(number in refused for number in counted)
    return Outcome(
        len(counted) / (seconds * 3 / 4),
        len(in_time) / span,
        turned_away / len(counted),
        1 - (turned_away + len(in_time)) / len(counted),
    )


def peak_per_s(seconds: float) -> float:
    """How many requests a second the workers answer when there are always enough of them."""
    return simulated(3000.0, seconds, None).in_time_per_s


def curve(seconds: float, deadline_s: float | None) -> dict[float, float]:
    """By load, as a part of the peak: the part of the peak that is answered in time."""
    peak = peak_per_s(seconds)
    return {load: simulated(load * peak, seconds, deadline_s).in_time_per_s / peak for load in LOADS}


def plot(curves: dict[str, dict[float, float]], target: Path) -> None:
    """Draw the curves, beside what was measured."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in curves.items():
        axes.plot(list(points), [100 * share for share in points.values()], marker="o", label=name)
    for series in json.loads(MEASURED.read_text("utf-8"))["series"]:
        loads = [float(load) for load in series["percent_of_peak"]]
        axes.plot(loads, list(series["percent_of_peak"].values()), linestyle="--", marker="x", label=series["name"])
    axes.set_xscale("log")
    axes.set_xticks(LOADS, [f"{load:g} ×" for load in LOADS])
    axes.minorticks_off()
    axes.set_ylim(0, 200)
    axes.set_xlabel("offered load, of what the server can bear")
    axes.set_ylabel("answered in time, % of that")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Simulate, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated, per load (default: %(default)g)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves into an SVG file, too")
    arguments = parser.parse_args()
    curves = {
        "scheduler alone, deadlines of 1 s": curve(arguments.seconds, 1.0),
        "scheduler alone, none": curve(arguments.seconds, None),
    }
    for name, points in curves.items():
        print(name + ": " + ", ".join(f"{load:g} x {share:.0%}" for load, share in points.items()))
    if arguments.plot is not None:
        plot(curves, arguments.plot)


if __name__ == "__main__":
    main()
