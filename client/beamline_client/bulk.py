"""Many texts to one server: several requests at once, results in the order of the texts."""

import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from beamline_client.errors import InvalidRequest
from beamline_client.results import Result

_SOURCE_PATH = re.compile(r"inputs?(?:\[(\d+)\])?(?:\.(?!target_prefix\b)\w+)*")


@dataclass(frozen=True, slots=True)
class Line:
    """One text, and what to call it when it is told of, such as `line 17`."""

    name: str
    text: str
    problem: str | None = None
    """Why it cannot be sent, in words; None if it can."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to generate from; such a line is not sent."""
        return not self.text.strip()


@dataclass(frozen=True, slots=True)
class Generated:
    """What became of a line: a result, a problem, or neither for a blank line."""

    line: Line
    result: Result | None = None
    problem: str | None = None
    """Why there is no result, in words; None if there is one or need be none."""


Generate: TypeAlias = Callable[[Sequence[str]], Sequence[Result]]
"""Sends one request; called in several threads at once."""


def generate_in_order(
    batches: Iterable[Sequence[Line]], generate: Generate, *, concurrency: int
) -> Generator[Generated, None, None]:
    """Yields every line with what became of it, in order, as soon as it and all before it are done.

    Reads ahead only as far as it takes to keep `concurrency` requests running; with a concurrency of 1, each batch is
    yielded before the next is read. A line that the server refuses has its problem, and the others of its request are
    sent once more without it. When a request fails otherwise, its error is raised in its place and nothing more is
    sent; requests that are running then go on in the background until their client is closed.

    Args:
        batches: The lines, in requests.
        generate: Sends one request.
        concurrency: Most requests at once.
    """
    window = 2 * concurrency - 1  # one is awaited here while all workers are busy with others
    pool = ThreadPoolExecutor(concurrency)
    pending: deque[Future[list[Generated]]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_generate_batch, batch, generate))
            if len(pending) >= window:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def batched(
    lines: Iterable[Line], *, lines_at_once: int, bytes_at_once: int, bytes_around: int = 0
) -> Iterator[list[Line]]:
    """Puts lines into batches of so many lines and bytes at most; a line that is larger has one of its own.

    Counted are the bytes of the texts and `bytes_around` each. A batch that is full of lines comes without a look at
    the next line.
    """
    batch: list[Line] = []
    size = 0
    for line in lines:
        more = len(line.text.encode(errors="replace")) + bytes_around
        if batch and size + more > bytes_at_once:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += more
        if len(batch) == lines_at_once:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def problems_of(error: InvalidRequest) -> Mapping[int, str]:
    """What the refusal of a request says about each of its sources, by their places.

    Empty if it is not about sources alone: then no line can be left out to mend it.
    """
    found: dict[int, str] = {}
    for violation in error.violations:
        path = _SOURCE_PATH.fullmatch(violation.field)
        # Without a field it says how many more there are.
        if (path is None and violation.field) or violation.field == "inputs":
            return {}
        if path is not None:
            found.setdefault(int(path[1] or 0), violation.description)
    return found


def _generate_batch(batch: Sequence[Line], generate: Generate) -> list[Generated]:
    done = {place: Generated(line, problem=line.problem) for place, line in enumerate(batch)}
    waiting = [place for place, line in enumerate(batch) if not line.is_blank and line.problem is None]
    while waiting:
        try:
            results = generate([batch[place].text for place in waiting])
        except InvalidRequest as error:
            problems = {waiting[index]: text for index, text in problems_of(error).items() if index < len(waiting)}
            if not problems:
                raise
            done |= {place: Generated(batch[place], problem=text) for place, text in problems.items()}
            waiting = [place for place in waiting if place not in problems]
        else:
            done |= {place: Generated(batch[place], result) for place, result in zip(waiting, results, strict=True)}
            break
    return list(done.values())
