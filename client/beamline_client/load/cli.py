"""`beamline load`: its command line."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from beamline_client.advice import EXIT_BAD_USAGE, EXIT_SERVER_FAILED
from beamline_client.load.arguments import compare_parser, find_max_parser, load_options, run_parser
from beamline_client.load.compare import NotComparable, compare, exit_status, print_comparison
from beamline_client.load.coordinator import GeneratorFailed, Interruption
from beamline_client.load.find_max import FindMaxOptions, find_max
from beamline_client.load.live import open_view
from beamline_client.load.output import HTML_NAME, RequestLog, write_report
from beamline_client.load.pinning import PinningUnusable
from beamline_client.load.quality import AnswerBook, GoldenUnusable
from beamline_client.load.report import FindMaxReport, ReportUnreadable, RunReport, json_schema, read_report
from beamline_client.load.session import Session
from beamline_client.load.setup import SetupUnusable, check_run, check_setup
from beamline_client.load.summary import print_find_max, print_run
from beamline_client.load.target import TargetUnusable

EXIT_INVALID = 3
_EXIT_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Runs `beamline load` with these arguments; returns the exit status, see --help."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "find-max": _find_max,
        "compare": _compare,
        "schema": _schema,
    }
    try:
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        if argv and not argv[0].startswith("-"):
            told = f"unknown command {argv[0]!r}; there are: {', '.join(commands)}; a run has options alone, see --help"
            return _complain([told], EXIT_BAD_USAGE)
        return _run(argv)
    except SetupUnusable as error:
        return _complain(error.problems, EXIT_BAD_USAGE)
    except (TargetUnusable, PinningUnusable, ReportUnreadable, NotComparable, GoldenUnusable) as error:
        return _complain([str(error)], EXIT_BAD_USAGE)
    except GeneratorFailed as error:
        return _complain([str(error)], EXIT_SERVER_FAILED)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _complain([f"{error.filename or 'output'}: {error.strerror}"], EXIT_BAD_USAGE)


def _run(argv: Sequence[str]) -> int:
    arguments = run_parser().parse_args(argv)
    options = load_options(arguments, rate=arguments.rate)
    setup, load = check_run(options)
    interruption = Interruption()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RequestLog(arguments.request_log)) if arguments.request_log else None
        stack.enter_context(interruption.watched())
        view = stack.enter_context(open_view(sys.stderr, quiet=arguments.quiet))
        session = Session(setup, view, interruption, None if log is None else log.write)
        report, book = session.run(load)
    print_run(report, Console())
    problems = [*_write(report, arguments.output, book, arguments.record_golden), *([log.problem] if log else [])]
    return _complain([*filter(None, problems)], EXIT_SERVER_FAILED) if any(problems) else _status(report)


def _find_max(argv: Sequence[str]) -> int:
    arguments = find_max_parser().parse_args(argv)
    setup = check_setup(load_options(arguments, rate="10"))
    assert setup.objective is not None
    options = FindMaxOptions(
        start_per_s=arguments.start,
        precision=arguments.precision,
        window_s=arguments.window,
        max_windows=arguments.max_windows,
        stability=arguments.stability,
    )
    interruption = Interruption()
    with interruption.watched(), open_view(sys.stderr, quiet=arguments.quiet) as view:
        report = find_max(Session(setup, view, interruption), setup.objective, options)
    print_find_max(report, Console())
    problems = list(_write(report, arguments.output))
    return _complain(problems, EXIT_SERVER_FAILED) if problems else _status(report)


def _compare(argv: Sequence[str]) -> int:
    arguments = compare_parser().parse_args(argv)
    before, after = read_report(arguments.before), read_report(arguments.after)
    comparison = compare(before, after, tolerance=arguments.tolerance, allow_invalid=arguments.allow_invalid)
    print_comparison(comparison, Console())
    return exit_status(comparison)


def _schema(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="beamline load schema", description="Prints the JSON schema of reports.").parse_args(
        argv
    )
    sys.stdout.write(json.dumps(json_schema(), indent=1) + "\n")
    return 0


def _status(report: RunReport | FindMaxReport) -> int:
    if report.verdict.interrupted:
        return _EXIT_INTERRUPTED
    if _answers_were_wrong(report):  # whoever made the figures, the answers are the server's
        return EXIT_SERVER_FAILED
    if not report.verdict.valid:
        return EXIT_INVALID
    return EXIT_SERVER_FAILED if report.verdict.failures else 0


def _answers_were_wrong(report: RunReport | FindMaxReport) -> bool:
    run = report if isinstance(report, RunReport) else report.best
    if run is None or run.quality is None:
        return False
    golden = run.quality.golden
    return run.quality.inconsistent > 0 or (golden is not None and golden.different + golden.missing > 0)


def _write(
    report: RunReport | FindMaxReport, folder: Path | None, book: AnswerBook | None = None, golden: Path | None = None
) -> Iterator[str]:
    """Writes what was asked for, after the summary is on the screen; yields what could not be written."""
    if folder is not None:
        try:
            write_report(report, folder)
            sys.stdout.write(f"\nreport: {folder / HTML_NAME}\n")
        except OSError as error:
            yield f"the report cannot be written: {error.filename or folder}: {error.strerror}"
    if book is not None and golden is not None:
        try:
            book.write_golden(golden)
        except GoldenUnusable as error:
            yield str(error)


def _complain(lines: Sequence[str], status: int) -> int:
    sys.stdout.flush()
    sys.stderr.writelines(f"beamline load: {line}\n" for line in lines)
    return status
