"""What a request costs at its worst, whether there is room, and who starts. Pure arithmetic.

A request with K beams holds K rows, or those of the widest part of its prefix while it is fed. In its cache it holds
one batch index of as many slots as its bucket gives to each; it is never in a bucket wider than the first one that
holds its worst case, so

    cost in slots = the least bucket width >= max(prefix + K * max_new_tokens, source tokens, SHARED_WIDTH)

bounds what it occupies at any moment, padding included, and the sum over the running sequences bounds the caches.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from beamline_server.engine.errors import RequestTooLarge
from beamline_server.engine.request import MAX_BEAMS, GenerationRequest

DEFAULT_ROWS = 128
"""Live hypotheses of a worker, unless the operator says otherwise."""
DEFAULT_QUEUE_ROWS = 1024
"""Rows that may wait, all workers together, unless the operator says otherwise."""

SPARE = 8
"""A worker can hold one part in so many beyond its capacity, for callers who hold little."""

MOST_ROWS = MAX_BEAMS
"""Rows of a sequence in a step at most: its live hypotheses, or a part of its prefix."""

SHARED_WIDTH = 64
"""Slots and source positions of the narrowest bucket, which sequences share however few they need."""

WIDTHS = tuple(SHARED_WIDTH * 4**i for i in range(16))
"""Slots and source positions up to which a sequence stays in a bucket. The last one holds whatever can be asked for,
the widest search of 2^32 tokens; buckets that nobody needs do not exist."""

ENCODE_TOGETHER = 8
"""Sentences that a call of the encoder takes if so many wait: more than start at a step, usually, since every call
reads all weights (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request holds at its worst, or several."""

    rows: int
    slots: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.rows + other.rows, self.slots + other.slots)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.rows - other.rows, self.slots - other.slots)

    def __le__(self, other: "Cost") -> bool:
        return self.rows <= other.rows and self.slots <= other.slots


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one worker can hold at a time, beside a spare part for callers who hold little (`shares.py`)."""

    rows: int
    slots: int

    @property
    def spare(self) -> Cost:
        """The spare part."""
        return Cost(self.rows // SPARE, self.slots // SPARE)

    @property
    def whole(self) -> "Room":
        """All that an empty worker holds, its spare part included."""
        return Room(self.rows, self.slots).more(self.spare)


def number_of(width: int) -> int:
    """Number of the narrowest bucket whose batch indices may have `width` slots."""
    for number, bound in enumerate(WIDTHS):
        if width <= bound:
            return number
    raise ValueError(f"no bucket is {width} slots wide")


def cost(request: GenerationRequest) -> Cost:
    """The request's worst case."""
    options, prefix = request.options, len(request.target_prefix)
    # One token of a beam is one slot; a live branch never holds more than its own length and the prefix.
    slots = max(prefix + options.beam_size * options.max_new_tokens, len(request.source), SHARED_WIDTH)
    return Cost(max(options.beam_size, min(1 + prefix, MOST_ROWS)), WIDTHS[number_of(slots)])


def check_fits(request: GenerationRequest, capacity: Capacity) -> None:
    """Refuse what could never run.

    Raises:
        RequestTooLarge: its worst case exceeds what an empty worker holds.
    """
    needed = cost(request)
    if needed.rows > capacity.rows:
        raise RequestTooLarge("rows", needed.rows, capacity.rows)
    if needed.slots > capacity.slots:
        raise RequestTooLarge("cache slots", needed.slots, capacity.slots)


@dataclass(frozen=True, slots=True)
class Room:
    """What is free at a worker."""

    rows: int
    slots: int

    def less(self, cost: Cost) -> "Room":
        """What is left when a request starts."""
        return Room(self.rows - cost.rows, self.slots - cost.slots)

    def fits(self, cost: Cost) -> bool:
        """Whether a request may start here."""
        return cost.rows <= self.rows and cost.slots <= self.slots

    def more(self, cost: Cost) -> "Room":
        """What is there when a request has ended."""
        return Room(self.rows + cost.rows, self.slots + cost.slots)


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

    def starters(
        self, queue: Iterable[GenerationRequest], room: Room, *, encode_tokens: float
    ) -> list[GenerationRequest]:
        """The requests from the head of the queue that start now; see `starters`."""
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

    def starters(
        self, queue: Iterable[GenerationRequest], room: Room, *, encode_tokens: float
    ) -> list[GenerationRequest]:
        """The requests from the head of the queue that start together: the batch, as far as there is room for it.

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


def starters(queue: Iterable[GenerationRequest], room: Room, *, encode_tokens: float) -> list[GenerationRequest]:
    """The requests from the head of the queue that start now.

    Bounded by the room for their worst cases, and by `encode_tokens` source tokens, padding included (but at least one
    request), so that encoding newcomers neither stalls the running nor needs much memory.
    """
    longest = 0
    starting: list[GenerationRequest] = []
    for request in queue:
        longest = max(longest, len(request.source))
        if not room.fits(cost(request)) or (starting and (len(starting) + 1) * longest > encode_tokens):
            break
        room = room.less(cost(request))
        starting.append(request)
    return starting


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
