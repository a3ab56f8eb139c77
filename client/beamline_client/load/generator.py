"""One process of the load generator: sends its part of the plan on time, and reports every end.

Its event loop uses `select`, whose time-outs are exact to microseconds; asyncio rounds those of epoll up to whole
milliseconds, which would make every request late.
"""

import asyncio
import contextlib
import gc
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from beamline_client.load.pinning import pin_this_process
from beamline_client.load.quality import answer_hash
from beamline_client.load.records import PACKED
from beamline_client.load.target import Answer, Outcome, Target, TargetFactory, TargetUnusable
from beamline_client.load.workload import Workload

_FLUSH_EVERY_S = 0.25
_LAUNCHES_PER_TURN = 8  # then answers get their turn, also while the generator is late
_PIECE = 4096  # arrivals turned into Python floats at a time
_LAST_ANSWERS_S = 2.0  # for requests in flight when the run is interrupted
_MOST_ANSWERS = 4  # different ones to a question whose texts are passed on; a server may answer anew each time
_MOST_MESSAGES = 20  # different ones per flush, for they can hold ids
_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Part:
    """What one process sends: every n-th request of the plan."""

    name: str
    targets: TargetFactory
    workload: Workload
    arrivals: npt.NDArray[np.uint32]
    """Numbers of its requests in the whole plan, shape [n]."""
    intended_s: npt.NDArray[np.float64] | None
    """When to send them, ascending, from the start of the run, shape [n]; None is a closed loop."""
    callers: int
    """Of a closed loop: how many send, each when its answer has come; they go through the requests over and over."""
    duration_s: float
    max_in_flight: int
    """Requests beyond it are not sent, and recorded as such."""
    cores: tuple[int, ...] = ()
    """To keep to; none is wherever the system likes."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The process is connected and waits for `Start`."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """The process cannot start; it ends."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Requests that have ended, and answers that this process had not seen before."""

    records: bytes
    """Of dtype RECORD."""
    answers: tuple[tuple[int, int, tuple[str, ...]], ...]
    """Question, hash and texts; always before, or with, the first record that mentions the hash."""
    messages: tuple[tuple[str, int], ...]
    """Reasons of failures, in words, and how often."""
    in_flight: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything is sent, answered and reported; the process ends."""

    seconds: float
    """From the start to the last send."""
    cpu_s: float
    """Spent in them."""
    memory_start_mib: float
    memory_quarter_mib: float
    memory_end_mib: float


@dataclass(frozen=True, slots=True)
class Start:
    """Begin."""

    at: float
    """The zero of the run on `time.monotonic`, which on one machine is the same in all processes."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Send no more."""

    drain: bool
    """Whether to wait for what is in flight, however long its deadlines allow; otherwise for a moment."""


def run_generator(connection: Connection, part: Part) -> None:
    """The main function of a generator process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator says `Stop`
    if part.cores:
        pin_this_process(part.cores)
    with (
        connection,
        contextlib.suppress(BrokenPipeError, EOFError),  # the coordinator is gone: so are we
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner,
    ):
        runner.run(_Generator(connection, part).run())


class _Generator:
    def __init__(self, connection: Connection, part: Part) -> None:
        self._connection = connection
        self._part = part
        self._target: Target = part.targets(part.workload.questions)
        # A full pipe must not hold up the event loop.
        self._postman = ThreadPoolExecutor(1, "postman")
        self._records = bytearray()
        self._known: dict[int, set[int]] = {}
        self._answers: list[tuple[int, int, tuple[str, ...]]] = []
        self._messages: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = 0.0
        self._stopping = False

    async def run(self) -> None:
        try:
            try:
                await self._target.prepare()
            except TargetUnusable as error:
                self._connection.send(Unusable(str(error)))
                return
            self._connection.send(Ready())
            start = await asyncio.to_thread(self._connection.recv)
            if isinstance(start, Start):
                await self._generate(start)
        finally:
            await self._target.close()
            self._postman.shutdown()

    async def _generate(self, start: Start) -> None:
        self._began = start.at
        gc.collect()
        gc.freeze()  # what lives as long as the run is not looked at again
        memory_start, memory_quarter = memory_mib(), [_NAN]
        loop = asyncio.get_running_loop()
        loop.call_at(start.at + self._part.duration_s / 4, lambda: memory_quarter.__setitem__(0, memory_mib()))
        cpu_s = time.process_time()
        sending = loop.create_task(self._open() if self._part.intended_s is not None else self._closed())
        flushing = loop.create_task(self._flush_now_and_then())
        stopped = asyncio.Event()
        loop.add_reader(self._connection.fileno(), stopped.set)
        try:
            await _first_of(sending, stopped)
            # Without the wait for the last answers, which would make a busy process look idle.
            seconds, cpu_s = max(time.monotonic() - start.at, 1e-9), time.process_time() - cpu_s
            await self._drain(sending, stopped)
        finally:
            loop.remove_reader(self._connection.fileno())
            flushing.cancel()
        self._flush()
        memory_end = memory_mib()
        if np.isnan(memory_quarter[0]):
            memory_quarter[0] = memory_end
        finished = Finished(seconds, cpu_s, memory_start, memory_quarter[0], memory_end)
        await loop.run_in_executor(self._postman, self._connection.send, finished)

    async def _drain(self, sending: "asyncio.Task[None]", stopped: asyncio.Event) -> None:
        """Waits for what is in flight; a `Stop`, now or meanwhile, ends the sending and may end the wait."""
        while self._tasks or stopped.is_set():
            if stopped.is_set():
                stopped.clear()
                if self._connection.poll() and not self._stop_waits(sending):
                    break
            else:
                answers = asyncio.get_running_loop().create_task(_all_of(set(self._tasks)))
                await _first_of(answers, stopped)
                answers.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_LAST_ANSWERS_S)
        for task in set(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def _stop_waits(self, sending: "asyncio.Task[None]") -> bool:
        """Takes a `Stop`; whether it is to wait for all answers."""
        stop = self._connection.recv()
        self._stopping = True
        sending.cancel()
        return isinstance(stop, Stop) and stop.drain

    async def _open(self) -> None:
        launched = 0
        for position, intended_s in self._schedule():
            while (wait_s := self._began + intended_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
                launched = 0
            if len(self._tasks) >= self._part.max_in_flight:
                self._record(position, intended_s, _NAN, _NAN, Answer(Outcome.NOT_SENT, 0))
            else:
                self._launch(self._one(position, intended_s))
            launched += 1
            if launched % _LAUNCHES_PER_TURN == 0:
                await asyncio.sleep(0)

    def _schedule(self) -> Iterator[tuple[int, float]]:
        times = self._part.intended_s
        assert times is not None
        for first in range(0, len(times), _PIECE):
            yield from enumerate(times[first : first + _PIECE].tolist(), start=first)

    async def _closed(self) -> None:
        positions = iter(_over_and_over(len(self._part.arrivals)))
        wait_s = self._began - time.monotonic()
        await asyncio.sleep(max(wait_s, 0))

        async def caller() -> None:
            while not self._stopping and (now_s := time.monotonic() - self._began) < self._part.duration_s:
                await self._one(next(positions), now_s)

        callers = [self._launch(caller()) for _ in range(self._part.callers)]
        if not callers:  # more processes than callers
            return
        await asyncio.wait(callers)

    def _launch(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _one(self, position: int, intended_s: float) -> None:
        request = self._part.workload.request(position)
        sent_s = time.monotonic() - self._began
        try:
            answer = await self._target.call(request)
        except asyncio.CancelledError:  # the run is interrupted
            done_s = time.monotonic() - self._began
            self._record(position, intended_s, sent_s, done_s, Answer(Outcome.CANCELLED, 1))
            raise
        except Exception as error:  # a fault of the target's; the request has an end all the same
            answer = Answer(Outcome.ERROR, 2, f"the load generator failed: {error!r}")
        self._record(position, intended_s, sent_s, time.monotonic() - self._began, answer)

    def _record(self, position: int, intended_s: float, sent_s: float, done_s: float, answer: Answer) -> None:
        question = int(self._part.workload.question[position])
        answer_id = 0
        if answer.outcome is Outcome.OK:
            answer_id = answer_hash(answer.texts)
            known = self._known.setdefault(question, set())
            if answer_id not in known and len(known) < _MOST_ANSWERS:
                known.add(answer_id)
                self._answers.append((question, answer_id, answer.texts))
        elif answer.message:
            message = answer.message if len(self._messages) < _MOST_MESSAGES else "(others)"
            self._messages[message] = self._messages.get(message, 0) + 1
        # Packed at once: to convert many at each flush would keep requests waiting that are due then.
        self._records += PACKED.pack(
            int(self._part.arrivals[position]),
            question,
            int(answer.outcome),
            answer.code,
            intended_s,
            sent_s,
            done_s,
            _or_nan(answer.first_piece_s),
            _or_nan(answer.queue_s),
            _or_nan(answer.encode_s),
            _or_nan(answer.decode_s),
            answer.steps,
            answer.tokens,
            len(answer.texts[0]) if answer.texts else 0,
            answer_id,
        )

    async def _flush_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_EVERY_S)
            self._flush()

    def _flush(self) -> None:
        records, self._records = self._records, bytearray()
        answers, self._answers = self._answers, []
        messages, self._messages = self._messages, {}
        ended = Ended(bytes(records), tuple(answers), tuple(messages.items()), in_flight=len(self._tasks))
        # Not awaited: a wait that is cancelled at the end of the run would take back what is not yet on its way.
        self._postman.submit(self._connection.send, ended)


async def _first_of(task: "asyncio.Task[None]", event: asyncio.Event) -> None:
    """Waits until the task has ended or the event is set."""
    waiting = asyncio.get_running_loop().create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _all_of(tasks: "set[asyncio.Task[None]]") -> None:
    await asyncio.wait(tasks)


def memory_mib() -> float:
    """Resident memory of this process, in MiB; where the system does not tell, the most that it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _over_and_over(count: int) -> Iterator[int]:
    while True:
        yield from range(count)


def _or_nan(value: float | None) -> float:
    return _NAN if value is None else value
