"""A replica that freezes, and keeps its connections: its calls go to the other one, and it is left until it is back."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from beamline_client import AsyncClient, Client, Piece, Result
from beamline_server.process import ServerProcess

Serve = Callable[..., ServerProcess]
Face = Callable[[str, float], Awaitable[object]]
"""Sends a text, with so many seconds until its deadline."""

NOTICED_WITHIN_S = 3.0
"""As docs/api.md has it."""
IN_FLIGHT = 24
"""Calls of each face when it happens; few retries would not do for all who are with the frozen replica."""
ANSWERED = 'beamline_requests_total{outcome="ok"}'


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """One for each call of `Client` that is in flight."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        yield pool


def freeze(server: ServerProcess) -> None:
    server.send(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)


async def answered(server: ServerProcess) -> float:
    return (await asyncio.to_thread(server.samples))[ANSWERED]


async def call_until_all_answer(face: Face, *servers: ServerProcess) -> None:
    """Call until each of these has answered."""
    before = [await answered(server) for server in servers]
    async with asyncio.timeout(30):
        while any([await answered(server) <= count for server, count in zip(servers, before, strict=True)]):
            await face("Bonjour.", 10)


async def test_a_frozen_replica_takes_no_call_with_it(
    serve: Serve, sentences: Sequence[str], threads: ThreadPoolExecutor
) -> None:
    """It takes as long as it takes to notice."""
    freezing, staying = serve("--workers", "1"), serve("--workers", "1")
    target = f"ipv4:{freezing.target},{staying.target}"
    texts = itertools.cycle(sentences)

    with Client(target) as client:
        async with AsyncClient(target) as async_client:

            async def waited_for(text: str, timeout_s: float) -> Result:
                call = partial(client.generate_one, text, timeout_s=timeout_s)
                return await asyncio.get_running_loop().run_in_executor(threads, call)

            async def awaited(text: str, timeout_s: float) -> Result:
                return await async_client.generate_one(text, timeout_s=timeout_s)

            async def streamed(text: str, timeout_s: float) -> list[Piece | Result]:
                return [event async for event in async_client.stream(text, timeout_s=timeout_s)]

            faces: list[Face] = [waited_for, awaited, streamed]

            async def call_all(timeout_s: float) -> None:
                await asyncio.gather(*(face(next(texts), timeout_s) for _ in range(IN_FLIGHT) for face in faces))

            for face in faces:
                await call_until_all_answer(face, freezing, staying)
            freeze(freezing)

            began = time.monotonic()
            await call_all(timeout_s=NOTICED_WITHIN_S * 3)
            print(f"calls that it held were answered within {time.monotonic() - began:.1f} s")
            await call_all(timeout_s=NOTICED_WITHIN_S * 2 / 3)  # who went there now would not be back in time

            freezing.send(signal.SIGCONT)
            for face in faces:
                await call_until_all_answer(face, freezing, staying)
