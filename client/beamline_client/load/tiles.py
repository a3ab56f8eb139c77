"""The few figures of a report that are to be seen first."""

from dataclasses import dataclass

from beamline_client.load.report import FindMaxReport, Latency, RunReport
from beamline_client.load.wording import (
    NOTHING,
    failed_and_tried,
    latency_limits_ms,
    limit,
    number,
    percent,
    rate,
    slo_text,
)


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure."""

    name: str
    value: str
    unit: str
    note: str
    bad: bool = False
    """Whether it is what a failure is about."""


def run_tiles(report: RunReport) -> list[Tile]:
    """Of a run: p50, p99, answered, goodput, errors, quality; without what was not measured."""
    throughput = report.throughput
    tiles = [
        _latency_tile(report, "50"),
        _latency_tile(report, "99"),
        Tile("answered", number(throughput.answered_per_s), "/s", f"of {number(throughput.offered_per_s)}/s offered"),
    ]
    if throughput.goodput_per_s is not None:
        limits = latency_limits_ms(slo_text(report))
        within = f"answered within {limit(limits[-1][1])}" if limits else "answered in time"
        tiles.append(Tile("goodput", number(throughput.goodput_per_s), "/s", within))
    tiles.append(_errors_tile(report))
    return tiles + _quality_tiles(report)


def find_max_tiles(report: FindMaxReport) -> list[Tile]:
    """Of a search: the highest rate, then what the run at that rate measured."""
    if report.highest_rate_per_s is None:
        return [Tile("highest rate", NOTHING, "", f"none that was tried met {report.slo}", bad=True)]
    found = rate(report.highest_rate_per_s).removesuffix("/s")
    missed = "no rate that was tried missed it"
    if report.step_per_s is not None:
        missed = f"± {rate(report.step_per_s)}"
    return [Tile("highest rate", found, "/s", missed), *(run_tiles(report.best) if report.best else [])]


def _latency_tile(report: RunReport, percentile: str) -> Tile:
    value_ms = _percentile(report.latency, percentile)
    limit_ms = dict(latency_limits_ms(slo_text(report))).get(float(percentile))
    note = "from intended send" if limit_ms is None else f"SLO ≤ {limit(limit_ms)}"
    too_long = limit_ms is not None and value_ms is not None and value_ms > limit_ms
    return Tile(f"latency p{percentile}", number(value_ms), "ms" if value_ms is not None else "", note, bad=too_long)


def _errors_tile(report: RunReport) -> Tile:
    failed, tried = failed_and_tried(report.outcomes)
    missed = (
        any(not clause.met for clause in report.slo.clauses if clause.text.startswith("errors"))
        if report.slo
        else False
    )
    share = percent(failed / tried) if tried else NOTHING
    value, _, unit = share.rpartition(" ")
    return Tile("errors", value or share, unit if value else "", f"{failed:,} of {tried:,} requests", bad=missed)


def _quality_tiles(report: RunReport) -> list[Tile]:
    quality = report.quality
    if quality is None:
        return []
    wrong = quality.inconsistent + (quality.golden.different if quality.golden else 0)
    if quality.bleu is None:
        note = f"of {quality.distinct:,} distinct" if wrong else "same question, same answer"
        return [Tile("wrong answers", f"{wrong:,}", "", note, bad=wrong > 0)]
    note = f"{wrong:,} wrong answers" if wrong else f"chrF {number(quality.chrf)}; all answers consistent"
    return [Tile("BLEU", number(quality.bleu), "", note, bad=wrong > 0)]


def _percentile(latency: Latency | None, percentile: str) -> float | None:
    return latency.percentiles_ms.get(percentile) if latency else None
