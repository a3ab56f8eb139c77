"""Did it get slower? Two reports, their figures' ratios, and how sure those are."""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beamline_client.load import bootstrap
from beamline_client.load.report import FindMaxReport, Part, RunReport, Window
from beamline_client.load.wording import NOTHING, number, percent, plain

TOLERANCE = 0.05
RESAMPLES = 2000
_WIDE = 1.25
"""An interval that reaches so far from 1 hides changes that people would want to see."""
_CONFIGURATION = ("target", "mode", "arrivals", "rate", "concurrency", "seed", "retries")
_SERVER = ("model", "precision", "device")
_ENVIRONMENT = ("cpu", "cores", "gpu")
_FAILURES_DIFFER = 0.01
_COMMIT_DIGITS = 12
_STYLES = {"worse": "bold red", "better": "bold green", "unclear": "yellow", "same": ""}

Judgement = Literal["same", "better", "worse", "unclear"]


class NotComparable(Exception):
    """Two reports have nothing to compare; the text is one line that says why and what to do."""


class Change(Part):
    """One figure before and after."""

    name: str
    unit: str
    before: float
    after: float
    ratio: float
    """After by before."""
    low: float
    """Where the 95 % confidence interval of the ratio begins; of a highest rate, the least that the steps allow."""
    high: float | None
    """Where it ends; None is not known: a search that found no rate that misses its SLO."""
    verdict: Judgement
    """"same": the interval holds 1 or lies within the tolerance; "better", "worse": all of it lies beyond the
    tolerance; "unclear": neither."""


class Comparison(Part):
    """Two reports, figure by figure."""

    kind: Literal["comparison"] = "comparison"
    schema_version: Literal[1] = 1
    before: str
    """When it began, and at which commit."""
    after: str
    tolerance: float
    changes: list[Change]
    remarks: list[str]
    """What the reader should know besides: that not only the server differs, or that an interval is wide."""


def compare(
    before: RunReport | FindMaxReport,
    after: RunReport | FindMaxReport,
    *,
    tolerance: float = TOLERANCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    allow_invalid: bool = False,
) -> Comparison:
    """Compares two runs, or two searches for the highest rate.

    Args:
        before: What is compared with.
        after: What is judged.
        tolerance: How much of a change does not matter, as a share; "beyond" is 1 + it, or 1 / (1 + it), so that
            swapping the reports turns every verdict round.
        resamples: How often the runs' windows are drawn again.
        seed: Of those draws.
        allow_invalid: Whether to compare reports that are marked invalid.

    Raises:
        NotComparable: They are of different kinds, marked invalid, too short, or without answers.
    """
    if not allow_invalid:
        _check_valid(before, after)
    if isinstance(before, RunReport) and isinstance(after, RunReport):
        changes = _compare_runs(before, after, tolerance, resamples, np.random.default_rng(seed))
    elif isinstance(before, FindMaxReport) and isinstance(after, FindMaxReport):
        changes = [_compare_searches(before, after, tolerance)]
    else:
        raise NotComparable("one report is of a run and one of find-max: compare two of a kind")
    return Comparison(
        before=_label(before),
        after=_label(after),
        tolerance=tolerance,
        changes=changes,
        remarks=[*_verdict_remarks(before, after), *_differences(before, after), *_width_remarks(changes)],
    )


def judge(low: float, high: float, tolerance: float, *, more_is_better: bool) -> Judgement:
    """What the interval of a ratio after / before means; see `Change.verdict`."""
    least, most = 1 / (1 + tolerance), 1 + tolerance
    if low <= 1 <= high or (least <= low and high <= most):
        return "same"
    if high < least:
        return "worse" if more_is_better else "better"
    if low > most:
        return "better" if more_is_better else "worse"
    return "unclear"


def exit_status(comparison: Comparison) -> int:
    """1 if something is worse, 0 otherwise."""
    return int(any(change.verdict == "worse" for change in comparison.changes))


def to_json(comparison: Comparison) -> str:
    """A comparison as JSON text."""
    return comparison.model_dump_json(indent=1) + "\n"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints a comparison; readable at 80 columns."""
    console.print(Text(f"before: {plain(comparison.before)}"))
    console.print(Text(f"after:  {plain(comparison.after)}"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("before", "after", "change", "95 % interval"):
        table.add_column(name, justify="right")
    table.add_column("")
    for change in comparison.changes:
        table.add_row(
            f"{change.name}, {change.unit}",
            number(change.before),
            number(change.after),
            _as_change(change.ratio),
            f"{_as_change(change.low)} to {_as_change(change.high)}",
            Text(change.verdict, style=_STYLES[change.verdict]),
        )
    console.print(table)
    console.print(Text(f"Changes of up to {comparison.tolerance * 100:g} % are taken for none."))
    for remark in comparison.remarks:
        console.print(Text(plain(f"note: {remark}")))


def _as_change(ratio: float | None) -> str:
    return "unknown" if ratio is None else f"{ratio - 1:+.1%}".replace("%", " %")


def _check_valid(before: RunReport | FindMaxReport, after: RunReport | FindMaxReport) -> None:
    for name, report in (("before", before), ("after", after)):
        if not report.verdict.valid:
            why = "; ".join(report.verdict.invalid_because) or "it does not say why"
            raise NotComparable(plain(f"the report {name} is INVALID ({why}): measure again, or --allow-invalid"))


def _compare_runs(
    before: RunReport, after: RunReport, tolerance: float, resamples: int, random: np.random.Generator
) -> list[Change]:
    blocks = [_blocks("before", before), _blocks("after", after)]
    own = [bootstrap.measured(each) for each in blocks]
    drawn = [bootstrap.drawn_again(each, resamples, random) for each in blocks]
    numbers = (len(blocks[0].seconds), len(blocks[1].seconds))
    changes = []
    for name, field, unit in (
        ("p50", "p50_ms", "ms"),
        ("p99", "p99_ms", "ms"),
        ("answered", "answered_per_s", "per s"),
    ):
        values = [float(getattr(figures, field)[0]) for figures in own]
        low, high = bootstrap.interval(getattr(drawn[0], field), getattr(drawn[1], field), numbers)
        changes.append(
            Change(
                name=name,
                unit=unit,
                before=values[0],
                after=values[1],
                ratio=values[1] / values[0],
                low=low,
                high=high,
                verdict=judge(low, high, tolerance, more_is_better=field == "answered_per_s"),
            )
        )
    return changes


def measured_windows(report: RunReport) -> list[Window]:
    """The windows after the warm-up."""
    # By their middle, for the warm-up need not end where one begins: a window that is half warm-up is left out.
    return [window for window in report.windows if window.start_s + window.seconds / 2 > report.configuration.warm_up_s]


def _blocks(name: str, report: RunReport) -> bootstrap.Blocks:
    windows = measured_windows(report)
    if len(windows) < bootstrap.FEWEST_BLOCKS:
        raise NotComparable(
            f"the run {name} has {len(windows)} windows after its warm-up, and {bootstrap.FEWEST_BLOCKS} are the least "
            "to tell a change from chance: run longer"
        )
    if not sum(window.answered for window in windows) or all(window.histogram is None for window in windows):
        raise NotComparable(f"the run {name} has no answers after its warm-up: look into its failures first")
    return bootstrap.cut(windows)


def _compare_searches(before: FindMaxReport, after: FindMaxReport, tolerance: float) -> Change:
    rates = []
    for name, report in (("before", before), ("after", after)):
        if not report.highest_rate_per_s:
            raise NotComparable(f"the search {name} found no rate that meets its SLO: begin lower, or allow more")
        # The truth lies between the highest rate that met the SLO and the lowest that missed it.
        step = math.inf if report.step_per_s is None else report.step_per_s
        rates.append((report.highest_rate_per_s, report.highest_rate_per_s + step))
    (least_before, most_before), (least_after, most_after) = rates
    low, high = least_after / most_before, most_after / least_before
    return Change(
        name="highest rate",
        unit="per s",
        before=least_before,
        after=least_after,
        ratio=least_after / least_before,
        low=low,
        high=None if math.isinf(high) else high,
        verdict=judge(low, high, tolerance, more_is_better=True),
    )


def _label(report: RunReport | FindMaxReport) -> str:
    commit, dash, dirty = (report.environment.commit or "unknown").partition("-")
    return f"{report.started_at}, commit {commit[:_COMMIT_DIGITS]}{dash}{dirty}"


def _verdict_remarks(before: RunReport | FindMaxReport, after: RunReport | FindMaxReport) -> Iterator[str]:
    for name, report in (("before", before), ("after", after)):
        verdict = report.verdict
        if not verdict.valid:
            yield f"the report {name} is INVALID: the generator may have made its figures"
        if verdict.interrupted:
            yield f"the report {name} is of a run that was interrupted"
        for failure in verdict.failures:
            yield f"{name}: {failure}"


def _differences(before: RunReport | FindMaxReport, after: RunReport | FindMaxReport) -> Iterator[str]:
    """What differs besides the figures, so that the server alone need not be the reason."""
    one, other = _conditions(before), _conditions(after)
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            yield f"{name} differs: {_or_nothing(one.get(name))} before, {_or_nothing(other.get(name))} after"
    if isinstance(before, RunReport) and isinstance(after, RunReport):
        shares = (_failed_share(before), _failed_share(after))
        if abs(shares[0] - shares[1]) > _FAILURES_DIFFER:
            yield (
                f"{percent(shares[0])} of the requests failed before, {percent(shares[1])} after: "
                "p50 and p99 are of those that were answered"
            )


def _conditions(report: RunReport | FindMaxReport) -> dict[str, object]:
    conditions: dict[str, object] = {"the SLO": report.slo} if isinstance(report, FindMaxReport) else {}
    for part, prefix, names in (
        (report.configuration, "", _CONFIGURATION),
        (report.server, "server's ", _SERVER),
        (report.environment, "generator's ", _ENVIRONMENT),
    ):
        if part is not None:
            conditions |= {prefix + name: getattr(part, name) for name in names}
    if isinstance(report, FindMaxReport):
        conditions.pop("rate", None)  # it is what was looked for
    if report.configuration is not None:
        conditions |= {f"workload's {name}": value for name, value in report.configuration.workload.items()}
    return conditions


def _or_nothing(value: object) -> str:
    return NOTHING if value is None else str(value)


def _failed_share(report: RunReport) -> float:
    windows = measured_windows(report)
    offered = sum(window.offered for window in windows)
    return sum(window.failed for window in windows) / offered if offered else 0.0


def _width_remarks(changes: list[Change]) -> Iterator[str]:
    for change in changes:
        wide = change.high is None or change.high > _WIDE or change.low < 1 / _WIDE
        if change.verdict in ("same", "unclear") and wide:
            yield f"{change.name} is not known well enough to see a change of {_WIDE - 1:.0%}: measure longer"
