"""The summary on a terminal of 80 columns, and in a file."""

import io
import re

import pytest
from rich.console import Console

from beamline_client.load.report import Books, FindMaxReport, Point, RunReport, Verdict
from beamline_client.load.summary import print_find_max, print_run
from beamline_client.load.testing import example_find_max, example_run

LATE = "the generator sent late: its lag has a p99 of 12.31 ms, allowed are 1.00 ms; lower the rate"
WRONG = "12 of 2,639 answers differ from golden.tsv, the first one to question 17"
STOPPED = Verdict(valid=True, invalid_because=[], interrupted=True, failures=[], remarks=[])


def printed(report: RunReport | FindMaxReport, *, width: int = 80) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=False)
    if isinstance(report, FindMaxReport):
        print_find_max(report, console)
    else:
        print_run(report, console)
    return stream.getvalue()


def unwrapped(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def run() -> RunReport:
    return example_run()


@pytest.fixture(scope="module")
def find_max() -> FindMaxReport:
    return example_find_max()


def test_lines_fit_80_columns_and_carry_no_escapes(run: RunReport, find_max: FindMaxReport) -> None:
    for text in (printed(run), printed(find_max)):
        assert max(map(len, text.splitlines())) <= 80
        assert "\x1b" not in text


def test_the_verdict_comes_first(run: RunReport) -> None:
    assert printed(run).split()[0] == "VALID"


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("failures", [[], [WRONG]])
@pytest.mark.parametrize("reasons", [[], [LATE]])
def test_every_reason_and_failure_is_said(reasons: list[str], failures: list[str], interrupted: bool) -> None:
    verdict = Verdict(
        valid=not reasons,
        invalid_because=reasons,
        interrupted=interrupted,
        failures=failures,
        remarks=["retries could not be counted"],
    )
    text = unwrapped(printed(example_run(verdict=verdict)))

    word = text.split(" The ")[0].split(" Stopped ")[0]
    assert word.startswith("INVALID" if reasons else "VALID")
    assert ("INTERRUPTED" in word, "FAILED" in word) == (interrupted, bool(failures))
    for said in (*reasons, *failures, *verdict.remarks):
        assert said in text
    assert ("do not use them" in text) == bool(reasons)


def test_the_table_says_the_reports_percentiles(run: RunReport) -> None:
    assert run.latency is not None
    text = printed(run)

    for key in run.latency.percentiles_ms:
        assert re.search(rf"^ p{re.escape(key)} ", text, re.MULTILINE)
    assert f"{run.latency.count:,}" in text


def test_what_was_measured_is_said(run: RunReport) -> None:
    text = unwrapped(printed(run))
    assert run.quality is not None
    assert run.generator.pinning is not None

    for said in (
        "poisson 100/s",
        "goodput".capitalize(),
        "tokens/s",
        "characters/s",
        "First piece",
        "queue",
        "beam 4, 9-20 words",
        f"BLEU {run.quality.bleu:.1f}",
        "Golden",
        "balanced",
        "Generator lag",
        "pinned: generator on core 1, server on core 0",
        *(label for label, count in run.outcomes.items() if count),
        *(clause.text for clause in run.slo.clauses if run.slo),  # type: ignore[union-attr]
        *(process.name for process in run.generator.processes),
    ):
        assert said in text


def test_a_missed_clause_stands_out() -> None:
    assert "MISSED" in printed(example_run(slower=4.0))
    assert "MISSED" not in printed(example_run())


def test_books_that_do_not_balance_are_shown() -> None:
    books = Books(balanced=False, client={"ok": 3}, server={"ok": 2}, mismatches=["ok: we count 3, the server 2"])

    assert "ok: we count 3, the server 2" in printed(example_run(books=books))


def test_no_pinning_is_said(run: RunReport) -> None:
    generator = run.generator.model_copy(update={"pinning": None, "lag": None, "processes": []})

    text = printed(example_run(generator=generator))

    assert "not pinned" in text
    assert "closed loop" in text


def test_what_is_not_there_is_left_out(run: RunReport) -> None:
    text = printed(
        example_run(
            slo=None,
            latency=None,
            latency_from_send=None,
            latency_with_failures=None,
            first_piece=None,
            phases={},
            classes=[],
            quality=None,
            books=None,
            windows=[],
            server_samples=[],
            server=None,
            outcomes={},
            codes={},
            messages={},
            retries_seen=None,
            verdict=STOPPED,
        )
    )

    assert "None" not in text
    assert text.split()[:2] == ["VALID,", "INTERRUPTED"]


def test_messages_cannot_command_the_terminal(run: RunReport) -> None:
    text = printed(example_run(messages={"\x1b]0;title\x07[bold]x[/bold]\nnext line": 3}))

    assert not {"\x1b", "\x07"} & set(text)
    assert "[bold]x[/bold] next line" in unwrapped(text)


def test_a_search_says_its_rate_and_all_points(find_max: FindMaxReport) -> None:
    text = unwrapped(printed(find_max))

    assert f"{find_max.highest_rate_per_s:g}/s ± {find_max.step_per_s:g}/s met {find_max.slo}" in text
    for point in find_max.points:
        assert f"{point.rate_per_s:g}/s" in text
    assert text.count("missed:") == sum(not point.met for point in find_max.points)


@pytest.mark.parametrize(
    ("highest", "step", "said"), [(None, None, "no rate that was tried met"), (320.0, None, "at least 320/s met")]
)
def test_a_search_without_a_bracket_says_so(highest: float | None, step: float | None, said: str) -> None:
    report = example_find_max(highest_rate_per_s=highest, step_per_s=step, best=None)

    assert said in unwrapped(printed(report))


def test_an_interrupted_search_still_prints() -> None:
    nothing = example_find_max(
        highest_rate_per_s=None,
        step_per_s=None,
        best=None,
        points=[],
        configuration=None,
        server=None,
        verdict=STOPPED,
    )

    assert "INTERRUPTED" in printed(nothing)


def test_an_invalid_point_is_marked(find_max: FindMaxReport) -> None:
    point = Point.model_validate(find_max.points[0].model_dump() | {"valid": False})

    assert "INVALID" in printed(example_find_max(points=[point]))
