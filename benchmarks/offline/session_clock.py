"""What an engine's threads do when: the time inside onnxruntime, and what a backend's calls take."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnxruntime

from beamline_server.engine.backend import Backend, Bucket, Cache, Encoded, StepResult
from beamline_server.engine.ort import pieces
from beamline_server.engine.ort.c_api import Binding
from beamline_server.engine.table import Table


@dataclass(frozen=True, slots=True)
class Call:
    """A call on one thread: times of `time.perf_counter`, and the CPU time of that thread meanwhile, in seconds.

    Attributes:
        thread: Its number.
        began: When.
        ended: When.
        cpu_s: CPU time.
        rows: Of a decoder step, N.
        method: Of a session, its name.
    """

    thread: int
    began: float
    ended: float
    cpu_s: float
    rows: int | None = None
    method: str = ""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


def timed(call: Callable[..., Any], note: Callable[[Call], None], *, rows: int | None = None, method: str = "") -> Any:
    """A function that does the same and notes each call."""

    def wrapper(*args: Any, **options: Any) -> Any:
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            return call(*args, **options)
        finally:
            cpu, ended = time.thread_time() - cpu, time.perf_counter()
            note(Call(threading.get_ident(), began, ended, cpu, rows, method))

    return wrapper


class TimedBackend:
    """A backend that notes the calls of another.

    Attributes:
        encodes: Calls of the encoder.
        placings: Of `Cache.place`.
        runs: Of `Bucket.run`: packing, and the session within.
    """

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.device, self.encode_tokens = inner.device, inner.encode_tokens
        self.has_encoder = inner.has_encoder
        self.encodes: list[Call] = []
        self.placings: list[Call] = []
        self.runs: list[Call] = []
        self._encode = timed(inner.encode, self.encodes.append)

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """As `Backend.encode`."""
        encoded: Encoded = self._encode(sources)
        return encoded

    def new_cache(self) -> Cache:
        """As `Backend.new_cache`."""
        return _TimedCache(self._inner.new_cache(), self)

    def clear(self) -> None:
        """Forget all calls."""
        for calls in (self.encodes, self.placings, self.runs):
            calls.clear()


class _TimedCache:
    def __init__(self, inner: Cache, clock: TimedBackend) -> None:
        self._inner = inner
        self._clock = clock
        self._place = timed(inner.place, clock.placings.append)

    def enter(self, index: int, encoded: Encoded, number: int) -> None:
        self._inner.enter(index, encoded, number)

    def leave(self, index: int) -> None:
        self._inner.leave(index)

    def place(self, table: Table, going: Sequence[int] | None = None) -> Sequence[Bucket]:
        return [_TimedBucket(bucket, self._clock) for bucket in self._place(table, going)]


class _TimedBucket:
    def __init__(self, inner: Bucket, clock: TimedBackend) -> None:
        self.members = inner.members
        self.needed = inner.needed
        self._run = timed(inner.run, clock.runs.append, rows=inner.needed.rows)

    def run(self, table: Table, candidates: int, *, logprobs: bool = False) -> StepResult:
        result: StepResult = self._run(table, candidates, logprobs=logprobs)
        return result


@contextmanager
def session_calls() -> Iterator[list[Call]]:
    """Within it, every run of a session is noted, whoever calls it; on the CPU, all graphs of a step as one run."""
    calls: list[Call] = []
    session = onnxruntime.InferenceSession
    runs: list[tuple[Any, str]] = [
        (session, "run"),
        (session, "run_with_iobinding"),
        (Binding, "run"),
        (pieces, "run_step"),
    ]
    plain = [(owner, name, getattr(owner, name)) for owner, name in runs]
    for owner, name, run in plain:
        setattr(owner, name, timed(run, calls.append, method=name))
    try:
        yield calls
    finally:
        for owner, name, run in plain:
            setattr(owner, name, run)


@dataclass(frozen=True, slots=True)
class Share:
    """Of the threads' time while all of them were at work.

    Attributes:
        outside: What is left when the runs' wall time is taken off: host work.
        outside_and_waiting: What is left when the runs' CPU time is taken off: host work, and the wait for the
            interpreter (GIL) when a run comes back.
    """

    outside: float
    outside_and_waiting: float


def share_outside(backend_calls: Sequence[Call], until: float, runs: Sequence[Call]) -> Share:
    """How much of the threads' time no session ran.

    Args:
        backend_calls: Calls of the backend; from its first one on a thread is at work.
        until: When their buckets end to be full.
        runs: What counts as inside.
    """
    first: dict[int, float] = {}
    for call in backend_calls:
        first[call.thread] = min(call.began, first.get(call.thread, call.began))
    window = sum(until - began for began in first.values())
    inside = [
        call for call in runs if call.thread in first and call.began >= first[call.thread] and call.ended <= until
    ]
    return Share(
        1 - sum(call.seconds for call in inside) / window,
        1 - sum(call.cpu_s for call in inside) / window,
    )
