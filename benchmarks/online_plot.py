"""The picture of the online comparison: p99 at every rate that was tried, and where each server's limit is."""

import io
from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from online_results import Results, Search, highest_rates
from online_servers import LABELS, System

from beamline_client.load.inline_svg import house_style
from beamline_client.load.plot_axes import INK, MIDDLE, QUEUE, TAIL
from beamline_client.load.wording import latency_limits_ms

COLOURS = {System.CONTINUOUS: MIDDLE, System.REQUEST_LEVEL: QUEUE, System.CTRANSLATE2: TAIL}
_FURTHEST = 20.0
"""Points of so many times the limit are drawn at the edge: how hopeless a rate was says nothing."""


def plot(results: Results) -> str:
    """The picture as an SVG file's text: a panel for each workload."""
    names = list(results.workloads)
    limit_ms = min((each for _, each in latency_limits_ms(results.slo)), default=500.0)
    with house_style():
        figure = Figure(figsize=(4.6 * len(names), 3.6), layout="constrained", facecolor="white")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            _panel(axes, [each for each in results.searches if each.workload == name], name, limit_ms)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
        buffer = io.StringIO()
        # Without a date, so that the same results are the same file.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panel(axes: Axes, searches: Sequence[Search], name: str, limit_ms: float) -> None:
    for system, colour in COLOURS.items():
        points = [
            (point.rate_per_s, min(point.p99_ms, limit_ms * _FURTHEST))
            for each in searches
            if each.system is system
            for point in each.points
            if point.p99_ms is not None
        ]
        axes.scatter(
            [rate for rate, _ in points], [p99 for _, p99 in points], s=18, color=colour, alpha=0.6, linewidth=0,
            label=LABELS[system], clip_on=False,
        )  # fmt: skip
        if rates := list(highest_rates(searches, name, system).values()):
            axes.axvline(median(rates), color=colour, linewidth=1.4)
    axes.axhline(limit_ms, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)
    axes.set_title(name, loc="left", fontsize=10)
    axes.set_xlabel("offered, requests/s")
    axes.set_ylabel("p99, ms")
