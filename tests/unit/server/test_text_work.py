"""Long texts are worked on by few threads, the shortest first, and hold nobody up."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from beamline_server.rpc.text_work import THREADS, TextWork

LONG = 10_000


@pytest.fixture
def text() -> Iterator[TextWork]:
    with TextWork() as work:
        yield work


async def until(condition: threading.Event) -> None:
    await asyncio.get_running_loop().run_in_executor(None, condition.wait, 20)


class Busy:
    """Work that takes as long as it is wanted, on all threads."""

    def __init__(self, text: TextWork) -> None:
        self._go_on = threading.Event()
        self._began = [threading.Event() for _ in range(THREADS)]
        self.tasks = [asyncio.create_task(text.run(LONG, self._work, began)) for began in self._began]

    def _work(self, began: threading.Event) -> None:
        began.set()
        self._go_on.wait(20)

    async def began(self) -> None:
        for event in self._began:
            await until(event)

    async def end(self) -> None:
        self._go_on.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_little_text_is_worked_on_at_once_and_much_in_a_thread(text: TextWork) -> None:
    assert await text.run(100, threading.get_ident) == threading.get_ident()
    assert await text.run(LONG, threading.get_ident) != threading.get_ident()


async def test_the_least_text_is_next(text: TextWork) -> None:
    busy, order = Busy(text), list[int]()
    await busy.began()
    waiting = [asyncio.create_task(text.run(size, order.append, size)) for size in (90_000, 50_000, 70_000, 50_001)]
    await asyncio.sleep(0)
    assert await text.run(100, lambda: "short") == "short"
    await busy.end()
    await asyncio.gather(*waiting)
    # As many as there are threads go together.
    assert [sorted(order[:2]), sorted(order[2:])] == [[50_000, 50_001], [70_000, 90_000]]


async def test_who_gives_up_passes_its_turn_on(text: TextWork) -> None:
    busy, order = Busy(text), list[int]()
    await busy.began()
    waiting = [asyncio.create_task(text.run(size, order.append, size)) for size in (20_000, 30_000, 40_000, 50_000)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await busy.end()
    waiting[1].cancel()
    await asyncio.gather(*waiting[2:])
    for task in waiting[:2]:
        with suppress(asyncio.CancelledError):
            await task
    assert {40_000, 50_000} <= set(order)
    assert 20_000 not in order
    again = Busy(text)
    await again.began()
    await again.end()


async def test_what_is_raised_is_raised_and_takes_no_thread_with_it(text: TextWork) -> None:
    def fail() -> None:
        raise ValueError("no text")

    for _ in range(2 * THREADS):
        with pytest.raises(ValueError, match="no text"):
            await text.run(LONG, fail)
    busy = Busy(text)
    await busy.began()
    await busy.end()


@pytest.mark.parametrize("size", [100, LONG])
async def test_a_panic_is_an_error_as_any_other(text: TextWork, size: int) -> None:
    """What extensions in Rust raise then is no `Exception`."""

    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    with pytest.raises(RuntimeError, match="panicked") as caught:
        await text.run(size, panic)
    assert isinstance(caught.value.__cause__, PanicException)
