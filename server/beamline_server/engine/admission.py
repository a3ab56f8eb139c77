"""What a request costs at its worst, and whether there is room. Pure arithmetic.

A request with K beams holds K rows. In its cache it holds one seat, of as many slots as its lane gives to every seat;
a sentence is never in a lane wider than the first one that holds its worst case, so

    cost in slots = the least lane width >= max(K * max_new_tokens, source tokens, SHARED_WIDTH)

bounds what it occupies at any moment, padding included, and the sum over the running sentences bounds the caches.
"""

from dataclasses import dataclass

from beamline_server.engine.errors import RequestTooLarge
from beamline_server.engine.request import GenerationRequest

MAX_BEAMS = 16
"""The widest search: what the engine's arrays have room for."""
DEFAULT_ROWS = 128
"""Live hypotheses of a worker, unless the operator says otherwise."""
DEFAULT_QUEUE_ROWS = 1024
"""Rows that may wait, all workers together, unless the operator says otherwise."""

SHARED_WIDTH = 64
"""Slots and source positions of the widest lane that all sentences may be kept in, however few they need."""

LANE_WIDTHS = (16, 32, *(SHARED_WIDTH * 4**i for i in range(16)))
"""Slots and source positions up to which a sentence stays in a lane; see scheduler.py. The last one holds whatever can
be asked for, the widest search of 2^32 tokens; lanes that nobody needs do not exist."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one worker can hold at a time."""

    rows: int
    slots: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request holds at its worst."""

    rows: int
    slots: int


def lane_of(width: int) -> int:
    """Number of the narrowest lane that holds seats of `width` slots."""
    for lane, bound in enumerate(LANE_WIDTHS):
        if width <= bound:
            return lane
    raise ValueError(f"no lane is {width} slots wide")


def cost(request: GenerationRequest) -> Cost:
    """The request's worst case."""
    options = request.options
    # One token of a beam is one slot; a live branch never holds more than its own length.
    slots = max(options.beam_size * options.max_new_tokens, len(request.source), SHARED_WIDTH)
    return Cost(options.beam_size, LANE_WIDTHS[lane_of(slots)])


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
