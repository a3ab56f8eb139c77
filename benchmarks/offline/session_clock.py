"""What an engine's threads do when: the time inside onnxruntime, and what a runner's calls take."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnxruntime


@dataclass(frozen=True, slots=True)
class Call:
    """A call on one thread: times of `time.perf_counter`, and the CPU time of that thread meanwhile, in seconds."""

    thread: int
    began: float
    ended: float
    cpu_s: float
    rows: int | None = None
    """Of a decoder step: live beams."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


def timed(call: Callable[..., Any], note: Callable[[Call], None], rows: Callable[..., int] | None = None) -> Any:
    """A function that does the same and notes each call; `rows` tells them from the arguments."""

    def wrapper(*args: Any, **options: Any) -> Any:
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            return call(*args, **options)
        finally:
            cpu, ended = time.thread_time() - cpu, time.perf_counter()
            note(Call(threading.get_ident(), began, ended, cpu, rows(*args[:2]) if rows else None))

    return wrapper


class TimedRunner:
    """A runner that notes the calls of another; whatever else that one has is there as well."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.encodes: list[Call] = []
        self.steps: list[Call] = []
        self.encode = timed(inner.encode, self.encodes.append)
        self.step = timed(inner.step, self.steps.append, lambda _, batch: len(batch.ids))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextmanager
def session_calls() -> Iterator[list[Call]]:
    """Within it, every run of a session is noted, whoever calls it."""
    calls: list[Call] = []
    session = onnxruntime.InferenceSession
    plain = {name: getattr(session, name) for name in ("run", "run_with_iobinding")}
    for name, method in plain.items():
        setattr(session, name, timed(method, calls.append))
    try:
        yield calls
    finally:
        for name, method in plain.items():
            setattr(session, name, method)


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


def share_outside(runner_calls: Sequence[Call], until: float, runs: Sequence[Call]) -> Share:
    """How much of the threads' time no session ran.

    Args:
        runner_calls: Calls of the runner; from its first one on a thread is at work.
        until: When it ends to have its lanes full.
        runs: What counts as inside.
    """
    first: dict[int, float] = {}
    for call in runner_calls:
        first[call.thread] = min(call.began, first.get(call.thread, call.began))
    window = sum(until - began for began in first.values())
    inside = [
        call for call in runs if call.thread in first and call.began >= first[call.thread] and call.ended <= until
    ]
    return Share(
        1 - sum(call.seconds for call in inside) / window,
        1 - sum(call.cpu_s for call in inside) / window,
    )
