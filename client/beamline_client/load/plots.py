"""The plots of a report, as SVG elements. Those over time have the same time axis at the same place."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from beamline_client.load.histograms import decoded
from beamline_client.load.inline_svg import house_style, inline_svg
from beamline_client.load.plot_axes import (
    BAD,
    DECODE,
    INK,
    LEFT,
    MIDDLE,
    QUEUE,
    QUIET,
    RIGHT,
    TAIL,
    WARM_UP,
    WIDTH,
    Floats,
    latency_scale,
    legend,
    numbers,
)
from beamline_client.load.report import Latency, RunReport, Window
from beamline_client.load.wording import latency_limits_ms, slo_text

_HEIGHT = 2.7
_SPECTRUM_POINTS = 240
_DOTS_UP_TO = 60
"""With more windows than these, a line is drawn without dots."""


def latency_over_time(report: RunReport) -> str | None:
    """p50 and p99 of each window, failures, the SLO's limit; None without windows."""
    if not report.windows:
        return None
    with house_style():
        figure, (axes,) = _time_figure(report, [_HEIGHT + 0.3])
        middle, tail = numbers([w.p50_ms for w in report.windows]), numbers([w.p99_ms for w in report.windows])
        times, dots = _middles(report.windows), "o" if len(report.windows) <= _DOTS_UP_TO else None
        axes.plot(times, tail, color=TAIL, marker=dots, markersize=3.5, label="p99")
        axes.plot(times, middle, color=MIDDLE, marker=dots, markersize=3.5, label="p50")
        latency_scale(axes, np.concatenate([middle, tail]), latency_limits_ms(slo_text(report)))
        failed = np.array([window.failed for window in report.windows])
        if failed.any():
            label = f"failures ({failed.sum():,})"
            at = axes.get_xaxis_transform()
            y = np.full(int((failed > 0).sum()), 0.965)
            axes.scatter(times[failed > 0], y, transform=at, marker="x", s=26, color=BAD, label=label, clip_on=False)
        axes.set_ylabel("latency, ms")
        legend(axes)
        return inline_svg(figure, "latency", "Latency over time: p50 and p99 of every window")


def rate_over_time(report: RunReport) -> str | None:
    """Offered and answered requests per second of each window; None without windows."""
    if not report.windows:
        return None
    with house_style():
        figure, (axes,) = _time_figure(report, [_HEIGHT - 0.4])
        edges = _edges(report.windows)
        seconds = np.array([window.seconds for window in report.windows])
        offered = np.array([window.offered for window in report.windows]) / seconds
        answered = np.array([window.answered for window in report.windows]) / seconds
        axes.stairs(offered, edges, baseline=None, color=QUIET, linewidth=1.2, label="offered")
        axes.stairs(answered, edges, baseline=None, color=MIDDLE, linewidth=1.8, label="answered")
        axes.set_ylim(0, max(1.0, 1.1 * float(max(offered.max(), answered.max()))))
        axes.set_ylabel("requests/s")
        legend(axes)
        return inline_svg(figure, "rate", "Requests per second over time: offered and answered")


def phases_over_time(report: RunReport) -> str | None:
    """Mean queue, encode and decode time of each window, stacked; None where the server does not tell."""
    phases = {"decode": DECODE, "encode": MIDDLE, "queue": QUEUE}
    told = {phase: numbers([getattr(w, f"{phase}_ms") for w in report.windows]) for phase in phases}
    told = {phase: values for phase, values in told.items() if np.isfinite(values).any()}
    if not told:
        return None
    with house_style():
        figure, (axes,) = _time_figure(report, [_HEIGHT - 0.2])
        edges = _edges(report.windows)
        below = np.zeros(len(edges) - 1)
        for phase, values in told.items():
            above = below + np.nan_to_num(values)
            axes.stairs(above, edges, baseline=below, fill=True, color=phases[phase], label=phase, linewidth=0)
            below = above
        axes.set_ylim(bottom=0)
        axes.set_ylabel("mean time, ms")
        legend(axes, backwards=True)
        return inline_svg(figure, "phases", "Server time over time: mean queue, encode and decode time, stacked")


def server_over_time(report: RunReport) -> str | None:
    """Rows per step, queued requests and step time as /metrics told them; None without samples."""
    samples = report.server_samples
    if not samples:
        return None
    times = np.array([sample.at_s for sample in samples])
    panels: list[tuple[str, str, Floats]] = [
        ("rows per step", MIDDLE, numbers([sample.rows_per_step for sample in samples])),
        ("requests queued", "#9a6700", numbers([sample.queued_requests for sample in samples])),
        ("step time, ms", "#59626c", numbers([sample.step_ms for sample in samples])),
    ]
    with house_style():
        figure, all_axes = _time_figure(report, [1.15, 1.15, 1.15])
        for axes, (label, colour, values) in zip(all_axes, panels, strict=True):
            axes.plot(times, values, color=colour)
            axes.fill_between(times, 0, values, color=colour, alpha=0.12, linewidth=0)
            highest = np.nanmax(values) if np.isfinite(values).any() else 0.0
            axes.set_ylim(0, max(1.0, highest * 1.15))
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=highest >= 3 or not highest))
            axes.set_title(label, loc="left", fontsize=9.5, pad=4)
        return inline_svg(figure, "server", "The server over time: rows per step, requests queued, step time")


def percentile_spectrum(report: RunReport) -> str | None:
    """Latency at every percentile, the tail stretched; None without answers."""
    lines: list[tuple[str, Latency | None, dict[str, Any]]] = [
        ("with failures", report.latency_with_failures, {"color": TAIL, "linewidth": 1.4, "linestyle": (0, (5, 2))}),
        ("from actual send", report.latency_from_send, {"color": QUIET, "linewidth": 3.2}),
        ("from intended send", report.latency, {"color": MIDDLE, "linewidth": 1.6}),
    ]
    told = [(label, latency, look) for label, latency, look in lines if latency]
    if not told:
        return None
    with house_style():
        figure = Figure(figsize=(5.1, 3.3), layout="constrained")
        axes = figure.subplots()
        nines = max(2.0, *(math.log10(latency.count) for _, latency, _ in told))
        drawn = []
        for label, latency, look in told:
            x, y = _spectrum(latency)
            axes.plot(x, y, label=label, drawstyle="steps-post", **look)
            drawn.append(y)
        limits = latency_limits_ms(slo_text(report))
        latency_scale(axes, np.concatenate(drawn), limits)
        for percentile, limit_ms in limits:
            if limit_ms <= axes.get_ylim()[1] and _nines(percentile) <= nines:
                axes.plot(_nines(percentile), limit_ms, marker="v", markersize=7, color=INK)
        ticks = [p for p in (50, 75, 90, 99, 99.9, 99.99, 99.999, 99.9999) if _nines(p) <= nines * 1.02]
        axes.set_xticks([_nines(p) for p in ticks], [f"{p:g}" for p in ticks])
        axes.set_xlim(_nines(50), nines * 1.04)
        axes.set_xlabel("percentile")
        axes.set_ylabel("latency, ms")
        legend(axes, backwards=True, columns=2)
        return inline_svg(figure, "spectrum", "Latency by percentile")


def _time_figure(report: RunReport, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Panels of these heights in inches, one below the other, over the whole run; the warm-up is shaded."""
    above, between, below = 0.32, 0.3, 0.5
    height = sum(heights) + between * (len(heights) - 1) + above + below
    figure, panels, top = Figure(figsize=(WIDTH, height)), list[Axes](), height - above
    end_s = max([w.start_s + w.seconds for w in report.windows] + [s.at_s for s in report.server_samples])
    for i, panel_height in enumerate(heights):
        place = (LEFT, (top - panel_height) / height, RIGHT - LEFT, panel_height / height)
        axes = figure.add_axes(place)
        axes.set_xlim(0, end_s)
        if warm_up_s := report.configuration.warm_up_s:
            axes.axvspan(0, min(warm_up_s, end_s), color="#eceef0", zorder=0, linewidth=0, label=WARM_UP)
        if i < len(heights) - 1:
            axes.tick_params(labelbottom=False)
        panels.append(axes)
        top -= panel_height + between
    panels[-1].set_xlabel("time from the start of the run, s")
    return figure, panels


def _spectrum(latency: Latency) -> tuple[Floats, Floats]:
    """Percentiles as -log10(1 - p), from the median to the last that the number of values can tell; and latency."""
    nines = np.linspace(_nines(50), max(math.log10(latency.count), _nines(50)), _SPECTRUM_POINTS)
    ranks = np.clip(np.ceil((1 - 10.0**-nines) * latency.count - 1e-6), 1, latency.count)  # as in percentile_ms
    at = (100 * ranks / latency.count).tolist()
    values = decoded(latency.histogram).get_percentile_to_value_dict(at)
    return nines, np.array([values[percentile] / 1000 for percentile in at])


def _nines(percentile: float) -> float:
    """How many nines a percentile has: 90 has one, 99 two."""
    return -math.log10(1 - percentile / 100)


def _edges(windows: Sequence[Window]) -> Floats:
    return np.array([window.start_s for window in windows] + [windows[-1].start_s + windows[-1].seconds])


def _middles(windows: Sequence[Window]) -> Floats:
    return np.array([window.start_s + window.seconds / 2 for window in windows])
