"""How the online comparison is measured: each batching tuned, then the three servers in turn."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from online_results import SAME_ANSWERS_OF, Machine, Results, Search, Tuning, search_of, with_figures
from online_servers import BEAM, LABELS, MAX_NEW_TOKENS, Models, System, instruction_sets, serving
from online_tuning import AT_A_TIME, BATCHES, DELAYS_MS, Batching, Try, best, candidates, first, next_try, rounds
from online_workloads import Workload

from beamline_client import Client, SearchOptions
from beamline_client.load.coordinator import Interruption
from beamline_client.load.environment import describe, version
from beamline_client.load.find_max import FindMaxOptions, Patience, find_max
from beamline_client.load.live import Snapshot
from beamline_client.load.pinning import generator_cores
from beamline_client.load.recorder import whole_windows_s
from beamline_client.load.report import FindMaxReport
from beamline_client.load.session import Session
from beamline_client.load.setup import LoadOptions, check_setup, open_load
from beamline_client.load.workload import WorkloadOptions
from beamline_server.bundle import load_bundle

SLO = "p99<=500ms,errors<=0.1%"
LEAST_SAME = 0.8
"""int8 differs a little from engine to engine; a model that begins otherwise differs in most sentences."""
_AT_ONCE = 64
SEED = 0  # of tunings; repetitions have their own, from 1

_WARM_UP_S = 2.0

# For the estimate: seconds that a server's start and a tried rate take beside the windows, the share of its windows
# that a rate is tried for, and how many rates a search and a tuning try.
_START_S, _TRY_S, _WINDOWS_USED = 2.0, 5.0, 0.45
_SEARCH_TRIES, _QUICK_TRIES, _CANDIDATE_TRIES, _CLIMBS = 9, 5, 2, 3


@dataclass(frozen=True, slots=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        search: Of the figures that count.
        tuning: Of the rates that are tried on the way to a good batching.
        tuned: Whether there is a tuning at all.
        repeat: Searches of each server.
    """

    search: FindMaxOptions
    tuning: FindMaxOptions
    tuned: bool
    repeat: int


def effort(*, quick: bool, repeat: int | None) -> Effort:
    """Of a run in earnest, or of a trial."""
    if quick:
        search = FindMaxOptions(precision=1.0, window_s=1.0, max_windows=3, stability=0.5)
        return Effort(search, search, tuned=False, repeat=repeat or 1)
    tuning = FindMaxOptions(precision=0.15, window_s=2.0, max_windows=5)
    # Many short searches that take turns rather than few long ones: the machine changes from minute to minute.
    search = FindMaxOptions(window_s=3.0, max_windows=6)
    return Effort(search, tuning, tuned=True, repeat=repeat or 5)


def estimated_s(effort: Effort, workloads: int) -> float:
    """About how long a comparison takes, in seconds."""

    def per_try(options: FindMaxOptions) -> float:
        return _TRY_S + _WINDOWS_USED * options.max_windows * options.window_s

    search_tries = _SEARCH_TRIES if effort.tuned else _QUICK_TRIES
    searches = len(System) * effort.repeat * (_START_S + search_tries * per_try(effort.search))
    grid = len(BATCHES) * len(DELAYS_MS) + 3
    settings = 2 * grid + len(AT_A_TIME)
    tries = len(System) * (_SEARCH_TRIES + _CLIMBS) + settings * _CANDIDATE_TRIES
    tunings = settings * _START_S + tries * per_try(effort.tuning) if effort.tuned else 0.0
    return workloads * (searches + tunings)


class Notes:
    """A `View` of lines, each with the time since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def is_due(self) -> bool:
        """Never: what moves would take time from the generator."""
        return False

    def update(self, snapshot: Snapshot) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Write a line."""
        sys.stderr.write(f"{(time.monotonic() - self._began) / 60:6.1f} min  {text}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Stopped(Exception):
    """Somebody has asked to stop."""


class Comparison:
    """Measures, and writes what is known after each step.

    Args:
        models: To serve.
        effort: How thoroughly.
        results: What has been measured before, and is not measured again.
        output: Of JSON.
    """

    def __init__(self, models: Models, effort: Effort, results: Results, output: Path) -> None:
        self._models = models
        self._effort = effort
        self._server_cores = results.machine.server_cores
        self._generator_cores = results.machine.generator_cores
        self.results = results
        self._output = output
        self._view = Notes()
        self._interruption = Interruption()
        self._starts: dict[tuple[str, System], float] = {}

    def run(self, workloads: Sequence[Workload]) -> None:
        """Tune, then let the three take turns. Stopped if it is interrupted."""
        minutes = estimated_s(self._effort, len(workloads)) / 60
        self._view.note(f"about {minutes:.0f} minutes; results go to {self._output.name} after every step")
        with tempfile.TemporaryDirectory() as folder, self._interruption.watched():
            paths = {workload.name: workload.write(Path(folder)) for workload in workloads}
            if not self.results.same_answers:
                self._check_answers(workloads[0])
            for workload in workloads:
                for system in System:
                    self._tune(workload, paths[workload.name], system)
            for repetition in range(self._effort.repeat):
                for workload in workloads:
                    for system in System:
                        self._search(workload, paths[workload.name], system, repetition)

    def _check_answers(self, workload: Workload) -> None:
        """Ask all servers the same.

        Raises:
            RuntimeError: one computes something else; then its speed says nothing.
        """
        sources = [sentence.source for sentence in workload.sentences[:SAME_ANSWERS_OF]]
        search = SearchOptions(beam_size=BEAM, max_new_tokens=MAX_NEW_TOKENS)
        answers = {}
        for system in System:
            with (
                serving(system, self._first(system), self._models, self._server_cores) as server,
                Client(server.target) as client,
            ):
                parts = (sources[start : start + _AT_ONCE] for start in range(0, len(sources), _AT_ONCE))
                answers[system] = [each.text for part in parts for each in client.generate(part, search=search)]
        ours = answers.pop(System.CONTINUOUS)
        same = {system: same_share(ours, theirs) for system, theirs in answers.items()}
        self._view.note("the same answers as Beamline: " + ", ".join(f"{LABELS[s]} {v:.1%}" for s, v in same.items()))
        if min(same.values()) < LEAST_SAME:
            raise RuntimeError("the servers do not compute the same: is the model converted as ct2_convert.py does it?")
        self._keep(same_answers=same)

    def _first(self, system: System) -> Batching:
        return first(len(self._server_cores), continuous=system is System.CONTINUOUS)

    def _chosen(self, workload: Workload, system: System) -> Batching:
        known = {(each.workload, each.system): each.chosen for each in self.results.tunings}
        return known.get((workload.name, system), self._first(system))

    def _search(self, workload: Workload, path: Path, system: System, repetition: int) -> None:
        if any(
            (each.workload, each.system, each.repetition) == (workload.name, system, repetition)
            for each in self.results.searches
        ):
            return
        batching = self._chosen(workload, system)
        about = f"{LABELS[system]}, {batching}"
        self._view.note(f"repetition {repetition + 1} of {self._effort.repeat}, {workload.name}: {about}")
        start = self._starts.get((workload.name, system))
        options = replace(self._effort.search, start_per_s=start)
        with self._session(workload, path, system, batching, seed=repetition + 1) as session:
            found = search_of(self._highest(session, options), workload.name, system, batching, repetition)
        if found.highest_per_s is not None:
            self._starts[workload.name, system] = found.highest_per_s
        self._keep(searches=[*self.results.searches, found])
        rate = "none" if found.highest_per_s is None else f"{found.highest_per_s:.1f}/s"
        self._view.note(f"  highest rate: {rate}{'' if found.valid else ' [INVALID]'}")

    def _tune(self, workload: Workload, path: Path, system: System) -> None:
        if not self._effort.tuned or any(
            (each.workload, each.system) == (workload.name, system) for each in self.results.tunings
        ):
            return
        tries = [self._base(workload, path, system)]
        isas = instruction_sets(Path("/proc/cpuinfo").read_text("utf-8", "replace"))
        for name in rounds(continuous=system is System.CONTINUOUS, ct2=system is System.CTRANSLATE2, isas=isas):
            some = list(candidates(name, best(tries).batching, isas))
            for candidate in some:
                self._climb(workload, path, system, candidate, tries)
        chosen = best(tries)
        self._starts[workload.name, system] = chosen.rate_per_s
        self._view.note(f"  chosen: {chosen.batching}")
        tuning = Tuning(workload=workload.name, system=system, tries=tries, chosen=chosen.batching)
        self._keep(tunings=[*self.results.tunings, tuning])

    def _base(self, workload: Workload, path: Path, system: System) -> Try:
        """The rate that the first candidate is good for: what the others have to better."""
        batching = self._first(system)
        self._view.note(f"tuning {LABELS[system]}, {workload.name}: {batching}")
        with self._session(workload, path, system, batching, seed=SEED) as session:
            report = self._highest(session, self._effort.tuning)
        if report.highest_rate_per_s is None:
            raise RuntimeError(f"{LABELS[system]} with {batching} meets {SLO} at no rate")
        return Try(batching, report.highest_rate_per_s, met=True)

    def _climb(self, workload: Workload, path: Path, system: System, candidate: Batching, tries: list[Try]) -> None:
        with self._session(workload, path, system, candidate, seed=SEED) as session:
            while (planned := next_try([candidate], tries)) is not None:
                done = self._try(session, planned)
                tries.append(done)
                self._view.note(
                    f"  {candidate}: {done.rate_per_s:.1f}/s, p99 {done.p99_ms or float('nan'):.0f} ms, "
                    f"{'met' if done.met else 'missed'}"
                )

    def _highest(self, session: Session, options: FindMaxOptions) -> FindMaxReport:
        assert session.setup.objective is not None
        report = find_max(session, session.setup.objective, options)
        self._stop_if_asked()
        return report

    def _try(self, session: Session, planned: Try) -> Try:
        options, objective = self._effort.tuning, session.setup.objective
        assert objective is not None
        warm_up_s = whole_windows_s(session.setup.options.warm_up_s, options.window_s)
        duration_s = warm_up_s + options.max_windows * options.window_s + (objective.limit_s or 0.0)
        load = replace(
            open_load(session.setup.options, f"{planned.rate_per_s:.2f}", duration_s), window_s=options.window_s
        )
        assert load.intended_s is not None
        patience = Patience(objective, options, warm_up_s, int((load.intended_s >= warm_up_s).sum()))
        report, _ = session.run(load, patience.enough)
        self._stop_if_asked()
        assert report.slo is not None
        p99_ms = report.latency.percentiles_ms.get("99") if report.latency else None
        return replace(planned, met=report.slo.met and not patience.hopeless, p99_ms=p99_ms)

    @contextmanager
    def _session(
        self, workload: Workload, path: Path, system: System, batching: Batching, seed: int
    ) -> Iterator[Session]:
        """A server on its cores, and what puts load on it."""
        with serving(system, batching, self._models, self._server_cores) as server:
            options = LoadOptions(
                server=server.target,
                sentences=path,
                seed=seed,
                warm_up_s=_WARM_UP_S,
                workload=WorkloadOptions(lengths=workload.lengths, beams=str(BEAM), max_new_tokens=MAX_NEW_TOKENS),
                pin=",".join(map(str, self._generator_cores)),
                slo=SLO,
                metrics="off",
            )
            yield Session(check_setup(options), self._view, self._interruption)

    def _stop_if_asked(self) -> None:
        if self._interruption.asked:
            raise Stopped

    def _keep(self, **changes: Sequence[Tuning] | Sequence[Search] | Mapping[System, float]) -> None:
        self.results = self.results.model_copy(update=changes)
        self._output.write_text(with_figures(self.results).model_dump_json(indent=1) + "\n", "utf-8")


def same_share(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """The share of answers that are the same text, 0 to 1."""
    return sum(one == other for one, other in zip(ours, theirs, strict=True)) / len(ours)


def empty_results(models: Models, workloads: Sequence[Workload], *, quick: bool) -> Results:
    """What is known before anything is measured."""
    generator = generator_cores(None, frozenset(os.sched_getaffinity(0)))
    environment = describe()
    names = ("onnxruntime", "ctranslate2", "grpcio", "numpy")
    return Results(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        slo=SLO,
        beam=BEAM,
        max_new_tokens=MAX_NEW_TOKENS,
        precision=load_bundle(models.bundle).manifest.precision,
        machine=Machine(
            cpu=environment.cpu,
            cores=environment.cores,
            server_cores=sorted(os.sched_getaffinity(0) - generator),
            generator_cores=sorted(generator),
            platform=environment.platform,
            versions={"python": environment.python, **{name: version(name) for name in names}},
            commit=environment.commit,
        ),
        workloads={workload.name: workload.about for workload in workloads},
        same_answers={},
        tunings=[],
        searches=[],
    )
