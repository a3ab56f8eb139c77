"""Where text is made into tokens and tokens into text: at once where it is little, else in one of few threads."""

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

THREADS = 2
_INLINE_BYTES = 4096

P = ParamSpec("P")
T = TypeVar("T")


class TextWork:
    """Runs tokenizing and detokenizing; who has least text to wait with is next.

    A kilobyte takes some hundred microseconds, less than handing it over; a megabyte would hold up every other call.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._free = THREADS
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._came = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    async def run(self, size_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of this work on about so many bytes of text.

        Raises:
            RuntimeError: a part of it that is written in Rust has panicked; what else it raises is raised.
        """

        def checked() -> T:
            try:
                return work(*args, **kwargs)
            except Exception:
                raise
            except BaseException as panic:  # which would pass by all who take exceptions
                raise RuntimeError("the tokenizer has panicked") from panic

        if size_bytes <= _INLINE_BYTES:
            return checked()
        async with self._turn(size_bytes):
            return await asyncio.get_running_loop().run_in_executor(self._threads, checked)

    @asynccontextmanager
    async def _turn(self, size_bytes: int) -> AsyncIterator[None]:
        """Within it, a thread is free for this work, or will be as soon as what is not wanted any more has ended."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(size_bytes)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, size_bytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._came += 1
        heapq.heappush(self._waiting, (size_bytes, self._came, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it came at the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
