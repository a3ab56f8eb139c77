"""Measurements inside Beamline's engine: where the time of a step goes, and what company costs."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.observer import NullObserver, StepObserver
from beamline_server.engine.request import GenerationRequest, SearchOptions
from beamline_server.engine.workers import Engine
from beamline_server.models.load import EngineOptions, build_backend, capacity, model_rules
from offline.beamline_worker import QUEUE_ROWS, Inbox, requests
from offline.gemm_rate import best_rate, step_operations
from offline.session_clock import TimedBackend, session_calls, share_outside
from offline.task import Search, Sentence, read_sentences

BEAM = 4
SENTENCES = 32
STEP_TOKENS = 32
SHORT_SENTENCES, LONG_TOKENS = 31, 200
SHORTEST, LONGEST = 12, 28
"""Tokens of the short sentences: between these, so that they end at different times."""
ROUNDS = 8
"""Short sentences per batch index: 8 of them, 20 tokens on average, end before the long one does."""


class _FullSteps(NullObserver):
    """Notes the decode steps with all rows."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.step_s: list[float] = []

    def stepped(self, seconds: float, rows: int, sentences: int) -> None:  # noqa: ARG002 - the protocol has it
        """Note a step."""
        if rows == self._rows:
            self.step_s.append(seconds)


def _engine(
    bundle: Bundle, backend: Backend, inbox: Inbox, options: EngineOptions, observer: StepObserver | None = None
) -> Engine:
    return Engine(
        [backend] * (options.workers or 1),
        model_rules(bundle.manifest),
        capacity(bundle, options),
        queue_rows=QUEUE_ROWS,
        deliver=inbox,
        observer=observer or NullObserver(),
    )


def _all_done(engine: Engine, inbox: Inbox, wanted: Sequence[GenerationRequest]) -> float:
    """Submit and wait; returns seconds."""
    began = time.perf_counter()
    engine.submit(wanted)
    inbox.take([request.id for request in wanted])
    return time.perf_counter() - began


def outside_sessions(bundle: Bundle, *, sentences: str, workers: int) -> dict[str, Any]:
    """Share of the workers' time that no session ran, with 32 sentences of 4 rows on each, while the queue lasted.

    Args:
        bundle: To run.
        sentences: File of sentences; all are translated.
        workers: Decode threads, of one onnxruntime thread each.
    """
    options = EngineOptions(device="cpu", workers=workers, threads=1, rows=SENTENCES * BEAM)
    sources = read_sentences(Path(sentences))
    with session_calls() as runs:
        backend = TimedBackend(build_backend(bundle, "cpu", 1))
        inbox = Inbox()
        engine = _engine(bundle, backend, inbox, options)
        engine.start()
        _all_done(engine, inbox, requests(sources[: 2 * SENTENCES * workers], Search()))
        runs.clear()
        backend.clear()
        _all_done(engine, inbox, requests(sources, Search()))
        engine.stop(0)
    last_encode = {call.thread: call.ended for call in backend.encodes}
    calls = [*backend.encodes, *backend.runs]
    share = share_outside(calls, min(last_encode.values()), runs or calls)
    rows = [call.rows or 0 for call in backend.runs]
    return {
        **dataclasses.asdict(share),
        "inside": "session.run" if runs else "the backend's calls",
        "rows_per_step": sum(rows) / len(rows),
        "step_ms": median(call.seconds for call in backend.runs) * 1e3,
        "encode_ms": median(call.seconds for call in backend.encodes) * 1e3,
    }


def step_over_floor(bundle: Bundle, *, sentences: str) -> dict[str, Any]:
    """The step of 32 sentences with 4 rows each on one thread, over the time its products take at their best rate."""
    rows, precision = SENTENCES * BEAM, bundle.manifest.precision
    before = best_rate(bundle.manifest.spec, precision, rows)
    backend, inbox, observer = TimedBackend(build_backend(bundle, "cpu", 1)), Inbox(), _FullSteps(rows)
    engine = _engine(bundle, backend, inbox, EngineOptions(device="cpu", workers=1, rows=rows), observer)
    engine.start()
    sources = read_sentences(Path(sentences))[:SENTENCES]
    _all_done(engine, inbox, requests(sources, Search.forced(4)))
    observer.step_s.clear()
    backend.clear()
    _all_done(engine, inbox, requests(sources, Search.forced(STEP_TOKENS)))
    engine.stop(0)
    rate = max(before, best_rate(bundle.manifest.spec, precision, rows))
    floor_s = step_operations(bundle.manifest.spec, rows) / rate
    return {
        "step_ms": median(observer.step_s) * 1e3,
        "backend_ms": median(call.seconds for call in backend.runs if call.rows == rows) * 1e3,
        "floor_ms": floor_s * 1e3,
        "gops": rate / 1e9,
    }


def company(bundle: Bundle, *, sentences: str) -> dict[str, Any]:
    """Seconds that short sentences take, 31 at a time on one worker: among themselves, and beside one of 200 tokens."""
    sources = read_sentences(Path(sentences))
    short = [sources[i % len(sources)] for i in range(SHORT_SENTENCES * ROUNDS)]
    backend = build_backend(bundle, "cpu", 1)
    _short_s(bundle, backend, short[:SHORT_SENTENCES], None)
    return {
        "alone_s": _short_s(bundle, backend, short, None),
        "beside_s": _short_s(bundle, backend, short, sources[0]),
        "sentences": len(short),
    }


def _short_s(bundle: Bundle, backend: Backend, short: Sequence[Sentence], long: Sentence | None) -> float:
    rows = (SHORT_SENTENCES + (long is not None)) * BEAM
    inbox = Inbox()
    engine = _engine(bundle, backend, inbox, EngineOptions(device="cpu", workers=1, rows=rows))
    engine.start()
    if long is not None:
        engine.submit(requests([long], Search.forced(LONG_TOKENS)))
    seconds = _all_done(engine, inbox, [_of_length(request, i) for i, request in enumerate(requests(short, Search()))])
    engine.stop(0)
    return seconds


def _of_length(request: GenerationRequest, number: int) -> GenerationRequest:
    tokens = SHORTEST + number % (LONGEST - SHORTEST + 1)
    options: SearchOptions = dataclasses.replace(request.options, min_new_tokens=tokens, max_new_tokens=tokens)
    return dataclasses.replace(request, options=options)


PROFILES: dict[str, Callable[..., dict[str, Any]]] = {
    "outside_sessions": outside_sessions,
    "step_over_floor": step_over_floor,
    "company": company,
}
