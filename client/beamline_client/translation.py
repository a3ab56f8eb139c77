"""What `beamline translate` does: reads texts, asks a server, and writes what comes back in the order of the texts."""

import io
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, TextIO

from beamline.text_lines import NotText, TextLine, read_lines
from beamline_client.bulk import Generated, Line, generate_in_order, problems_of
from beamline_client.calls import CallOptions
from beamline_client.client import Client
from beamline_client.converters import input_to_pb
from beamline_client.errors import InvalidRequest
from beamline_client.intake import Intake, search_cost
from beamline_client.progress import CLEAR_LINE, Progress
from beamline_client.rendering import on_one_line
from beamline_client.results import Input, Piece, Result, ServerInfo, TargetPrefix

PROGRAM = "beamline translate"

_LANGUAGE_FLAGS = {"source_language": "--from", "target_language": "--to"}
_ANY_SIZE = 2**31 - 1  # bytes; the server's limit is what counts, and no request is larger


class TextUnusable(Exception):
    """A text cannot be translated, or none can; the text is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to translate, where and how."""

    server: str
    timeout_s: float
    options: CallOptions
    target_prefix: TargetPrefix | None
    """What every target begins with; None lets the model begin."""
    texts: tuple[str, ...]
    """Given by themselves; without any, lines are read."""
    file: str | None
    """None is stdin."""
    output: str | None
    """None is stdout."""
    batch_size: int
    concurrency: int
    skip: bool
    """Whether a text that cannot be translated leaves an empty line; otherwise it ends everything."""
    stream: bool
    """Whether the best text is written piece by piece."""
    render: Callable[[Generated], str]
    """How a text and what became of it is written; not for a stream."""


@dataclass
class Tally:
    """Tells of the texts that are cut or cannot be translated, and counts them.

    Attributes:
        skip: Whether to go on after one that cannot.
        stream: Where to tell, usually stderr.
        clear: What to write before, to take away a progress bar.
        truncated: How many were cut.
        skipped: How many could not be translated.
    """

    skip: bool
    stream: TextIO
    clear: str = ""
    truncated: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)

    def count(self, done: Generated) -> None:
        """Takes note of a text.

        Raises:
            TextUnusable: It cannot be translated, and that is to end everything.
        """
        self.truncated += done.result is not None and done.result.source_truncated
        if done.problem is None:
            return
        problem = done.problem.replace("truncate_source", "--truncate")
        if not self.skip:
            raise TextUnusable(
                f"{done.line.name}: {problem}. What comes before it is written; mend it, or leave such texts out with "
                "--on-error skip"
            )
        self.skipped += 1
        self.stream.write(f"{self.clear}{PROGRAM}: {done.line.name} is skipped: {problem}\n")

    def tell(self) -> None:
        """Writes what was counted, if anything."""
        told = []
        if self.truncated:
            told.append(f"{self.truncated} cut to what the model reads")
        if self.skipped:
            told.append(f"{self.skipped} skipped, with an empty line for each")
        if told:
            self.stream.write(f"{PROGRAM}: {'; '.join(told)}\n")


def translate(task: Task) -> Tally:
    """Does the task; returns what became of the texts.

    Raises:
        BeamlineError: The server or the way to it failed.
        TextUnusable: A text or the target prefix cannot be used, or the server takes no texts.
        OSError: A file cannot be read or written.
    """
    with ExitStack() as stack:
        stack.enter_context(_prefix_named(task.target_prefix))
        stack.enter_context(_languages_named())
        source = stack.enter_context(_source(task))
        client = stack.enter_context(Client(task.server, timeout_s=task.timeout_s, max_send_bytes=_ANY_SIZE))
        intake = _intake(task, client)
        output = stack.enter_context(_output(task.output))
        is_live = sys.stderr.isatty() and not output.isatty()
        tally = Tally(task.skip, sys.stderr, CLEAR_LINE if is_live else "")
        stack.callback(tally.tell)
        generated = _generated(task, client, intake, source, output)
        if task.file and not task.stream and os.path.isfile(task.file):  # a pipe cannot be read twice
            generated = Progress(_count_lines(task.file), sys.stderr, live=is_live).watch(generated)
        for done in stack.enter_context(closing(generated)):
            tally.count(done)
            output.write(task.render(done))
    return tally


@contextmanager
def _source(task: Task) -> Iterator[BinaryIO]:
    if task.file is not None:
        with open(task.file, "rb") as file:
            yield file
    elif task.texts:
        yield io.BytesIO()
    elif sys.stdin is None:
        raise TextUnusable("there are no texts, and stdin is closed: give some, or name a file with --file")
    else:
        if sys.stdin.isatty():
            sys.stderr.write(f"{PROGRAM}: type a text and Enter; Ctrl-D ends\n")
        yield sys.stdin.buffer


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            yield file
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as the input, whatever the locale
    try:
        yield sys.stdout
    finally:
        sys.stdout.flush()


@contextmanager
def _prefix_named(prefix: TargetPrefix | None) -> Iterator[None]:
    """Tells a refusal of the target prefix, which all inputs of a request have, once and by the command's flags."""
    try:
        yield
    except InvalidRequest as error:
        found = [violation.description for violation in error.violations if ".target_prefix" in violation.field]
        if not found or any(violation.field.startswith("search.") for violation in error.violations):
            raise
        problem = re.sub(r"search\.(\w+)", lambda option: f"--{option[1].replace('_', '-')}", found[0])
        raise TextUnusable(f"{_prefix_flag(prefix)}: {problem}") from error


@contextmanager
def _languages_named() -> Iterator[None]:
    """Tells a refusal of the languages, which all inputs of a request have, by the command's flags."""
    try:
        yield
    except InvalidRequest as error:
        found = [(_LANGUAGE_FLAGS.get(violation.field), violation.description) for violation in error.violations]
        if not found or any(flag is None for flag, _ in found):
            raise
        raise TextUnusable("; ".join(f"{flag} {problem}" for flag, problem in found)) from error


def _check_languages(task: Task, info: ServerInfo, target: str) -> None:
    """Refuses a language that the server would take no notice of: one of before knows none, and lists none."""
    known = {"source_language": info.model.source_languages, "target_language": info.model.target_languages}
    for name, languages in known.items():
        if task.options.get(name) is not None and not languages:
            side = name.removesuffix("_language")
            raise TextUnusable(
                f"the model of the server at {target} takes no {side} language: leave {_LANGUAGE_FLAGS[name]} out"
            )


def _prefix_flag(prefix: TargetPrefix | None) -> str:
    return "--target-prefix" if isinstance(prefix, str) else "--target-prefix-ids"


def _intake(task: Task, client: Client) -> Intake:
    info, truncate, prefix = _info(client), task.options.get("truncate", False), task.target_prefix
    _check_languages(task, info, client.target)
    limits, text_cost = info.limits, search_cost(task.options.get("search"), info.default_search)
    if prefix is None:
        return Intake(limits, truncate, text_cost=text_cost)
    if not limits.max_target_tokens:
        raise TextUnusable(
            f"the server at {client.target} takes no notice of target prefixes: leave {_prefix_flag(prefix)} out, or "
            "serve the model with a newer Beamline"
        )
    beside_bytes = input_to_pb(Input("", prefix)).ByteSize()
    intake = Intake(limits, truncate, beside_bytes, text_cost)
    if not intake.longest_text:
        raise TextUnusable(
            f"{_prefix_flag(prefix)}: has {beside_bytes} bytes, which leaves no room for a text in a message of "
            f"{limits.max_message_bytes}; shorten it"
        )
    return intake


def _info(client: Client) -> ServerInfo:
    info = client.info()
    if not info.model.has_tokenizer:
        raise TextUnusable(
            f"the model of the server at {client.target} has no tokenizer and takes token ids alone: "
            "send them with beamline_client.Client, or serve a model with a tokenizer"
        )
    return info


def _generated(
    task: Task, client: Client, intake: Intake, source: BinaryIO, output: TextIO
) -> Generator[Generated, None, None]:
    """Every text with what became of it, in order; of a stream, its pieces are written by then."""
    lines = _texts(task.texts) if task.texts else map(_line, read_lines(source))
    if task.stream:
        return _streamed(task, client, intake, lines, output)

    def generate(texts: Sequence[str]) -> list[Result]:
        results = client.generate([Input(intake.cut(text), task.target_prefix) for text in texts], **task.options)
        return [intake.marked(text, result) for text, result in zip(texts, results, strict=True)]

    # Somebody who types waits for the answer to each line.
    is_typed = not task.texts and source.isatty()
    batches = intake.batches(lines, 1 if is_typed else task.batch_size)
    return generate_in_order(batches, generate, concurrency=1 if is_typed else task.concurrency)


def _streamed(
    task: Task, client: Client, intake: Intake, lines: Iterable[Line], output: TextIO
) -> Generator[Generated, None, None]:
    for line in intake.checked(lines):
        if line.is_blank or line.problem is not None:
            yield Generated(line, problem=line.problem)
            continue
        try:
            entry = Input(intake.cut(line.text), task.target_prefix)
            result = _write_pieces(client.stream(entry, **task.options), output)
        except InvalidRequest as error:
            if not (problems := problems_of(error)):
                raise
            yield Generated(line, problem=problems[0])
        else:
            yield Generated(line, intake.marked(line.text, result))


def _write_pieces(events: Iterator[Piece | Result], output: TextIO) -> Result:
    """Writes a stream as it comes, without an end of the line unless it breaks off; returns its result."""
    written = 0
    result: Result | None = None
    try:
        for event in events:
            result = event if isinstance(event, Result) else None
            # The text of the result, which comes last, is all pieces or continues them.
            text = event.text[written:] if isinstance(event, Result) else event.text
            output.write(on_one_line(text))
            output.flush()
            written += len(text)
    finally:
        if result is None and written:
            output.write("\n")
    assert result is not None  # a stream without one raises
    return result


def _texts(texts: Iterable[str]) -> Iterator[Line]:
    # Python keeps the bytes of an argument that are not UTF-8 as lone surrogates.
    contents = (text.encode(errors="surrogateescape") for text in texts)
    return (_line(TextLine(number, content), "text") for number, content in enumerate(contents, start=1))


def _line(line: TextLine, kind: str = "line") -> Line:
    name = f"{kind} {line.number}"
    try:
        return Line(name, line.text())
    except NotText as error:
        return Line(name, line.content.decode(errors="replace"), error.problem)


def _count_lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in read_lines(file))
