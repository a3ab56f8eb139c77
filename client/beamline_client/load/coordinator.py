"""Runs the generator's processes through one plan and gathers what they report."""

import contextlib
import multiprocessing
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

import numpy as np
import numpy.typing as npt

from beamline_client.load import histograms
from beamline_client.load.aside import aside
from beamline_client.load.generator import (
    Ended,
    Finished,
    Part,
    Ready,
    Start,
    Stop,
    Unusable,
    memory_mib,
    run_generator,
)
from beamline_client.load.live import Snapshot, View
from beamline_client.load.recorder import Frame, Recorder
from beamline_client.load.records import RECORD, Records
from beamline_client.load.report import GeneratorProcess
from beamline_client.load.target import TargetFactory, TargetUnusable
from beamline_client.load.workload import Workload

_READY_WITHIN_S = 60.0
_HEAD_START_S = 0.2  # between the word to start and the zero of the run, so that all processes have heard it
_LOOK_EVERY_S = 0.25
_RATE_OVER_S = 2.0
_JOIN_WITHIN_S = 10.0
_MOST_MESSAGES = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """One run, decided in all its parts."""

    title: str
    """For the person who watches."""
    targets: TargetFactory
    workload: Workload
    """As many requests as will be sent; a closed loop goes through them over and over."""
    intended_s: npt.NDArray[np.float64] | None
    """When to send each, ascending, from the start of the run, shape [requests]; None is a closed loop."""
    callers: int
    """Of a closed loop."""
    frame: Frame
    workers: int
    max_in_flight: int
    """Of all workers together."""
    cores: tuple[int, ...]
    """For the generator; none is wherever the system likes."""

    def parts(self) -> list[Part]:
        """Its division among the workers: arrivals in turn, so that each has the whole mixture."""
        numbers = np.arange(len(self.workload.question), dtype=np.uint32)
        return [
            Part(
                name=f"generator {worker}",
                targets=self.targets,
                workload=self.workload.part(worker, self.workers),
                arrivals=numbers[worker :: self.workers],
                intended_s=None if self.intended_s is None else self.intended_s[worker :: self.workers],
                callers=len(range(worker, self.callers, self.workers)),
                duration_s=self.frame.duration_s,
                max_in_flight=max(1, self.max_in_flight // self.workers),
                cores=self.cores,
            )
            for worker in range(self.workers)
        ]


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a plan."""

    recorder: Recorder
    seconds: float
    """From the start to the end of the schedule, or to the moment in which the run was stopped."""
    interrupted: bool
    processes: list[GeneratorProcess]
    messages: Mapping[str, int]
    """Reasons of failures, in words, and how often."""


class RunObserver:
    """What else happens in the course of a run; by default nothing. Called on the coordinator's thread."""

    def started(self, began: float) -> None:
        """The run is about to start; `began` is its zero on `time.monotonic`."""

    def learned(self, question: int, answer: int, texts: tuple[str, ...]) -> None:
        """A question has an answer, of this hash, that its process had not seen before."""

    def ended(self, records: Records) -> None:
        """Some requests have ended; the recorder knows them already."""

    def enough(self, recorder: Recorder, elapsed_s: float) -> bool:
        """Whether to send no more, so many seconds after the start."""
        del recorder, elapsed_s
        return False


class GeneratorFailed(Exception):
    """A process of the generator ended before its work; the text is one line."""


class Interruption:
    """Whether somebody has asked to stop: Ctrl-C or SIGTERM. A second time, it is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def watched(self) -> Iterator["Interruption"]:
        """Handles the two signals within; outside the main thread nothing is handled."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def measure(plan: Plan, view: View, observer: RunObserver, interruption: Interruption) -> Measured:
    """Sends the plan and waits until every request has ended.

    Args:
        plan: What to send.
        view: Is told how it goes.
        observer: The same.
        interruption: Watched; when it is asked for, what is in flight has a moment to end.

    Raises:
        TargetUnusable: The target cannot be reached.
        GeneratorFailed: A process of the generator died.
        KeyboardInterrupt: It was interrupted before its start, or twice.
    """
    with _Processes(plan.parts()) as processes:
        processes.wait_until_ready(interruption)
        with aside(plan.cores):
            return _Measurement(plan, view, observer, processes).run(interruption)


class _Processes:
    """The generator's processes, with a connection to each. Leaving the `with` block ends them."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._running: list[BaseProcess] = []
        self.names: dict[Connection, str] = {}
        self.requests: dict[Connection, int] = {}

    def __enter__(self) -> "_Processes":
        # "spawn", for gRPC does not survive a fork. That SIGINT is blocked is inherited: Ctrl-C is for the coordinator,
        # which gets it when they have started.
        context = multiprocessing.get_context("spawn")
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for part in self._parts:
                ours, theirs = context.Pipe()
                process = context.Process(target=run_generator, args=(theirs, part), name=part.name, daemon=True)
                process.start()
                theirs.close()
                self._running.append(process)
                self.names[ours], self.requests[ours] = part.name, 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self.names:
            connection.close()  # whoever still runs sees it and ends
        for process in self._running:
            process.join(0 if any(exception) else _JOIN_WITHIN_S)
            if process.is_alive():
                process.terminate()
                process.join()

    def wait_until_ready(self, interruption: Interruption) -> None:
        waiting = set(self.names)
        ends = time.monotonic() + _READY_WITHIN_S
        while waiting:
            if interruption.asked:
                raise KeyboardInterrupt
            if time.monotonic() > ends:
                raise GeneratorFailed(f"the generator was not ready within {_READY_WITHIN_S:g} s: lower --workers")
            for connection in wait(list(waiting), _LOOK_EVERY_S):
                assert isinstance(connection, Connection)
                message = self.receive(connection)
                if isinstance(message, Unusable):
                    raise TargetUnusable(message.text)
                assert isinstance(message, Ready)
                waiting.discard(connection)

    def receive(self, connection: Connection) -> object:
        try:
            return connection.recv()
        except (EOFError, OSError):
            raise GeneratorFailed(
                f"{self.names[connection]} ended before its work was done; what it wrote to stderr tells why"
            ) from None

    def tell(self, message: Start | Stop, connections: Iterable[Connection]) -> None:
        for connection in connections:
            with contextlib.suppress(BrokenPipeError):  # it has just ended by itself
                connection.send(message)


class _Measurement:
    def __init__(self, plan: Plan, view: View, observer: RunObserver, processes: _Processes) -> None:
        self._plan = plan
        self._view = view
        self._observer = observer
        self._processes = processes
        self._recorder = Recorder(plan.frame, plan.intended_s)
        self._messages: Counter[str] = Counter()
        self._in_flight = dict.fromkeys(processes.names, 0)
        self._finished: dict[Connection, Finished] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._own_memory: list[float] = []

    def run(self, interruption: Interruption) -> Measured:
        began = time.monotonic() + _HEAD_START_S
        self._observer.started(began)
        self._own_memory.append(memory_mib())
        own_cpu_s = time.process_time()
        self._processes.tell(Start(began), list(self._processes.names))
        stopped_s, own_share = None, None
        is_hurried = False
        while waiting := [connection for connection in self._processes.names if connection not in self._finished]:
            for connection in wait(waiting, _LOOK_EVERY_S):
                assert isinstance(connection, Connection)
                self._take(connection)
            elapsed_s = time.monotonic() - began
            self._show(elapsed_s)
            if len(self._own_memory) == 1 and elapsed_s >= self._plan.frame.duration_s / 4:
                self._own_memory.append(memory_mib())
            is_over = elapsed_s >= self._plan.frame.duration_s
            if interruption.asked and not is_hurried:
                is_hurried = True
                stopped_s = elapsed_s if stopped_s is None else stopped_s
                self._processes.tell(Stop(drain=False), waiting)
            elif stopped_s is None and not is_over and self._observer.enough(self._recorder, elapsed_s):
                stopped_s = elapsed_s
                self._processes.tell(Stop(drain=True), waiting)
            if own_share is None and (is_over or stopped_s is not None):
                own_share = (time.process_time() - own_cpu_s) / max(elapsed_s, 1e-9)
        if own_share is None:
            own_share = (time.process_time() - own_cpu_s) / max(time.monotonic() - began, 1e-9)
        return Measured(
            recorder=self._recorder,
            seconds=self._plan.frame.duration_s if stopped_s is None else min(stopped_s, self._plan.frame.duration_s),
            interrupted=interruption.asked,
            processes=[*self._generators(), self._coordinator(own_share)],
            messages=dict(self._messages.most_common(_MOST_MESSAGES)),
        )

    def _take(self, connection: Connection) -> None:
        message = self._processes.receive(connection)
        if isinstance(message, Finished):
            self._finished[connection] = message
            self._in_flight[connection] = 0
            return
        assert isinstance(message, Ended)
        for question, answer, texts in message.answers:
            self._observer.learned(question, answer, texts)
        records = np.frombuffer(message.records, RECORD)
        self._recorder.add(records)
        self._observer.ended(records)
        self._messages.update(dict(message.messages))
        self._in_flight[connection] = message.in_flight
        self._processes.requests[connection] += len(records)

    def _show(self, elapsed_s: float) -> None:
        self._note_rate(elapsed_s)
        if not self._view.is_due():
            return
        recorder = self._recorder
        answered = recorder.answered.get_total_count()
        lag = recorder.lag.get_total_count()
        in_flight = sum(self._in_flight.values())
        planned = None if self._plan.intended_s is None else len(self._plan.intended_s)
        self._view.update(
            Snapshot(
                title=self._plan.title,
                elapsed_s=max(elapsed_s, 0.0),
                duration_s=self._plan.frame.duration_s,
                sent=recorder.ended + in_flight,
                planned=planned,
                in_flight=in_flight,
                outcomes={outcome.label: count for outcome, count in sorted(recorder.outcomes.items())},
                answered_per_s=self._recent_rate(),
                p50_ms=histograms.percentile_ms(recorder.answered, 50) if answered else None,
                p99_ms=histograms.percentile_ms(recorder.answered, 99) if answered else None,
                lag_p99_ms=histograms.percentile_ms(recorder.lag, 99) if lag and planned is not None else None,
            )
        )

    def _note_rate(self, elapsed_s: float) -> None:
        self._recent.append((elapsed_s, self._recorder.codes[0]))
        while elapsed_s - self._recent[0][0] > _RATE_OVER_S:
            self._recent.popleft()

    def _recent_rate(self) -> float:
        (first_s, first), (last_s, last) = self._recent[0], self._recent[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def _generators(self) -> list[GeneratorProcess]:
        return [
            GeneratorProcess(
                name=name,
                requests=self._processes.requests[connection],
                cpu_share=self._finished[connection].cpu_s / self._finished[connection].seconds,
                memory_start_mib=self._finished[connection].memory_start_mib,
                memory_quarter_mib=self._finished[connection].memory_quarter_mib,
                memory_end_mib=self._finished[connection].memory_end_mib,
            )
            for connection, name in self._processes.names.items()
        ]

    def _coordinator(self, cpu_share: float) -> GeneratorProcess:
        memory_end = memory_mib()
        return GeneratorProcess(
            name="coordinator",
            requests=0,
            cpu_share=cpu_share,
            memory_start_mib=self._own_memory[0],
            memory_quarter_mib=self._own_memory[1] if len(self._own_memory) > 1 else memory_end,
            memory_end_mib=memory_end,
        )
