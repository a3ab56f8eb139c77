"""A double of a target, for tests of the generator: one worker with a queue, in the generator's own process."""

import asyncio
import os
from dataclasses import dataclass

from beamline_client.load.target import Answer, Outcome, Question, Request, TargetUnusable


@dataclass(frozen=True, slots=True)
class FakeTargets:
    """Makes such targets; see `TargetFactory`. Every process has its own, so its own queue."""

    service_s: float = 0.001
    """Of every request."""
    stall_s: float = 0.0
    """Before the service of the request that comes after `stall_after` others."""
    stall_after: int = 0
    most_waiting: int = 1_000_000
    """Requests in the queue beyond which others are rejected."""
    unusable: str = ""
    """Why it cannot be prepared; empty is that it can."""
    faulty: bool = False
    """Whether every call raises, which a target must not do."""
    dies_after: int | None = None
    """Requests after which the process ends, without a word."""

    def __call__(self, questions: tuple[Question, ...]) -> "FakeTarget":
        """See `TargetFactory`."""
        del questions
        return FakeTarget(self)


class FakeTarget:
    """Answers with the source in upper case, when its turn has come; see `Target`."""

    def __init__(self, script: FakeTargets) -> None:
        self._script = script
        self._free_at = 0.0
        self._came = 0
        self._waiting = 0

    async def prepare(self) -> None:
        """See `Target`."""
        if self._script.unusable:
            raise TargetUnusable(self._script.unusable)

    async def call(self, request: Request) -> Answer:
        """See `Target`."""
        if self._came == self._script.dies_after:
            os._exit(1)
        if self._script.faulty:
            raise ZeroDivisionError("on purpose")
        now = asyncio.get_running_loop().time()
        stall_s = self._script.stall_s if self._came == self._script.stall_after else 0.0
        self._came += 1
        if self._waiting >= self._script.most_waiting:
            return Answer(Outcome.REJECTED, 8, "full")
        self._free_at = max(now, self._free_at) + stall_s + self._script.service_s
        self._waiting += 1
        try:
            return await self._answer(request, self._free_at - now)
        finally:
            self._waiting -= 1

    async def _answer(self, request: Request, takes_s: float) -> Answer:
        patience_s = request.cancel_after_s
        if patience_s is not None and patience_s < min(takes_s, request.deadline_s):
            await asyncio.sleep(patience_s)
            return Answer(Outcome.CANCELLED, 1)
        if request.deadline_s < takes_s:
            await asyncio.sleep(request.deadline_s)
            return Answer(Outcome.DEADLINE, 4, "too late")
        await asyncio.sleep(takes_s)
        text = request.question.source.upper()
        queue_s = takes_s - self._script.service_s
        return Answer(
            Outcome.OK,
            0,
            texts=(text,),
            tokens=len(text.split()),
            first_piece_s=takes_s if request.question.stream else None,
            queue_s=queue_s,
            encode_s=0.0,
            decode_s=self._script.service_s,
            steps=len(text.split()),
        )

    async def close(self) -> None:
        """See `Target`."""
