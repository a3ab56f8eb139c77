"""The process of one contender: loads its model, measures what it is told to, answers in JSON.

    python -m offline.worker '{"kind": "ctranslate2", "model": …}'

One command per line of standard input, one answer per line of standard output. Between commands it waits in a read, so
that it takes nothing from who is measured then.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol, runtime_checkable

from offline.task import Search, Sentence, Setting, Task, batches, read_sentences

KINDS = {
    "beamline": "offline.beamline_worker:BeamlineTranslator",
    "beamline-served": "offline.served_worker:ServedTranslator",
    "ctranslate2": "offline.ctranslate2_worker:CTranslate2Translator",
    "optimum": "offline.transformers_worker:OptimumTranslator",
    "transformers": "offline.transformers_worker:TransformersTranslator",
}
WARM_UP_BATCHES = 2
WARM_UP_SENTENCES = 128
"""Of a task that hands over all at once."""


class Translator(Protocol):
    """A contender within its process; made from the worker's spec."""

    def open(self, setting: Setting) -> None:
        """Get ready to translate in this setting."""
        ...

    def translate(self, sentences: Sequence[Sentence], search: Search) -> Sequence[Sequence[Any]]:
        """The tokens of each sentence's best hypothesis, end of sequence included, as ids or pieces."""
        ...

    def ids(self, tokens: Sequence[Any]) -> list[int]:
        """What `translate` returned for a sentence, as ids."""
        ...

    def close(self) -> None:
        """Give back what `open` has taken."""
        ...


@runtime_checkable
class Profiled(Protocol):
    """A contender with measurements of its own."""

    def profile(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A measurement that only this contender knows."""
        ...


class Commands:
    """What a worker can be told; every method's answer is a JSON object."""

    def __init__(self, translator: Translator) -> None:
        self._translator = translator
        self._setting: Setting | None = None
        self._warm: tuple[Setting, Task] | None = None
        self._sentences: dict[str, list[Sentence]] = {}

    def first(self, setting: Setting, task: Mapping[str, Any]) -> dict[str, Any]:
        """Translate one sentence with nothing before it."""
        wanted = Task.from_json(task)
        self._open(setting)
        (tokens,) = self._translator.translate(self._some(wanted)[:1], wanted.search)
        return {"tokens": len(tokens)}

    def measure(self, setting: Setting, task: Mapping[str, Any]) -> dict[str, Any]:
        """Translate, warmed up: seconds, sentences and output tokens; p50 of the batches' times in milliseconds."""
        wanted = Task.from_json(task)
        sentences = self._some(wanted)
        self._warm_up(setting, wanted, sentences)
        tokens, times = 0, []
        began = time.perf_counter()
        for batch in batches(sentences, wanted.batch):
            batch_began = time.perf_counter()
            answers = self._translator.translate(batch, wanted.search)
            times.append(time.perf_counter() - batch_began)
            tokens += sum(map(len, answers))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "sentences": len(sentences), "tokens": tokens, "batch_ms": median(times) * 1e3}

    def answers(self, setting: Setting, task: Mapping[str, Any]) -> dict[str, Any]:
        """The best hypothesis of each sentence as ids."""
        wanted = Task.from_json(task)
        self._open(setting)
        found = [
            self._translator.ids(tokens)
            for batch in batches(self._some(wanted), wanted.batch)
            for tokens in self._translator.translate(batch, wanted.search)
        ]
        return {"ids": found}

    def memory(self) -> dict[str, Any]:
        """Resident memory of this process in bytes: now, and at its greatest."""
        return resident_bytes()

    def profile(self, name: str, **arguments: Any) -> dict[str, Any]:
        """See `Profiled`. Whatever is open is closed before, for it could be in the way."""
        if not isinstance(self._translator, Profiled):
            raise TypeError(f"this contender has no measurement {name!r} of its own")
        self.close()
        return self._translator.profile(name, arguments)

    def close(self) -> dict[str, Any]:
        """Give back what is open."""
        if self._setting is not None:
            self._translator.close()
        self._setting = self._warm = None
        return {}

    def _open(self, setting: Setting) -> None:
        if setting != self._setting:
            self.close()
            self._translator.open(setting)
            self._setting = setting

    def _warm_up(self, setting: Setting, task: Task, sentences: Sequence[Sentence]) -> None:
        self._open(setting)
        if self._warm != (setting, task):
            count = WARM_UP_BATCHES * task.batch if task.batch else WARM_UP_SENTENCES
            for batch in batches(sentences[:count], task.batch):
                self._translator.translate(batch, task.search)
            self._warm = (setting, task)

    def _some(self, task: Task) -> list[Sentence]:
        if task.sentences not in self._sentences:
            self._sentences[task.sentences] = read_sentences(Path(task.sentences))
        return self._sentences[task.sentences][: task.count]


def resident_bytes(pid: int | None = None) -> dict[str, Any]:
    """Resident memory of a process, this one by default, in bytes: now, and at its greatest (Linux)."""
    lines = Path(f"/proc/{pid or 'self'}/status").read_text("utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {"now": int(status["VmRSS"].split()[0]) * 1024, "peak": int(status["VmHWM"].split()[0]) * 1024}


def make_translator(spec: Mapping[str, Any]) -> Translator:
    """The contender that a spec asks for; its `kind` is one of KINDS, the rest is for the contender."""
    module, _, name = KINDS[spec["kind"]].partition(":")
    translator: Translator = getattr(importlib.import_module(module), name)(spec)
    return translator


def claim_stdout() -> IO[str]:
    """Standard output for answers alone; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Load, then answer until standard input ends."""
    answers = claim_stdout()
    commands = Commands(make_translator(json.loads(sys.argv[1])))
    with contextlib.suppress(KeyboardInterrupt):  # whoever started it is interrupted as well, and tells
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(commands, command.pop("do"))(**command)
            print(json.dumps(answer), file=answers, flush=True)
    commands.close()


if __name__ == "__main__":
    main()
