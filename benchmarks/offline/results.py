"""What was measured, raw, and how it is kept in JSON."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from offline.ratios import Spread, ratios, spread
from offline.task import Setting

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One repetition of one contender.

    Attributes:
        seconds: For all sentences.
        sentences: How many.
        tokens: Of the best hypotheses, end of sequence included.
        batch_ms: The median time of a batch, in milliseconds.
    """

    seconds: float
    sentences: int
    tokens: int
    batch_ms: float

    @property
    def sentences_per_s(self) -> float:
        """Sentences per second."""
        return self.sentences / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Series:
    """The repetitions of one contender in the setting that was found best for it."""

    setting: Setting
    runs: tuple[Run, ...]
    tried: int = 1
    """Settings that the best one was chosen from."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Contenders at the same task, interleaved.

    Attributes:
        model: Which one.
        batch: Sentences that came at a time; None: all of them.
        series: By contender.
    """

    model: str
    batch: int | None
    series: Mapping[str, Series]

    def sentences_per_s(self, contender: str) -> Spread | None:
        """None for who did not take part; so below."""
        return self._spread(contender, lambda run: run.sentences_per_s)

    def tokens_per_s(self, contender: str) -> Spread | None:
        """Output tokens per second."""
        return self._spread(contender, lambda run: run.tokens_per_s)

    def batch_ms(self, contender: str) -> Spread | None:
        """Median times of a batch: at batch 1, p50 latencies."""
        return self._spread(contender, lambda run: run.batch_ms)

    def speedup(self, ours: str, theirs: str) -> Spread | None:
        """Our sentences per second over theirs."""
        return self._ratio(ours, theirs, lambda run: run.sentences_per_s)

    def latency_ratio(self, ours: str, theirs: str) -> Spread | None:
        """Our median time of a batch over theirs."""
        return self._ratio(ours, theirs, lambda run: run.batch_ms)

    def _spread(self, contender: str, value: Callable[[Run], float]) -> Spread | None:
        if contender not in self.series:
            return None
        return spread([value(run) for run in self.series[contender].runs])

    def _ratio(self, ours: str, theirs: str, value: Callable[[Run], float]) -> Spread | None:
        if not {ours, theirs} <= self.series.keys():
            return None
        return spread(ratios(*([value(run) for run in self.series[name].runs] for name in (ours, theirs))))


@dataclass(frozen=True, slots=True)
class Figure:
    """Something measured several times that is no comparison of contenders.

    Attributes:
        values: One for each repetition.
        facts: What explains them.
    """

    values: tuple[float, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        """Median, least and greatest."""
        return spread(self.values)


@dataclass(frozen=True, slots=True)
class Results:
    """A run of the bench.

    Attributes:
        about: Machine, versions, settings; by stage, when it ran and on which commit.
        missing: Why a contender did not take part, by its name.
        comparisons: By `comparison_key`.
        figures: By name.
    """

    about: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` has written.

        Raises:
            ValueError: it is in another format.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"the results are in format {data.get('format')}, not {FORMAT}: measure again")
        return cls(
            dict(data["about"]),
            dict(data["missing"]),
            {name: _comparison(value) for name, value in data["comparisons"].items()},
            {name: Figure(tuple(value["values"]), value["facts"]) for name, value in data["figures"].items()},
        )


def comparison_key(model: str, batch: int | None) -> str:
    """The name of a comparison."""
    return f"{model}, {'all sentences' if batch is None else f'batch {batch}'}"


def _comparison(data: Mapping[str, Any]) -> Comparison:
    series = {
        name: Series(value["setting"], tuple(Run(**run) for run in value["runs"]), value["tried"])
        for name, value in data["series"].items()
    }
    return Comparison(data["model"], data["batch"], series)
