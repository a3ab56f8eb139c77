"""Runs contenders side by side: one process each, one at a time, repetitions interleaved."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from offline.contender_process import ContenderFailed, ContenderProcess
from offline.contenders import BEAMLINE_INT8, CONTENDERS, Contender, settings
from offline.models import FORCED_TOKENS, FR_EN
from offline.plan import Plan
from offline.prepared import Prepared
from offline.results import Comparison, Results, Run, Series, comparison_key
from offline.task import Search, Setting, Task
from offline.tuning import FINAL_TRIES, Choice, best_setting

ALL = 1_000_000
"""More sentences than any file has."""
SLOW_SEARCH = 4
"""A slow contender looks for its best setting with so many times fewer sentences."""
Processes = dict[str, ContenderProcess]
Possible = Callable[[Contender, str, int | None], Sequence[Setting]]
"""Settings of a contender for a model and a batch."""
T = TypeVar("T")


class Bench:
    """What the stages share.

    Args:
        prepared: Models and sentences.
        plan: How much to measure.
        results: Is added to.
        names: Contenders that take part.
        say: Is told how far it is.
        possible: The settings to choose a contender's best from; by default those of contenders.py.
    """

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        results: Results,
        names: Sequence[str],
        say: Callable[[str], None],
        possible: Possible | None = None,
    ) -> None:
        self.prepared = prepared
        self.plan = plan
        self.results = results
        self.say = say
        self.contenders = {c.name: c for c in CONTENDERS if c.name in names}
        self._possible = possible or (lambda contender, _, batch: settings(contender.kind, batch))
        self._failed = set(results.missing)
        self._sentences: dict[str, Path] = {}

    def process(self, contender: Contender, model: str) -> ContenderProcess:
        """A process of a contender, with a model.

        Raises:
            ContenderFailed: the model could not be made.
        """
        python = self.prepared.pythons.of(contender.kind)
        return ContenderProcess(python, self.prepared.spec(contender, model), contender.variables)

    @contextmanager
    def together(self, model: str, names: Sequence[str]) -> Iterator[Processes]:
        """Processes of contenders, all with the same model; who cannot take part is missing."""
        with ExitStack() as stack:
            processes: Processes = {}
            for name in names:
                with self.excused(name):
                    processes[name] = stack.enter_context(self.process(self.contenders[name], model))
            yield processes

    @contextmanager
    def excused(self, name: str) -> Iterator[None]:
        """Within it, a peer may fail: it is noted as missing. Beamline may not."""
        try:
            yield
        except ContenderFailed as error:
            if self.contenders[name].ours:
                raise
            self.say(f"{name} is out: {error}")
            self.results.missing[name] = str(error)
            self._failed.add(name)

    def names(self, *, latency_only: bool = False, ours: bool | None = None) -> list[str]:
        """Contenders that have not failed so far; with `latency_only`, those too that only take part there."""
        return [
            name
            for name, contender in self.contenders.items()
            if name not in self._failed
            and (latency_only or not contender.latency_only)
            and ours in (None, contender.ours)
        ]

    def task(self, model: str, batch: int | None, count: int | None, search: Search | None = None) -> Task:
        """The model's usual task: real stopping for the embedded model, forced tokens for a random one."""
        if model not in self._sentences:
            self._sentences[model] = self.prepared.sentences(model, self.bundle(BEAMLINE_INT8, model))
        usual = Search() if model == FR_EN else Search.forced(FORCED_TOKENS)
        return Task(str(self._sentences[model]), count or ALL, batch, search or usual)

    def bundle(self, name: str, model: str) -> Path:
        """The bundle of one of Beamline's contenders, whether it takes part or not."""
        return self.prepared.model(next(c for c in CONTENDERS if c.name == name), model)

    def compare(self, model: str, batch: int | None, processes: Mapping[str, ContenderProcess]) -> None:
        """Find each contender's best setting, then measure them in turns, and add the comparison to the results."""
        key = comparison_key(model, batch)
        choices: dict[str, Choice] = {}
        tasks: dict[str, Task] = {}
        for name, process in processes.items():
            if name in self.names(latency_only=True):
                with self.excused(name):
                    choices[name] = self._choose(process, self.contenders[name], model, batch)
                    tasks[name] = self._task(model, batch, self.contenders[name], choices[name])
                    self.say(f"{key}: {name}: {choices[name].tried} settings, best {dict(choices[name].setting)}")
        runs = self.in_turns(
            list(choices), lambda name: self.run(processes[name], choices[name].setting, tasks[name]), key
        )
        series = {
            name: Series(choices[name].setting, tuple(found), choices[name].tried) for name, found in runs.items()
        }
        self.results.comparisons[key] = Comparison(model, batch, series)
        for name in series:
            self.results.missing.pop(name, None)

    def in_turns(self, names: Sequence[str], measure: Callable[[str], T], what: str) -> dict[str, list[T]]:
        """Measure A B C A B C …: as many values of each as there are repetitions; without those who have failed."""
        found: dict[str, list[T]] = {name: [] for name in names}
        for repetition in range(self.plan.repetitions):
            for name in list(found):
                time.sleep(self.plan.settle_s)
                with self.excused(name):
                    found[name].append(measure(name))
                if name in self._failed:
                    del found[name]
            self.say(f"{what}: repetition {repetition + 1} of {self.plan.repetitions}: {_summary(found)}")
        return found

    def run(self, process: ContenderProcess, setting: Setting, task: Task) -> Run:
        """One measurement."""
        return Run(**process.ask("measure", setting=setting, task=task.as_json()))

    def best(self, name: str, model: str, batch: int | None) -> Setting:
        """The setting that was found best, or the first one where none was looked for."""
        comparison = self.results.comparisons.get(comparison_key(model, batch))
        if comparison is not None and name in comparison.series:
            return comparison.series[name].setting
        return self._possible(self.contenders[name], model, batch)[0]

    def _choose(self, process: ContenderProcess, contender: Contender, model: str, batch: int | None) -> Choice:
        possible = self._possible(contender, model, batch)

        def try_once(count: int | None) -> Callable[[Setting], float]:
            task = self.task(model, batch, count)
            return lambda setting: self.run(process, setting, task).sentences_per_s

        few, whole = self._search_counts(model, batch, slow=contender.slow)
        tries = 1 if contender.slow else FINAL_TRIES
        return best_setting(possible if self.plan.search else possible[:1], try_once(few), try_once(whole), tries=tries)

    def _search_counts(self, model: str, batch: int | None, *, slow: bool) -> tuple[int | None, int | None]:
        """Sentences for a first look at a setting, and for a second one."""
        if model != FR_EN:
            # They all cost the same: one batch tells, four where a batch is one sentence.
            few = 4 if batch == 1 and not slow else batch
            return few, few
        whole = self._fr_en_count(batch)
        if slow:
            whole = (whole or self.plan.search_sentences) // SLOW_SEARCH
        return self.plan.search_sentences, whole

    def _task(self, model: str, batch: int | None, contender: Contender, choice: Choice) -> Task:
        count = self._fr_en_count(batch)
        if model != FR_EN:
            assert batch is not None, "a random model has no file to go through"
            count = self.plan.random_sentences(batch, choice.sentences_per_s, slow=contender.slow)
        return self.task(model, batch, count)

    def _fr_en_count(self, batch: int | None) -> int | None:
        return self.plan.file_sentences if batch is None else self.plan.batch_sentences[batch]


def _summary(found: Mapping[str, Sequence[Any]]) -> str:
    def words(value: Any) -> str:
        return f"{value.sentences_per_s:.4g}/s" if isinstance(value, Run) else f"{value:.4g}"

    return ", ".join(f"{name} {words(values[-1])}" for name, values in found.items() if values)
