"""`beamline translate`: texts to a server, what comes back to a file or the terminal."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import TextIO

from beamline_client.address import AddressUnusable, endpoints
from beamline_client.advice import EXIT_BAD_USAGE, advice, exit_status
from beamline_client.bulk import Generated, Line, generate_in_order
from beamline_client.calls import DEFAULT_TIMEOUT_S, CallOptions
from beamline_client.client import Client
from beamline_client.errors import BeamlineError
from beamline_client.progress import Progress
from beamline_client.rendering import as_json, on_one_line, plain, scored
from beamline_client.results import EarlyStopping, Result, SearchOptions

DEFAULT_SERVER = "localhost:8001"


def main(argv: Sequence[str]) -> int:
    """Runs `beamline translate` with these arguments.

    Returns:
        0; 1 if the server or the way to it failed; 2 if the arguments, a file or a text are not usable.
    """
    arguments = _parser().parse_args(argv)
    problem = _contradiction(arguments)
    if problem is not None:
        return _complain(problem, EXIT_BAD_USAGE)
    try:
        _translate(arguments)
    except BeamlineError as error:
        line = advice(error, target=arguments.server, timeout_s=arguments.timeout)
        return _complain(line, exit_status(error))
    except UnicodeDecodeError as error:
        return _complain(f"the input is not UTF-8 text ({error.reason}): convert it first", EXIT_BAD_USAGE)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _complain(f"{error.filename or 'input or output'}: {error.strerror}", EXIT_BAD_USAGE)
    return 0


def _translate(arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        source = stack.enter_context(open(arguments.file, encoding="utf-8")) if arguments.file else sys.stdin
        output = stack.enter_context(open(arguments.output, "w", encoding="utf-8")) if arguments.output else sys.stdout
        client = stack.enter_context(Client(arguments.server, timeout_s=arguments.timeout))
        lines = _texts(arguments.text) if arguments.text else _lines(source)
        if arguments.stream:
            _write_pieces(client, lines, output, _call_options(arguments))
            return
        generated = _generate(client, lines, arguments, interactive=not arguments.text and source.isatty())
        if arguments.file and os.path.isfile(arguments.file):  # a pipe cannot be read twice
            live = sys.stderr.isatty() and not output.isatty()
            generated = Progress(_count_lines(arguments.file), sys.stderr, live=live).watch(generated)
        stack.enter_context(closing(generated))
        _write(generated, _rendering(arguments), output)


def _generate(
    client: Client, lines: Iterable[Line], arguments: argparse.Namespace, *, interactive: bool
) -> Generator[Generated, None, None]:
    options = _call_options(arguments)
    return generate_in_order(
        lines,
        lambda texts: client.generate(texts, **options),
        # Somebody who types waits for the answer to each line.
        batch_size=1 if interactive else arguments.batch_size,
        concurrency=1 if interactive else arguments.concurrency,
    )


def _write(generated: Iterable[Generated], render: Callable[[Line, Result | None], str], output: TextIO) -> None:
    for line, result in generated:
        output.write(render(line, result))
        if output.isatty():
            output.flush()


def _write_pieces(client: Client, lines: Iterable[Line], output: TextIO, options: CallOptions) -> None:
    for line in lines:
        try:
            written = 0
            for event in client.stream(line.text, **options) if not line.is_blank else ():
                # The text of the result, which comes last, is all pieces or continues them.
                text = event.text[written:] if isinstance(event, Result) else event.text
                output.write(on_one_line(text))
                output.flush()
                written += len(text)
        finally:
            output.write("\n")


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
        search=search, token_ids=arguments.json, token_logprobs=arguments.json, truncate=arguments.truncate
    )


def _rendering(arguments: argparse.Namespace) -> Callable[[Line, Result | None], str]:
    if arguments.json:
        return as_json
    return scored if arguments.scores or (arguments.n_best or 1) > 1 else plain


def _texts(texts: Iterable[str]) -> Iterator[Line]:
    return (Line(f"text {number}", text) for number, text in enumerate(texts, start=1))


def _lines(source: Iterable[str]) -> Iterator[Line]:
    return (Line(f"line {number}", text.rstrip("\r\n")) for number, text in enumerate(source, start=1))


def _count_lines(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        return sum(1 for _ in file)


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
    return None


def _is_same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _complain(line: str, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"beamline translate: {line}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beamline translate",
        description="Sends texts to a Beamline server and prints what comes back, in the order of the texts.",
        epilog="Search options that are left out take the served model's defaults.",
    )
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts; without any, the lines of --file or of stdin")
    parser.add_argument("--file", metavar="FILE", help="read UTF-8 text from FILE, one text per line")
    parser.add_argument("-o", "--output", metavar="OUT", help="write to OUT instead of stdout")
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--timeout", type=_positive(float), default=DEFAULT_TIMEOUT_S, metavar="S", help="seconds per request"
    )
    parser.add_argument("--batch-size", type=_positive(int), default=32, metavar="N", help="texts per request")
    parser.add_argument("--concurrency", type=_positive(int), default=4, metavar="N", help="requests at once")
    parser.add_argument("--truncate", action="store_true", help="cut a text that is too long instead of refusing it")

    search = parser.add_argument_group("search")
    search.add_argument("--beam", type=_positive(int), metavar="N", help="number of beams; 1 is greedy search")
    search.add_argument("--n-best", type=_positive(int), metavar="N", help="hypotheses per text, with their scores")
    search.add_argument("--length-penalty", type=float, metavar="X", help="above 0 favours longer hypotheses")
    search.add_argument("--early-stopping", choices=[stopping.value for stopping in EarlyStopping])
    search.add_argument("--min-new-tokens", type=int, metavar="N")
    search.add_argument("--max-new-tokens", type=_positive(int), metavar="N")

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
