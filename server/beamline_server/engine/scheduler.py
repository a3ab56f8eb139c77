"""Who starts, who sits where: the decisions of a step, as pure functions of what is there.

Order is first come, first served, without overtaking: a wide request at the head waits for enough rows and holds back
what came after it. Letting narrow ones pass would use a few more rows and let a stream of them starve it.

Sentences of a worker run in lanes. A lane is one attention rectangle: each of its seats has as many slots and source
positions as its neediest sentence, so attention costs what the longest in the lane needs. A sentence sits in the
narrowest lane that holds it and moves over when it grows out: one sentence of 200 tokens does not make thirty of ten
tokens pay for it.

A lane is also a run of the decoder step, and every run has its price, so few sentences are kept together in a lane of
`SHARED_WIDTH`; only from `FINE_LANES_FROM` sentences on do the narrower lanes save more than their runs cost.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from beamline_server.engine.admission import SHARED_WIDTH, cost, lane_of
from beamline_server.engine.request import GenerationRequest

SEAT_GRANULE = 8
"""Slots and source positions of a seat are a multiple of this: few distinct shapes, seldom a change of shape."""

SPARE_SLOTS = 128
"""How many slots all seats of a lane together may have too many for the sake of rare changes: a sentence's slots grow
with every token. Its source stays as it is, and source positions are not spared."""

FINE_LANES_FROM = 48
"""Sentences of a worker from which on lanes narrower than `SHARED_WIDTH` are used (docs/performance.md)."""


ENCODE_TOGETHER = 8
"""Sentences that a call of the encoder takes if so many wait: more than start at a step, usually, since every call
reads all weights (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Room:
    """What is free at a worker."""

    places: int
    rows: int
    slots: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A worker whose queue is not empty: the requests in it, and those that hold rows beside it."""

    queued: int
    oldest_at: float
    """When the head of the queue came, in seconds of the engine's clock."""
    running: int


@dataclass(frozen=True, slots=True)
class Continuous:
    """Continuous batching: at every step starts whoever there is room for."""

    def opens_at(self, waiting: Waiting) -> float:
        """Since when requests may start: since ever."""
        del waiting
        return -math.inf

    def starters(self, queue: Iterable[GenerationRequest], room: Room, *, encode_tokens: float) -> int:
        """How many requests from the head of the queue start now; see `starters`."""
        return starters(queue, room, encode_tokens=encode_tokens)

    def encoded_with(
        self, starting: Sequence[GenerationRequest], following: Iterable[GenerationRequest], *, encode_tokens: float
    ) -> list[GenerationRequest]:
        """Who is encoded ahead of its start, together with those who start; see `encoded_with`."""
        return encoded_with(starting, following, encode_tokens=encode_tokens)


@dataclass(frozen=True, slots=True)
class RequestLevel:
    """Request-level (dynamic) batching, kept for comparison: requests start together, and nobody joins them.

    Attributes:
        max_batch: An empty worker waits until so many requests are queued,
        max_delay_s: or until the first of them has waited for so long.
    """

    max_batch: int
    max_delay_s: float

    def opens_at(self, waiting: Waiting) -> float:
        """When requests start if no more of them come, in seconds of the engine's clock; inf while some run."""
        if waiting.running:
            return math.inf
        return -math.inf if waiting.queued >= self.max_batch else waiting.oldest_at + self.max_delay_s

    def starters(self, queue: Iterable[GenerationRequest], room: Room, *, encode_tokens: float) -> int:
        """How many requests from the head of the queue start together: the batch, as far as there is room for it.

        All of them are encoded at once, for nobody runs whom that could hold up.
        """
        del encode_tokens
        return starters(islice(queue, self.max_batch), room, encode_tokens=math.inf)

    def encoded_with(
        self, starting: Sequence[GenerationRequest], following: Iterable[GenerationRequest], *, encode_tokens: float
    ) -> list[GenerationRequest]:
        """Nobody: a batch is encoded when it starts."""
        del starting, following, encode_tokens
        return []


Admission = Continuous | RequestLevel
"""When requests may start, and which."""


def starters(queue: Iterable[GenerationRequest], room: Room, *, encode_tokens: float) -> int:
    """How many requests from the head of the queue start now.

    Bounded by the room for their worst cases, and by `encode_tokens` source tokens, padding included (but at least one
    request), so that encoding newcomers neither stalls the running nor needs much memory.
    """
    places, rows, slots, longest, count = room.places, room.rows, room.slots, 0, 0
    for request in queue:
        needed = cost(request)
        places, rows, slots = places - 1, rows - needed.rows, slots - needed.slots
        longest = max(longest, len(request.source))
        if min(places, rows, slots) < 0 or (count and (count + 1) * longest > encode_tokens):
            break
        count += 1
    return count


def encoded_with(
    starting: Sequence[GenerationRequest], following: Iterable[GenerationRequest], *, encode_tokens: float
) -> list[GenerationRequest]:
    """Who is encoded ahead of its start, together with those who start.

    Args:
        starting: Who starts and has to be encoded now, at least one.
        following: Who waits behind them and has not been encoded, in order.
        encode_tokens: Source tokens of a call at most, padding included.

    Returns:
        As many of the following as make `ENCODE_TOGETHER` and leave less than half of the rectangle to padding.
    """
    lengths = [len(request.source) for request in starting]
    result: list[GenerationRequest] = []
    for request in islice(following, max(0, ENCODE_TOGETHER - len(starting))):
        lengths.append(len(request.source))
        padded = len(lengths) * max(lengths)
        if padded > min(encode_tokens, 2 * sum(lengths)):
            break
        result.append(request)
    return result


def seats(old: Sequence[int], staying: Iterable[int], arriving: Sequence[int]) -> list[int]:
    """Seat sentences without gaps, moving as few as possible.

    Args:
        old: Who sat where.
        staying: Those of them who stay.
        arriving: Who comes.

    Returns:
        Who sits where: who stays keeps the seat, who comes takes a free one, and only if seats are still empty do
        those from the end move into them.
    """
    kept = set(staying)
    result: list[int | None] = [who if who in kept else None for who in old]
    waiting = list(reversed(arriving))
    for seat, who in enumerate(result):
        if who is None and waiting:
            result[seat] = waiting.pop()
    result.extend(reversed(waiting))
    for seat in range(len(result)):
        while result and result[-1] is None:
            result.pop()
        if seat < len(result) and result[seat] is None:
            result[seat] = result.pop()
    return [who for who in result if who is not None]


def narrowest_lane(sentences: int, device: str) -> int:
    """Number of the narrowest lane in use while so many sentences run.

    On a GPU a run costs its launches, and padding next to nothing.
    """
    return 0 if sentences >= FINE_LANES_FROM and device == "cpu" else lane_of(SHARED_WIDTH)


def slot_granule(seats: int) -> int:
    """How many slots the seats of a lane grow by: few seats grow far, since what they have too much costs little.

    Divides the width of every lane that so few seats can have, so that no seat is wider than its lane.
    """
    granule = SEAT_GRANULE
    while 2 * granule <= min(SPARE_SLOTS // seats, SHARED_WIDTH):
        granule *= 2
    return granule


def seat_width(needed: int, present: int, granule: int = SEAT_GRANULE) -> int:
    """Slots (or source positions) of a lane's seats.

    Grows by granules, and shrinks only when a quarter is idle: every change copies the lane.

    Args:
        needed: What the neediest sentence needs.
        present: What every seat has now.
        granule: What it is a multiple of.
    """
    wanted = round_up(needed, granule)
    return present if wanted <= present and 3 * present < 4 * wanted else wanted


def round_up(needed: int, granule: int = SEAT_GRANULE) -> int:
    """The least positive multiple of a granule that is as wide as needed."""
    return -(-max(needed, 1) // granule) * granule


def least_loaded(loads: Sequence[int]) -> int:
    """The worker with the fewest rows, the first of equals."""
    return min(range(len(loads)), key=loads.__getitem__)
