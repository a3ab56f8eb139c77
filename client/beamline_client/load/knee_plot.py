"""The knee: rate against latency over all rates that a search tried."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from beamline_client.load.inline_svg import house_style, inline_svg
from beamline_client.load.plot_axes import (
    GOOD,
    INK,
    LEFT,
    MIDDLE,
    QUIET,
    RIGHT,
    TAIL,
    WIDTH,
    Floats,
    latency_scale,
    legend,
    numbers,
)
from beamline_client.load.report import FindMaxReport, Point
from beamline_client.load.wording import latency_limits_ms, rate

_SHAPES = {"met": "o", "missed": "X", "invalid": "s"}


def rate_against_latency(report: FindMaxReport) -> str | None:
    """The knee: latency and answers at each rate that was tried; None without points."""
    if not report.points:
        return None
    points = sorted(report.points, key=lambda point: point.rate_per_s)
    rates = np.array([point.rate_per_s for point in points])
    # Sorting is stable: of a rate that was tried again, the curve goes through the last attempt, which decided.
    decided = np.append(np.flatnonzero(np.diff(rates)), len(rates) - 1)
    with house_style():
        figure = Figure(figsize=(WIDTH, 4.6))
        above, below = figure.subplots(2, sharex=True, height_ratios=[2.6, 1])
        figure.subplots_adjust(left=LEFT, right=RIGHT, top=0.92, bottom=0.1, hspace=0.14)
        everything = numbers([value for point in points for value in (point.p50_ms, point.p99_ms)])
        for label, colour, values in (
            ("p99", TAIL, numbers([point.p99_ms for point in points])),
            ("p50", MIDDLE, numbers([point.p50_ms for point in points])),
        ):
            above.plot(rates[decided], values[decided], color=colour, linewidth=1.6, label=label)
            _scatter_points(above, points, values, colour)
        latency_scale(above, everything, latency_limits_ms(report.slo))
        _explain_shapes(above, points)
        answered = np.array([point.answered_per_s for point in points])
        top = max(rates.max(), answered.max()) * 1.06
        below.plot([0, top], [0, top], color=QUIET, linewidth=1, linestyle=(0, (2, 2)))
        below.plot(rates[decided], answered[decided], color=MIDDLE, linewidth=1.6)
        _scatter_points(below, points, answered, MIDDLE)
        below.set_xlim(0, top)
        below.set_ylim(0, top)
        below.yaxis.set_major_locator(MaxNLocator(3))
        _mark_answer(report, above, below)
        above.set_ylabel("latency, ms")
        below.set_ylabel("answered/s")
        below.set_xlabel("offered, requests/s")
        legend(above, columns=6)
        return inline_svg(figure, "knee", "Rate against latency: p50, p99 and answers at every rate that was tried")


def _scatter_points(axes: Axes, points: Sequence[Point], values: Floats, colour: str) -> None:
    """Met, missed and invalid points, told apart by their shape as well."""
    for shape, wanted in _SHAPES.items():
        chosen = [i for i, point in enumerate(points) if _shape(point) == shape and np.isfinite(values[i])]
        face = colour if shape == "met" else "white"
        axes.scatter(
            [points[i].rate_per_s for i in chosen],
            values[chosen],
            marker=wanted,
            s=42,
            facecolor=face,
            edgecolor=colour,
            linewidth=1.5,
            zorder=3,
        )


def _explain_shapes(axes: Axes, points: Sequence[Point]) -> None:
    present = {_shape(point) for point in points}
    for shape, marker in _SHAPES.items():
        if shape in present:
            face = INK if shape == "met" else "white"
            axes.scatter([], [], marker=marker, s=42, facecolor=face, edgecolor=INK, linewidth=1.5, label=shape)


def _shape(point: Point) -> str:
    if not point.valid:
        return "invalid"
    return "met" if point.met else "missed"


def _mark_answer(report: FindMaxReport, above: Axes, below: Axes) -> None:
    best = report.highest_rate_per_s
    if best is None:
        return
    for axes in (above, below):
        axes.axvline(best, color=GOOD, linewidth=1.4, zorder=1)
        if report.step_per_s:
            axes.axvspan(best, best + report.step_per_s, color=GOOD, alpha=0.12, linewidth=0, zorder=0)
    right_half = best > above.get_xlim()[1] / 2
    above.annotate(
        f"highest: {rate(best)}",
        (best, 0.04),
        (-6 if right_half else 6, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if right_half else "left",
        color=GOOD,
        fontweight="bold",
    )
