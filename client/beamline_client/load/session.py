"""One run from its start to its report: the generator, what watches the server meanwhile, and the judgement."""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime

from beamline_client.load.assembly import Assembly
from beamline_client.load.coordinator import Interruption, Plan, RunObserver, measure
from beamline_client.load.grpc_target import BeamlineTargets
from beamline_client.load.live import View
from beamline_client.load.pinning import Pinned
from beamline_client.load.quality import AnswerBook
from beamline_client.load.recorder import Frame, Recorder, whole_windows_s, window_length_s
from beamline_client.load.records import Records
from beamline_client.load.report import RunReport
from beamline_client.load.setup import Load, Setup
from beamline_client.load.watch import Watch

Enough = Callable[[Recorder, float], bool]
"""Whether to stop, given what is known so many seconds after the start."""


class Session:
    """Runs loads against one server, one after the other.

    Args:
        setup: What is the same for all of them.
        view: Shows how it goes.
        interruption: Tells when to stop.
        log: Takes the records of all requests.
    """

    def __init__(
        self, setup: Setup, view: View, interruption: Interruption, log: Callable[[Records], None] | None = None
    ) -> None:
        self.setup = setup
        self.view = view
        self.interruption = interruption
        self._log = log

    def run(self, load: Load, enough: Enough | None = None) -> tuple[RunReport, AnswerBook]:
        """Sends a load; returns the report, and the answers.

        Args:
            load: What to send.
            enough: Whether to end before the schedule does.

        Raises:
            TargetUnusable: The server cannot be reached.
            GeneratorFailed: A process of the generator died.
        """
        setup, options = self.setup, self.setup.options
        workload = setup.draw(load)
        limit_s = setup.objective.limit_s if setup.objective else None
        window_s = load.window_s or window_length_s(load.duration_s)
        warm_up_s = whole_windows_s(min(options.warm_up_s, load.duration_s / 2), window_s)
        plan = Plan(
            title=load.title,
            targets=BeamlineTargets(options.server, options.channels, options.retries),
            workload=workload,
            intended_s=load.intended_s,
            callers=load.callers,
            frame=Frame(load.duration_s, window_s, warm_up_s, limit_s, workload.class_names, workload.class_of),
            workers=options.workers,
            max_in_flight=options.max_in_flight,
            cores=tuple(setup.pinning.generator_cores) if setup.pinning else (),
        )
        started_at = datetime.now(UTC)
        book = AnswerBook(workload.questions, setup.golden)
        pinned = contextlib.nullcontext() if setup.pinning is None else Pinned(setup.pinning)
        with pinned, Watch(setup.metrics_url, is_aside=bool(plan.cores)) as watch:
            observer = _Observer(book, watch, self._log, enough)
            measured = measure(plan, self.view, observer, self.interruption)
            seen = watch.finish(measured.recorder.outcomes, retries=options.retries)
        return Assembly(setup, load, plan, measured, book, seen).report(started_at), book


class _Observer(RunObserver):
    def __init__(
        self, book: AnswerBook, watch: Watch, log: Callable[[Records], None] | None, enough: Enough | None
    ) -> None:
        self._book = book
        self._watch = watch
        self._log = log
        self._enough = enough

    def started(self, began: float) -> None:
        self._watch.start(began)

    def learned(self, question: int, answer: int, texts: tuple[str, ...]) -> None:
        self._book.learn(question, answer, texts)

    def ended(self, records: Records) -> None:
        self._book.add(records)
        if self._log is not None:
            self._log(records)

    def enough(self, recorder: Recorder, elapsed_s: float) -> bool:
        return self._enough is not None and self._enough(recorder, elapsed_s)
