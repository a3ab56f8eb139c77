"""A report as one HTML page that needs nothing else: no network, no script."""

from collections.abc import Iterable
from html import escape

from beamline_client.load.coarser import coarser_samples, coarser_windows
from beamline_client.load.knee_plot import rate_against_latency
from beamline_client.load.page_style import STYLE
from beamline_client.load.plots import (
    latency_over_time,
    percentile_spectrum,
    phases_over_time,
    rate_over_time,
    server_over_time,
)
from beamline_client.load.report import SCHEMA_VERSION, FindMaxReport, RunReport
from beamline_client.load.tables import (
    Facts,
    Table,
    answer_facts,
    classes_table,
    configuration_facts,
    environment_facts,
    generator_facts,
    latency_table,
    outcome_facts,
    phases_table,
    points_table,
    present,
    processes_table,
    server_facts,
    slo_table,
    throughput_facts,
)
from beamline_client.load.tiles import Tile, find_max_tiles, run_tiles
from beamline_client.load.wording import (
    banner,
    load_in_words,
    plain,
    rate,
    rate_in_words,
    search_in_words,
    server_in_words,
)

_KNEE = (
    "Each rate was offered for a while; a circle met the objective, a cross missed it. Where the curves turn up, "
    "requests come faster than the server works, and wait. The green line is the highest rate that met the objective, "
    "and the band beside it what was not tried. Below: answers keep up with the dotted line until the server is full."
)
_LATENCY = (
    "Half of the requests of each window took no longer than p50, 99 of 100 no longer than p99, counted from when they "
    "were meant to be sent. A level curve is a server that keeps up; a rising one, a queue that grows."
)
_RATE = "Where answers stay below what was offered, requests wait or fail."
_PHASES = "What an average answer spent waiting for its turn, reading its input, and writing its output."
_SERVER = "The server's own figures, once a second, on the same time axis as the plots above."
_SPECTRUM = (
    "How long the slowest share of requests took; each label to the right is a ten times rarer case. Where the lines "
    "part, the generator sent late (actual send) or failures came sooner or later than answers."
)


_WINDOWS_DRAWN = 150
"""More than these cannot be told apart in a plot; beyond, neighbours are put together."""


def html_page(report: RunReport | FindMaxReport) -> str:
    """The page; the same report gives the same text."""
    body = _find_max_body(report) if isinstance(report, FindMaxReport) else _run_body(report)
    title = f"beamline load: {banner(report.verdict).word}, {_headline(report)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"{_details(report)}\n<footer>beamline load {_text(report.environment.beamline)}, "
        f"report schema version {SCHEMA_VERSION}. Times count from the moment at which a request was meant to be sent, "
        "unless it says otherwise; the warm-up is left out of all figures but those over time.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _run_body(report: RunReport) -> str:
    return _banner(report) + _tiles(run_tiles(report)) + _run_figures(report)


def _find_max_body(report: FindMaxReport) -> str:
    knee = _figure("Rate against latency", rate_against_latency(report), _KNEE)
    tried = "".join(map(_table, present(points_table(report))))
    parts = [_banner(report), _tiles(find_max_tiles(report)), _columns("columns even", knee, tried)]
    if report.best is not None and report.highest_rate_per_s is not None:
        parts += [f"<h2>The run at {_text(rate(report.highest_rate_per_s))}</h2>\n", _run_figures(report.best)]
    return "".join(parts)


def _run_figures(report: RunReport) -> str:
    windows = coarser_windows(report.windows, _WINDOWS_DRAWN)
    samples = coarser_samples(report.server_samples, _WINDOWS_DRAWN)
    drawn = report.model_copy(update={"windows": windows, "server_samples": samples})
    over_time = [
        _figure("Latency over time", latency_over_time(drawn), _LATENCY),
        _figure("Requests over time", rate_over_time(drawn), _RATE),
        _figure("Time in the server", phases_over_time(drawn), _PHASES),
        _figure("Inside the server", server_over_time(drawn), _SERVER),
    ]
    tables = present(latency_table(report), phases_table(report), classes_table(report), slo_table(report))
    spread = [_figure("Latency by percentile", percentile_spectrum(report), _SPECTRUM), *map(_table, tables)]
    spread += [
        _card("Throughput and outcomes", _facts(throughput_facts(report) + outcome_facts(report))),
        _card("Right answers", _facts(answer_facts(report))),
    ]
    cards = [
        _card("Load generator", _facts(generator_facts(report))),
        *map(_table, present(processes_table(report))),
    ]
    return _columns("columns", "".join(over_time), "".join(spread)) + f'<div class="halves">{"".join(cards)}</div>\n'


def _columns(layout: str, left: str, right: str) -> str:
    """Side by side; what stands alone takes the whole width."""
    if left and right:
        return f'<div class="{layout}"><div>{left}</div><div>{right}</div></div>\n'
    return f"<div>{left}{right}</div>\n"


def _headline(report: RunReport | FindMaxReport) -> str:
    if isinstance(report, FindMaxReport):
        return f"{rate_in_words(report)} met {report.slo}"
    return load_in_words(report.configuration)


def _banner(report: RunReport | FindMaxReport) -> str:
    said = banner(report.verdict)
    headline = f'<p class="headline">{_text(_headline(report))}</p>' if isinstance(report, FindMaxReport) else ""
    lines = [f'<li class="reason">{_text(reason)}</li>' for reason in said.reasons]
    lines += [f"<li>{_text(remark)}</li>" for remark in report.verdict.remarks]
    if isinstance(report, FindMaxReport):
        load = search_in_words(report)
    else:
        load = f"{load_in_words(report.configuration)}; {report.configuration.target}"
    return (
        f'<header class="banner {said.state}"><div><h1>{said.word}</h1>{headline}<p>{_text(said.sentence)}</p>'
        + (f"<ul>{''.join(lines)}</ul>" if lines else "")
        + f'</div><div class="load"><strong>{_text(server_in_words(report.server))}</strong><br>{_text(load)}<br>'
        f"{_text(report.started_at)}</div></header>\n"
    )


def _tiles(tiles: Iterable[Tile]) -> str:
    return f'<div class="tiles">{"".join(map(_tile, tiles))}</div>\n'


def _tile(tile: Tile) -> str:
    unit = f" <small>{_text(tile.unit)}</small>" if tile.unit else ""
    return (
        f'<div class="tile{" bad" if tile.bad else ""}"><div class="name">{_text(tile.name)}</div>'
        f'<div class="value">{_text(tile.value)}{unit}</div><div class="note">{_text(tile.note)}</div></div>'
    )


def _figure(title: str, svg: str | None, caption: str) -> str:
    """Nothing if there is nothing to draw."""
    if svg is None:
        return ""
    return f'<figure class="card"><h3>{title}</h3>\n{svg}\n<figcaption>{caption}</figcaption></figure>\n'


def _table(table: Table) -> str:
    last = len(table.header) - 1

    def words(column: int) -> str:
        return ' class="words"' if column == 0 or (table.last_is_text and column == last) else ""

    head = "".join(f'<th scope="col"{words(i)}>{_text(name)}</th>' for i, name in enumerate(table.header))
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td{words(i)}>{_text(cell)}</td>" for i, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in table.rows
    )
    return _card(table.title, f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def _card(title: str, inside: str) -> str:
    return f'<section class="card"><h3>{_text(title)}</h3>{inside}</section>\n'


def _facts(facts: Facts) -> str:
    pairs = "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in facts)
    return f"<dl>{pairs}</dl>"


def _details(report: RunReport | FindMaxReport) -> str:
    parts = {
        "Configuration": configuration_facts(report),
        "Server": server_facts(report.server),
        "Environment of the load generator": environment_facts(report.environment),
    }
    return "".join(f"<details><summary>{name}</summary>{_facts(facts)}</details>\n" for name, facts in parts.items())


def _text(text: str) -> str:
    return escape(plain(text))
