"""The tables of docs/benchmarks.md, as Markdown."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from offline.contenders import CONTENDERS
from offline.models import BASE_16K, BASE_58K, FR_EN
from offline.plan import BATCHES
from offline.ratios import Spread
from offline.results import Comparison, Results, comparison_key
from offline.targets import RESIDENT, TARGETS, Online, Verdict

NONE = "–"
MARKS = {Verdict.STRETCH: "**met**, stretch too", Verdict.MET: "**met**", Verdict.SHORT: "short"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(_line(row) for row in [head, ["---"] * len(head), *rows])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def target_table(results: Results, online: Online) -> str:
    """Every figure to reach beside what was measured."""

    def rows() -> Iterator[Sequence[str]]:
        for target in TARGETS:
            value = target.measured(results, online)
            verdict = target.verdict(value)
            yield target.title, target.wanted, target.told(value), MARKS.get(verdict, verdict.value)

    return table(["", "to reach", "measured", ""], rows())


def names_of(comparisons: Iterable[Comparison]) -> list[str]:
    """Who took part in any of them, in the order of CONTENDERS."""
    there = {name for comparison in comparisons for name in comparison.series}
    return [contender.name for contender in CONTENDERS if contender.name in there]


def rate_table(results: Results, model: str) -> str | None:
    """Sentences/s and output tokens/s of everybody, by batch; None if none was measured."""
    by_batch = _by_batch(results, model)
    if not by_batch:
        return None

    def cell(comparison: Comparison, name: str) -> str:
        sentences, tokens = comparison.sentences_per_s(name), comparison.tokens_per_s(name)
        return NONE if sentences is None or tokens is None else f"{_rate(sentences)} / {_rate(tokens)}"

    names = [name for name in names_of(by_batch.values()) if not _latency_only(name)]
    rows = [[name, *(cell(comparison, name) for comparison in by_batch.values())] for name in names]
    return table(["sentences/s / output tokens/s", *map(_batch_words, by_batch)], rows)


def ratio_table(results: Results, model: str) -> str | None:
    """Beamline over each peer, by batch; None if none was measured."""
    by_batch = _by_batch(results, model)
    rows = []
    for ours in CONTENDERS:
        for theirs in CONTENDERS:
            # In int8, `generate` has no counterpart.
            if ours.kind != "beamline" or theirs.ours or (ours.precision != theirs.precision and not theirs.slow):
                continue
            found = [comparison.speedup(ours.name, theirs.name) for comparison in by_batch.values()]
            if any(found):
                rows.append([f"{ours.name} / {theirs.name}", *(_with_range(value) for value in found)])
    return table(["times as fast", *map(_batch_words, by_batch)], rows) if rows else None


def latency_table(results: Results) -> str | None:
    """One sentence after the other; None if that was not measured."""
    comparison = results.comparisons.get(comparison_key(FR_EN, 1))
    if comparison is None:
        return None
    rows = [[name, _with_range(comparison.batch_ms(name))] for name in names_of([comparison])]
    return table(["one idle sentence, fr-en, beam 4", "p50, ms"], rows)


def start_table(results: Results) -> str | None:
    """Time to the first result and peak memory; None if neither was measured."""
    models = (FR_EN, BASE_16K)

    def cell(name: str, words: Callable[[Spread], str]) -> str:
        figure = results.figures.get(name)
        return words(figure.spread) if figure else NONE

    rows = []
    for contender in CONTENDERS:
        cells = [
            text
            for model in models
            for text in (
                cell(f"first result, {model}, {contender.name}", lambda s: f"{s.median:.2f}"),
                cell(f"peak memory, {model}, {contender.name}", lambda s: f"{s.median / 1e6:.0f}"),
            )
        ]
        if set(cells) != {NONE}:
            rows.append([contender.name, *cells])
    head = ["", *(f"{model}: {what}" for model in models for what in ("first result, s", "peak memory, MB"))]
    return table(head, rows) if rows else None


def quality_table(results: Results) -> str | None:
    """BLEU of everybody; None if it was not measured."""
    rows = []
    for contender in CONTENDERS:
        if figure := results.figures.get(f"BLEU, {contender.name}"):
            same = figure.facts.get("as_transformers")
            rows.append([contender.name, f"{figure.spread.median:.2f}", NONE if same is None else f"{same:.1%}"])
    return table(["fr-en test file, beam 4", "BLEU", "same tokens as transformers"], rows) if rows else None


def engine_table(results: Results) -> str | None:
    """What explains the figures of the engine; None if there are none."""
    rows = [
        [name, _figure_words(name, figure.spread), _facts(figure.facts)]
        for name, figure in results.figures.items()
        if name.startswith(("outside", "beside", "per token", "step over", "start to", "resident"))
    ]
    return table(["inside Beamline", "median", "of which"], rows) if rows else None


def setting_table(results: Results) -> str | None:
    """The setting that was found best for each contender at each task; None if nothing was compared."""
    rows = [
        [key, name, ", ".join(f"{field} {value}" for field, value in series.setting.items()), f"{series.tried}"]
        for key, comparison in results.comparisons.items()
        for name, series in comparison.series.items()
    ]
    return table(["task", "contender", "best setting", "of"], rows) if rows else None


def _by_batch(results: Results, model: str) -> dict[int | None, Comparison]:
    found = {batch: results.comparisons.get(comparison_key(model, batch)) for batch in (*BATCHES, None)}
    return {batch: comparison for batch, comparison in found.items() if comparison is not None}


def _latency_only(name: str) -> bool:
    return any(contender.latency_only for contender in CONTENDERS if contender.name == name)


def _batch_words(batch: int | None) -> str:
    return "whole file" if batch is None else f"batch {batch}"


def _rate(value: Spread) -> str:
    return f"{value.median:,.0f}" if value.median >= 10 else f"{value.median:.1f}"


def _with_range(value: Spread | None) -> str:
    return NONE if value is None else f"{value.median:.2f} ({value.low:.2f}–{value.high:.2f})"


def _figure_words(name: str, value: Spread) -> str:
    if name == RESIDENT:
        return f"{value.median / 1e6:.0f} MB"
    return f"{value.median:.3f} ({value.low:.3f}–{value.high:.3f})"


def _facts(facts: Mapping[str, Any]) -> str:
    def words(name: str, value: Any) -> str:
        if name.endswith("_bytes"):
            return f"{name.removesuffix('_bytes')} {value / 1e6:.0f} MB"
        return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"

    return ", ".join(words(name, value).replace("_", " ") for name, value in facts.items())


MODELS = (FR_EN, BASE_16K, BASE_58K)
