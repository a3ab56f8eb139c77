"""`beamline translate`: its command line."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence

from beamline_client.address import DEFAULT_SERVER, AddressUnusable, endpoints
from beamline_client.advice import EXIT_BAD_USAGE, advice, exit_status
from beamline_client.bulk import Generated
from beamline_client.calls import DEFAULT_TIMEOUT_S, CallOptions
from beamline_client.errors import BeamlineError
from beamline_client.rendering import as_json, plain, scored, streamed
from beamline_client.results import EarlyStopping, Priority, SearchOptions
from beamline_client.translation import PROGRAM, Task, TextUnusable, translate

EXIT_SKIPPED = 3

_EPILOG = """\
Text is UTF-8, in and out, whatever the locale. A line ends with LF or CRLF and with nothing else. One text is one line
of output (with --scores and --n-best a block): line breaks in what comes back are written as spaces, and a text that is
empty or white space is not sent and leaves an empty line. Search options that are left out take the served model's
defaults.

exit status: 0; 1 if the server or the way to it failed; 2 if the arguments, a file or a text cannot be used; 3 if texts
were skipped (--on-error skip); 130 after Ctrl-C."""


def main(argv: Sequence[str]) -> int:
    """Runs `beamline translate` with these arguments; returns the exit status, see --help."""
    arguments = _parser().parse_args(argv)
    problem = _contradiction(arguments)
    if problem is not None:
        return _complain(problem, EXIT_BAD_USAGE)
    try:
        tally = translate(_task(arguments))
    except BeamlineError as error:
        return _complain(_advice(error, arguments), exit_status(error))
    except TextUnusable as error:
        return _complain(str(error), EXIT_BAD_USAGE)
    except BrokenPipeError:
        raise
    except OSError as error:
        place = error.filename or arguments.output or "stdin or stdout"
        return _complain(f"{place}: {error.strerror}", EXIT_BAD_USAGE)
    return EXIT_SKIPPED if tally.skipped else 0


def _advice(error: BeamlineError, arguments: argparse.Namespace) -> str:
    return advice(
        error,
        target=arguments.server,
        timeout_s=arguments.timeout,
        more_time="raise --timeout",
        less_work="lower --concurrency and --batch-size",
    )


def _task(arguments: argparse.Namespace) -> Task:
    return Task(
        server=arguments.server,
        timeout_s=arguments.timeout,
        options=_call_options(arguments),
        target_prefix=arguments.target_prefix,
        texts=tuple(arguments.text),
        file=arguments.file,
        output=arguments.output,
        batch_size=arguments.batch_size,
        concurrency=arguments.concurrency,
        skip=arguments.on_error == "skip",
        stream=arguments.stream,
        render=_rendering(arguments),
    )


def _call_options(arguments: argparse.Namespace) -> CallOptions:
    search = SearchOptions(
        beam_size=arguments.beam,
        n_best=arguments.n_best,
        length_penalty=arguments.length_penalty,
        early_stopping=EarlyStopping(arguments.early_stopping) if arguments.early_stopping else None,
        min_new_tokens=arguments.min_new_tokens,
        max_new_tokens=arguments.max_new_tokens,
    )
    return CallOptions(
        search=search,
        token_ids=arguments.json,
        token_logprobs=arguments.json,
        truncate=arguments.truncate,
        priority=Priority(arguments.priority),
        source_language=arguments.source_language,
        target_language=arguments.target_language,
    )


def _rendering(arguments: argparse.Namespace) -> Callable[[Generated], str]:
    if arguments.stream:
        return streamed
    if arguments.json:
        return as_json
    return scored if arguments.scores or (arguments.n_best or 1) > 1 else plain


def _contradiction(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments as a whole, if anything."""
    try:
        endpoints(arguments.server)
    except AddressUnusable as error:
        return f"--server: {error}"
    if arguments.text and arguments.file:
        return "give texts or --file, not both"
    if arguments.stream and (arguments.json or arguments.scores or (arguments.n_best or 1) > 1):
        return "--stream prints the best text only: leave out --json, --scores and --n-best"
    if arguments.file and arguments.output and _is_same_file(arguments.file, arguments.output):
        return f"{arguments.output} is the input: write to another file"
    if arguments.output and os.path.isdir(arguments.output):
        return f"{arguments.output} is a folder: name a file"
    folder = os.path.dirname(arguments.output or "")
    if folder and not os.path.isdir(folder):
        return f"{arguments.output}: there is no folder {folder}: create it, or write elsewhere"
    return None


def _is_same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _complain(line: str, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"{PROGRAM}: {line}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Sends texts to a Beamline server and prints what comes back, in the order of the texts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts; without any, the lines of --file or of stdin")
    parser.add_argument("--file", metavar="FILE", help="read UTF-8 text from FILE, one text per line")
    parser.add_argument("-o", "--output", metavar="OUT", help="write to OUT instead of stdout")
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--timeout",
        type=_positive(float),
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds per request (default: %(default)g)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive(int),
        default=32,
        metavar="N",
        help="most texts per request (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency", type=_positive(int), default=4, metavar="N", help="requests at once (default: %(default)s)"
    )
    parser.add_argument(
        "--priority",
        choices=[priority.value for priority in Priority],
        default=Priority.NORMAL.value,
        help="batch lets all other requests go first (default: %(default)s)",
    )
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="cut a text that is longer than the server or its model takes, in bytes or in tokens",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what a text that cannot be translated (too long, no UTF-8) does: end everything once the texts before it "
        "are written, or leave an empty line (default: %(default)s)",
    )

    languages = parser.add_argument_group("languages", "of models that have several; by default the model's own")
    languages.add_argument("--from", dest="source_language", metavar="LANGUAGE", help="language of the texts")
    languages.add_argument("--to", dest="target_language", metavar="LANGUAGE", help="language to translate them to")

    search = parser.add_argument_group("search")
    search.add_argument("--beam", type=_positive(int), metavar="N", help="number of beams; 1 is greedy search")
    search.add_argument("--n-best", type=_positive(int), metavar="N", help="hypotheses per text, with their scores")
    search.add_argument("--length-penalty", type=float, metavar="X", help="above 0 favours longer hypotheses")
    search.add_argument(
        "--early-stopping",
        choices=[stopping.value for stopping in EarlyStopping],
        help="when a search with several beams ends: with enough hypotheses, when no better one is likely, or possible",
    )
    search.add_argument("--min-new-tokens", type=_count, metavar="N", help="least length of a hypothesis")
    search.add_argument("--max-new-tokens", type=_positive(int), metavar="N", help="greatest length of a hypothesis")
    prefix = search.add_mutually_exclusive_group()
    prefix.add_argument(
        "--target-prefix", metavar="TEXT", help="what every target begins with; generation continues from there"
    )
    prefix.add_argument(
        "--target-prefix-ids",
        type=_token_ids,
        dest="target_prefix",
        metavar="ID,ID,…",
        help="the same as token ids, such as a language code",
    )

    shape = parser.add_argument_group("output")
    shape.add_argument("--scores", action="store_true", help="print the source, then score<TAB>text")
    shape.add_argument("--json", action="store_true", help="print one JSON object per text")
    shape.add_argument("--stream", action="store_true", help="print pieces as they arrive, one text at a time")
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {text}")
        return value

    number.__name__ = f"positive {kind.__name__}"  # argparse prints it for a text that is no number
    return number


def _token_ids(text: str) -> tuple[int, ...]:
    ids = text.split(",")
    if not all(number.isascii() and number.isdecimal() for number in ids):
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, such as 8,17, not {text!r}")
    return tuple(map(int, ids))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, not {text}")
    return int(text)
