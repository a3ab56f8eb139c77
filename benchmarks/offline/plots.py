"""The plots of docs/benchmarks.md, as SVG."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beamline_client.load.inline_svg import house_style
from offline.contenders import CONTENDERS
from offline.ratios import Spread
from offline.results import Comparison, Results, comparison_key
from offline.tables import MODELS, names_of

# Okabe and Ito's colours, which the colour-blind can tell apart; ours are blue.
COLOURS = ("#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#8a939c", "#cc79a7", "#009e73", "#f0e442")
INK = "#3a4149"
WIDTH, BAR_HEIGHT = 7.6, 0.3


def rates(results: Results) -> Iterator[tuple[str, str]]:
    """For each model: output tokens per second of everybody by batch."""
    for model in MODELS:
        comparisons = _comparisons(results, model)
        if comparisons:
            with house_style():
                yield f"{model}: output tokens per second", _rates(model, comparisons)


def speedups(results: Results) -> Iterator[tuple[str, str]]:
    """For each model: how many times as fast Beamline is as each peer."""
    for model in MODELS:
        bars = list(_speedups(_comparisons(results, model)))
        if bars:
            with house_style():
                yield f"{model}: Beamline over its peers", _bars(model, bars)


PLOTS: dict[str, Callable[[Results], Iterator[tuple[str, str]]]] = {"tokens-per-s": rates, "times-as-fast": speedups}
"""By the beginning of the file's name; each yields titles, which begin with the model, and pictures."""


def _comparisons(results: Results, model: str) -> dict[str, Comparison]:
    found = {
        "whole file" if batch is None else f"batch {batch}": results.comparisons.get(comparison_key(model, batch))
        for batch in (1, 8, 32, None)
    }
    return {label: comparison for label, comparison in found.items() if comparison is not None}


def _rates(model: str, comparisons: dict[str, Comparison]) -> str:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    names = [name for name in names_of(comparisons.values()) if not _latency_only(name)]
    positions, width = np.arange(len(comparisons)), 0.84 / len(names)
    for number, name in enumerate(names):
        found = [comparison.tokens_per_s(name) for comparison in comparisons.values()]
        offset = (number - (len(names) - 1) / 2) * width
        heights = [value.median if value else 0.0 for value in found]
        axes.bar(positions + offset, heights, 0.92 * width, color=_colour(name), label=name)
        _whiskers(axes, positions + offset, found)
    axes.set_xticks(positions, list(comparisons))
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("output tokens/s")
    axes.set_title(model, loc="left", fontsize=10.5)
    figure.legend(loc="outside lower center", ncols=3)
    return _svg(figure)


def _whiskers(axes: Axes, positions: Iterable[float], found: Sequence[Spread | None]) -> None:
    """From the least to the greatest."""
    for position, value in zip(positions, found, strict=True):
        if value is not None:
            axes.plot([position, position], [value.low, value.high], color=INK, linewidth=1)


def _speedups(comparisons: dict[str, Comparison]) -> Iterator[tuple[str, Spread]]:
    """Of Beamline over the peers in the same precision, but for slow ones, whose bars would dwarf the others."""
    for ours in CONTENDERS:
        for theirs in CONTENDERS:
            peers = not theirs.ours and not theirs.slow
            if ours.kind == "beamline" and peers and ours.precision == theirs.precision:
                for label, comparison in comparisons.items():
                    if value := comparison.speedup(ours.name, theirs.name):
                        yield f"{ours.name} / {theirs.name}, {label}", value


def _bars(model: str, bars: list[tuple[str, Spread]]) -> str:
    figure = Figure(figsize=(WIDTH, 0.9 + BAR_HEIGHT * len(bars)), layout="constrained")
    axes = figure.subplots()
    labels, values = [label for label, _ in bars], [value for _, value in bars]
    positions = np.arange(len(bars))[::-1]
    colours = [_colour(label.partition(" / ")[0]) for label in labels]
    axes.barh(positions, [value.median for value in values], 0.7, color=colours)
    right = max(value.high for value in values)
    for position, value in zip(positions, values, strict=True):
        axes.plot([value.low, value.high], [position, position], color=INK, linewidth=1)
        axes.annotate(f"{value.median:.2f}", (value.high, position), (4, 0), textcoords="offset points", va="center")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(0, max(1.2, 1.1 * right))
    axes.set_yticks(positions, labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("times as fast")
    axes.set_title(model, loc="left", fontsize=10.5)
    return _svg(figure)


def _colour(name: str) -> str:
    number = next(i for i, contender in enumerate(CONTENDERS) if contender.name == name)
    return COLOURS[number % len(COLOURS)]


def _latency_only(name: str) -> bool:
    return any(contender.latency_only for contender in CONTENDERS if contender.name == name)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # Without a date the same results give the same file; a white ground, for pages may be dark.
    figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()
