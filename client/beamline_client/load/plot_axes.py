"""What the plots have in common: colours, latency axes, legends."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from beamline_client.load.wording import limit

Floats = npt.NDArray[np.float64]

# Okabe and Ito's colours, which the colour-blind can tell apart; see https://jfly.uni-koeln.de/color/.
MIDDLE, TAIL, QUEUE, DECODE, QUIET = "#0072b2", "#d55e00", "#e69f00", "#56b4e9", "#8a939c"
GOOD, BAD, INK = "#1a7f37", "#b3261e", "#3a4149"

WIDTH, LEFT, RIGHT = 7.6, 0.095, 0.985
"""Width of a wide figure in inches, and where its axes begin and end, as shares of it."""
WARM_UP = "warm-up"
"""Label of the shade over it."""

_LOG_FROM = 30.0
"""A latency axis is logarithmic when its greatest value is so many times its least."""
_FAR_ABOVE = 4.0
"""A limit that is so many times the greatest value is left out, for it would press the curves together."""


def latency_scale(axes: Axes, values: Floats, limits: Sequence[tuple[float, float]]) -> None:
    """Linear from 0 if that shows the least values too, else logarithmic; with the SLO's limits, if not far above."""
    some = values[np.isfinite(values) & (values > 0)]
    lowest, highest = (float(some.min()), float(some.max())) if some.size else (1.0, 1.0)
    near = [(percentile, limit_ms) for percentile, limit_ms in limits if limit_ms <= _FAR_ABOVE * highest]
    highest = max([highest] + [limit_ms for _, limit_ms in near])
    if highest >= _LOG_FROM * lowest:
        axes.set_yscale("log")
        axes.set_ylim(min([lowest] + [limit_ms for _, limit_ms in near]) * 0.8, highest * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest < 3000 * lowest else (1.0,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, highest * 1.12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for percentile, limit_ms in near:
        axes.axhline(limit_ms, color=INK, linewidth=1, linestyle=(0, (5, 3)))
        text = f"SLO: p{percentile:g} ≤ {limit(limit_ms)}"
        axes.annotate(
            text,
            (0, limit_ms),
            (5, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8.5,
            color=INK,
            zorder=1.5,  # below the curves
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
        )


def legend(axes: Axes, *, columns: int = 4, backwards: bool = False) -> None:
    """Above the plot, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if backwards:
        handles, labels = handles[::-1], labels[::-1]
    order = sorted(range(len(labels)), key=lambda i: labels[i] == WARM_UP)  # the last to be explained
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.985),
        ncols=columns,
        borderaxespad=0.2,
        columnspacing=1.6,
        handlelength=1.6,
        handletextpad=0.6,
    )


def numbers(values: Sequence[float | None]) -> Floats:
    """With nan for what is not there."""
    return np.array([np.nan if value is None else value for value in values])
