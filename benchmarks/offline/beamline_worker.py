"""Beamline as a contender: its engine in process."""

import threading
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from beamline_server.bundle import load_bundle
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    Event,
    Failed,
    GenerationRequest,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.workers import Engine
from beamline_server.models.load import EngineOptions, build_engine
from offline.task import Search, Sentence, Setting, longest_first

QUEUE_ROWS = 1_000_000
_numbers = count()


class Inbox:
    """Receives an engine's events, and waits for the requests that are expected."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ended: dict[RequestId, Completed | Failed] = {}
        self._awaited = 0

    def __call__(self, events: Sequence[Event]) -> None:
        """Take events of one step."""
        with self._changed:
            self._ended |= {event.id: event for event in events if isinstance(event, Completed | Failed)}
            # Not at every step: whoever waits would take the interpreter from the engine's threads.
            if self._awaited and len(self._ended) >= self._awaited:
                self._changed.notify_all()

    def take(self, ids: Sequence[RequestId]) -> list[tuple[int, ...]]:
        """The best hypotheses of these requests, when all have ended. One caller at a time.

        Raises:
            EngineError: one has failed.
        """
        with self._changed:
            self._awaited = len(ids)
            self._changed.wait_for(lambda: all(i in self._ended for i in ids))
            self._awaited = 0
            ended = [self._ended.pop(i) for i in ids]
        for event in ended:
            if isinstance(event, Failed):
                raise event.error
        return [event.hypotheses[0].tokens for event in ended if isinstance(event, Completed)]


def requests(sentences: Sequence[Sentence], search: Search) -> list[GenerationRequest]:
    """A request for each sentence, under ids that no other request of this process has."""
    options = SearchOptions(
        search.beam,
        early_stopping=EarlyStopping.WHEN_FULL,
        min_new_tokens=search.min_new_tokens,
        max_new_tokens=search.max_new_tokens,
    )
    return [GenerationRequest(RequestId(next(_numbers)), sentence.ids, options) for sentence in sentences]


class BeamlineTranslator:
    """An engine of a bundle.

    A setting has `order` (file or longest: what is handed over together is queued as it comes, or the longest sources
    first) and fields of `EngineOptions`.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._bundle = load_bundle(Path(spec["model"]))
        self._engine: Engine | None = None
        self._inbox = Inbox()
        self._sorted = False

    def open(self, setting: Setting) -> None:
        """As `Translator.open`."""
        self._sorted = setting["order"] == "longest"
        options = {name: value for name, value in setting.items() if name != "order"}
        self._engine = build_engine(
            self._bundle,
            EngineOptions(device="cpu", queue_rows=QUEUE_ROWS, **options),
            deliver=self._inbox,
            observer=NullObserver(),
        )
        self._engine.start()

    def translate(self, sentences: Sequence[Sentence], search: Search) -> Sequence[Sequence[int]]:
        """As `Translator.translate`."""
        assert self._engine is not None, "not open"
        wanted = requests(sentences, search)
        self._engine.submit([wanted[i] for i in longest_first(sentences)] if self._sorted else wanted)
        return self._inbox.take([request.id for request in wanted])

    def ids(self, tokens: Sequence[int]) -> list[int]:
        """As `Translator.ids`."""
        return list(tokens)

    def close(self) -> None:
        """As `Translator.close`."""
        assert self._engine is not None, "not open"
        self._engine.stop(0)
        self._engine = None

    def profile(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """As `Translator.profile`: see beamline_profile.py."""
        from offline.beamline_profile import PROFILES

        return PROFILES[name](self._bundle, **arguments)
