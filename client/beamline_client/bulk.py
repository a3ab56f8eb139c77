"""Many texts to one server: several requests at once, results in the order of the texts."""

import itertools
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from beamline_client.errors import FieldViolation, InvalidRequest
from beamline_client.results import Result

_INPUT_PATH = re.compile(r"inputs\[(\d+)\](?:\.\w+)*")


@dataclass(frozen=True, slots=True)
class Line:
    """One text and what to call it when it is refused, such as `line 17`."""

    name: str
    text: str

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to generate from; such a line is not sent."""
        return not self.text.strip()


Generated: TypeAlias = tuple[Line, Result | None]
"""A line and its result; None for a blank line."""

Generate: TypeAlias = Callable[[Sequence[str]], Sequence[Result]]
"""Sends one request; called in several threads at once."""


def generate_in_order(
    lines: Iterable[Line], generate: Generate, *, batch_size: int, concurrency: int
) -> Generator[Generated, None, None]:
    """Yields every line with its result, in order, as soon as it and all before it are done.

    Reads ahead only as far as it takes to keep `concurrency` requests running; with a concurrency of 1, each batch is
    yielded before the next is read. When a request fails, its error is raised in its place and nothing more is sent;
    requests that are running then go on in the background until their client is closed.

    Args:
        lines: The texts.
        generate: Sends one request.
        batch_size: Most texts in one request.
        concurrency: Most requests at once.
    """
    window = 2 * concurrency - 1  # one is awaited here while all workers are busy with others
    pool = ThreadPoolExecutor(concurrency)
    pending: deque[Future[list[Generated]]] = deque()
    try:
        for batch in _batches(lines, batch_size):
            pending.append(pool.submit(_generate_batch, batch, generate))
            if len(pending) >= window:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    remaining = iter(lines)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


def _generate_batch(batch: Sequence[Line], generate: Generate) -> list[Generated]:
    filled = [line for line in batch if not line.is_blank]
    try:
        results = iter(generate([line.text for line in filled]) if filled else ())
    except InvalidRequest as error:
        raise _with_line_names(error, filled) from error
    return [(line, None if line.is_blank else next(results)) for line in batch]


def _with_line_names(error: InvalidRequest, lines: Sequence[Line]) -> InvalidRequest:
    """The same error, with the names of the lines for `inputs[0].text` and the like."""

    def named(text: str) -> str:
        return _INPUT_PATH.sub(lambda path: _name(lines, int(path.group(1)), path.group()), text)

    return InvalidRequest(
        named(error.message),
        code=error.code,
        request_id=error.request_id,
        violations=[FieldViolation(named(v.field), named(v.description)) for v in error.violations],
    )


def _name(lines: Sequence[Line], index: int, path: str) -> str:
    return lines[index].name if index < len(lines) else path
