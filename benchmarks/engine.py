"""Where an engine's time goes, in process: sentences/s, the stages of a step, and the share outside `session.run`.

    python benchmarks/engine.py [--precision int8] [--workers 2] [--beam 4] [--repeat 3]
    python benchmarks/engine.py --host [--steps 400]

The first exports the embedded model into a temporary folder, runs its test sentences through the engine as fast as it
takes them and prints one line per repetition. The second measures the host alone, beside a model that takes no time
(engine_host.py). Let nothing else run meanwhile.
"""

import argparse
import gzip
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine_host import print_table

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_server.bundle import Bundle
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    Event,
    GenerationRequest,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.workers import Engine
from beamline_server.models.load import EngineOptions, build_backend, capacity, model_rules
from beamline_server.tokenizer import load_tokenizer
from offline.session_clock import Call, TimedBackend, session_calls

MODEL = Path(__file__).parent.parent / "models" / "fr-en"


@dataclass
class Tally(NullObserver):
    """Sums what the engine tells."""

    rows: int = 0
    sentences: int = 0
    steps: int = 0
    step_s: float = 0.0

    def stepped(self, seconds: float, rows: int, sentences: int) -> None:
        """Count a step."""
        self.sentences += sentences
        self.rows += rows
        self.steps += 1
        self.step_s += seconds


class Collector:
    """Receives events and tells when all requests have ended."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._lock = threading.Lock()
        self.completed: dict[int, Completed] = {}
        self.done = threading.Event()

    def __call__(self, events: Sequence[Event]) -> None:
        """Take events of one step."""
        with self._lock:
            self.completed |= {event.id: event for event in events if isinstance(event, Completed)}
            if len(self.completed) == self._expected:
                self.done.set()


def test_sources() -> list[str]:
    """The source sentences of the embedded model's test file."""
    with gzip.open(MODEL / "test.tsv.gz", "rt", encoding="utf-8") as stream:
        return [line.split("\t")[0] for line in stream]


def run(bundle: Bundle, sources: Sequence[str], *, workers: int, threads: int, beam: int) -> str:
    """One repetition; returns its line."""
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    search = SearchOptions(beam_size=beam, max_new_tokens=128, early_stopping=EarlyStopping.WHEN_FULL)
    requests = [
        GenerationRequest(RequestId(i), tuple(tokenizer.encode(source)), search) for i, source in enumerate(sources)
    ]
    backend = TimedBackend(build_backend(bundle, "cpu", threads))
    collector, tally = Collector(len(sources)), Tally()
    options = EngineOptions(workers=workers, threads=threads, rows=32 * beam)
    engine = Engine(
        [backend] * workers,
        model_rules(bundle.manifest),
        capacity(bundle, options),
        queue_rows=len(sources) * beam,
        deliver=collector,
        observer=tally,
    )
    with session_calls() as sessions:
        engine.start()
        began, cpu = time.perf_counter(), time.process_time()
        engine.submit(requests)
        collector.done.wait()
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        engine.stop(0)
    engine.check()
    tokens = sum(len(result.hypotheses[0].tokens) for result in collector.completed.values())
    outside = 1 - seconds(sessions) / (wall * workers)
    return (
        f"{len(sources) / wall:7.1f} sentences/s  {tokens / wall:7.0f} tokens/s  "
        f"{tally.rows / tally.steps:5.1f} rows/step  {stages(backend, sessions, tally)}; "
        f"encode {seconds(backend.encodes) / len(backend.encodes) * 1e3:5.2f} ms x {len(backend.encodes)}; "
        f"outside session.run {outside:5.1%} of the workers' time; "
        f"{cpu / len(sources) * 1e3:.2f} CPU ms/sentence"
    )


def stages(backend: TimedBackend, sessions: Sequence[Call], tally: Tally) -> str:
    """Milliseconds of a step, and of its stages: placing, packing and binding, the session, deciding."""
    session_s = seconds([call for call in sessions if call.method == "run_with_iobinding"])
    place_s, run_s = seconds(backend.placings), seconds(backend.runs)
    parts = {
        "place": place_s,
        "pack": run_s - session_s,
        "session": session_s,
        "decide": tally.step_s - place_s - run_s,
    }
    told = ", ".join(f"{name} {part / tally.steps * 1e3:.3f}" for name, part in parts.items())
    return f"step {tally.step_s / tally.steps * 1e3:5.2f} ms ({told})"


def seconds(calls: Sequence[Call]) -> float:
    """How long some calls took together."""
    return sum(call.seconds for call in calls)


def main() -> None:
    """Export, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int8", choices=["fp32", "int8"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bundle", type=Path, help="use this bundle instead of exporting the embedded model")
    parser.add_argument("--host", action="store_true", help="measure the host alone")
    parser.add_argument("--steps", type=int, default=400, help="of --host, per size")
    arguments = parser.parse_args()
    if arguments.host:
        print_table(arguments.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.bundle is None:
            bundle = export(MODEL, Path(folder) / "bundle", ExportOptions(arguments.precision), Progress())
        else:
            from beamline_server.bundle import load_bundle

            bundle = load_bundle(arguments.bundle)
        sources = test_sources()
        for _ in range(arguments.repeat):
            line = run(bundle, sources, workers=arguments.workers, threads=arguments.threads, beam=arguments.beam)
            print(f"{bundle.manifest.precision} {arguments.workers}x{arguments.threads} beam {arguments.beam}: {line}")


if __name__ == "__main__":
    main()
