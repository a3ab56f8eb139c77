"""Places from which calls send their messages: few, since nobody knows how much a call will send, or when.

Most calls send theirs at once. Who has had a place for a while gives it up to those who wait for one.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from beamline_server.metrics import Clock

_MANY = 8
"""Places of one caller, of which one is given up sooner."""
_TIME_S, _LITTLE_TIME_S = 5.0, 1.0
"""For which a call keeps its place though others wait for one, in seconds; where its caller has many, or many wait."""
_LOOK_EVERY_S, _LATE_S = 0.1, 0.5
"""How often it is looked for those who have had theirs too long; if that is so late, the server was held up itself."""


@dataclass(frozen=True, slots=True)
class Sending:
    """A call that may send its message.

    Attributes:
        since: When it got its place.
        caller: Who makes it.
        path: Of its method.
        context: Of the call.
    """

    since: float
    caller: str
    path: bytes
    context: Any


class Places:
    """So many calls send at a time; others wait, first come, first served.

    Args:
        places: How many.
        put_out: Ends the call of a number, which has had its place for too long.
        clock: Monotonic seconds.
    """

    def __init__(self, places: int, put_out: Callable[[int, Sending], None], clock: Clock) -> None:
        self._places = places
        self._free = places
        self._put_out = put_out
        self._clock = clock
        self._sending: dict[int, Sending] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._looking: asyncio.TimerHandle | None = None

    def turn(self) -> asyncio.Future[None] | None:
        """What has to be waited for before a place is taken; None if there is a free one, which is taken herewith."""
        if self._free:
            self._free -= 1
            return None
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._look_later()
        return turn

    def take(self, number: int, path: bytes, caller: str, context: Any) -> None:
        """A call, by its number, takes the place that it has waited for."""
        self._sending[number] = Sending(self._clock(), caller, path, context)

    def leave(self, number: int) -> None:
        """A call needs its place no more, if it has one."""
        if self._sending.pop(number, None) is not None:
            self.give_back()

    def give_back(self) -> None:
        """A place that nobody has taken is another's."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _look_later(self) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        """Those who have had their places for too long leave them to those who wait."""
        assert self._looking is not None
        late_s = asyncio.get_running_loop().time() - self._looking.when()
        self._looking = None
        # Held up itself, the server has not looked at what callers may have sent long ago.
        while late_s < _LATE_S and self._waiting and (slow := self._too_slow()) is not None:
            sending = self._sending[slow]
            self.leave(slow)
            self._put_out(slow, sending)
        if self._waiting:
            self._look_later()

    def _too_slow(self) -> int | None:
        """The call that has to give its place up, if one has: the oldest, or the oldest of who has most places."""
        if not self._sending:
            return None
        now, crowded = self._clock(), len(self._waiting) >= self._places
        oldest, first = next(iter(self._sending.items()))
        if now - first.since >= (_LITTLE_TIME_S if crowded else _TIME_S):
            return oldest
        [(caller, places)] = Counter(sending.caller for sending in self._sending.values()).most_common(1)
        number, first = next(found for found in self._sending.items() if found[1].caller == caller)
        return number if places > _MANY and now - first.since >= _LITTLE_TIME_S else None
