"""The summary of a report for a person at a terminal: the verdict first, then the figures; readable at 80 columns."""

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from beamline_client.load.report import FindMaxReport, RunReport, Verdict
from beamline_client.load.tables import (
    Facts,
    Table,
    answer_facts,
    classes_table,
    generator_facts,
    latency_table,
    outcome_facts,
    phases_table,
    points_table,
    present,
    processes_table,
    slo_table,
    throughput_facts,
)
from beamline_client.load.wording import banner, load_in_words, plain, rate_in_words, search_in_words, server_in_words

_STYLES = {"good": "bold green", "doubtful": "bold yellow", "bad": "bold red"}


def print_run(report: RunReport, console: Console) -> None:
    """Prints what a run measured."""
    _print_verdict(report.verdict, console)
    _print(console, f"{load_in_words(report.configuration)}; {report.configuration.target}")
    _print(console, server_in_words(report.server))
    _print_run_figures(report, console)


def print_find_max(report: FindMaxReport, console: Console) -> None:
    """Prints what a search found, and the run at the highest rate that met the SLO."""
    _print_verdict(report.verdict, console)
    _print(console, f"{rate_in_words(report)} met {report.slo}", style="bold")
    _print(console, search_in_words(report))
    _print(console, server_in_words(report.server))
    for table in present(points_table(report)):
        _print_table(table, console)
    if report.best is not None:
        _print(console, "At the highest rate that met it:", style="bold")
        _print_run_figures(report.best, console)


def _print_verdict(verdict: Verdict, console: Console) -> None:
    said = banner(verdict)
    console.print()
    _print(console, said.word, style=_STYLES[said.state])
    _print(console, said.sentence)
    _print_list([*said.reasons, *(f"note: {remark}" for remark in verdict.remarks)], console)


def _print_run_figures(report: RunReport, console: Console) -> None:
    console.print()
    _print_facts(throughput_facts(report) + outcome_facts(report), console)
    for table in present(latency_table(report), phases_table(report), classes_table(report), slo_table(report)):
        _print_table(table, console)
    _print_facts(answer_facts(report) + generator_facts(report), console)
    for table in present(processes_table(report)):
        _print_table(table, console)


def _print_list(lines: list[str], console: Console) -> None:
    grid = RichTable.grid(padding=(0, 1))
    for line in lines:
        grid.add_row(Text("-"), Text(plain(line)))
    if lines:
        console.print(grid)


def _print_facts(facts: Facts, console: Console) -> None:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    before = ""
    for name, text in facts:
        grid.add_row(Text(plain(name) if name != before else "", style="bold"), Text(plain(text)))
        before = name
    console.print(grid)


def _print_table(table: Table, console: Console) -> None:
    """The title stands in the head of the first column if that is free."""
    rich = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    head = (table.header[0] or table.title, *table.header[1:])
    for i, name in enumerate(head):
        is_text = i == 0 or (table.last_is_text and i == len(head) - 1)
        rich.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(plain(cell)) for cell in row))
    console.print(rich)


def _print(console: Console, text: str, *, style: str = "") -> None:
    console.print(Text(plain(text), style=style))
