import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from beamline_client import AsyncClient, Client
from beamline_client.testing import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


async def call_async(target: str, method: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    async with AsyncClient(target, **(client or {})) as opened:
        value = getattr(opened, method)(*args, **kwargs)
        return [event async for event in value] if method == "stream" else await value


def call_sync(target: str, method: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    with Client(target, **(client or {})) as opened:
        value = getattr(opened, method)(*args, **kwargs)
        return list(value) if method == "stream" else value


@pytest.fixture(params=["async", "sync"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method of a new client, by name, and returns its value; of a stream, the list of its events."""
    if request.param == "sync":
        return call_sync
    return lambda *args, **kwargs: asyncio.run(call_async(*args, **kwargs))
