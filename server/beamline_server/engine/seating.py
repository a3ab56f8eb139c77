"""Who sits where: the sentences of a worker in lanes, each with a seat in its lane's cache.

    enter / leave → seat: who sits where from now on, lane by lane → the step runs each lane

What is decided, and why, is in `scheduler.py`; here it is carried out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from beamline_server.engine.admission import LANE_WIDTHS, lane_of
from beamline_server.engine.batch import Layout, layout
from beamline_server.engine.beam import BoolArray, IntArray, Limits
from beamline_server.engine.kv_pool import SlotTable
from beamline_server.engine.runner import Cache, FromCache, FromEncoder, FromSeat, Origin, StepRunner
from beamline_server.engine.scheduler import narrowest_lane, seat_width, seats, slot_granule
from beamline_server.engine.searches import Searches

_WIDTHS = np.array(LANE_WIDTHS)


class Lane:
    """Sentences that share an attention rectangle.

    Attributes:
        cache: Their keys and values.
        members: The place of the sentence in each seat.
        places: The same as an array.
        beams: The widest search among them.
        source_length: Tokens of their sources.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.members: list[int] = []
        self.places: IntArray = np.zeros(0, np.int64)
        self.beams = 0
        self.source_length = self.places
        self._layout: Layout | None = None

    def take(self, members: list[int], width: IntArray, source_length: IntArray) -> None:
        """Take in who sits here from now on; `width` and `source_length` are of all places."""
        self.members = members
        self.places = np.array(members, np.int64)
        self._layout = None
        if members:
            self.beams = int(width[self.places].max())
            self.source_length = source_length[self.places]

    def layout(self, live: BoolArray) -> Layout:
        """Where the live beams stand; once all are alive it does not change from step to step."""
        if self._layout is None or not (self._layout.live == live).all():
            self._layout = layout(live)
        return self._layout


@dataclass(frozen=True, slots=True)
class Seated:
    """All sentences of a step, lane by lane and seat by seat.

    Attributes:
        lanes: The lanes that anybody sits in.
        parts: Which of the sentences are theirs.
        members: The place of each sentence.
        places: The same as an array.
        limits: What their searches ask for.
        beams: The widest search among them.
    """

    lanes: tuple[Lane, ...]
    parts: tuple[slice, ...]
    members: tuple[int, ...]
    places: IntArray
    limits: Limits
    beams: int

    def only(self, these: Sequence[int], searches: Searches) -> "Seated":
        """Some of them, as if they sat in no lane."""
        places = self.places[these]
        members = tuple(self.members[i] for i in these)
        return Seated((), (), members, places, searches.limits(places), self.beams)


def side_by_side(lanes: Iterable[Lane], searches: Searches) -> Seated:
    """The sentences of some lanes, at least one."""
    taken = tuple(lanes)
    ends = np.cumsum([len(lane.members) for lane in taken]).tolist()
    parts = tuple(slice(end - len(lane.members), end) for lane, end in zip(taken, ends, strict=True))
    members = tuple(place for lane in taken for place in lane.members)
    places = taken[0].places if len(taken) == 1 else np.concatenate([lane.places for lane in taken])
    return Seated(taken, parts, members, places, searches.limits(places), max(lane.beams for lane in taken))


class Seating:
    """The lanes of a worker.

    Args:
        runner: Makes their caches.
        slots: Says how many slots each sentence has in use.
        searches: Says how wide each search is, and its limits.
    """

    def __init__(self, runner: StepRunner, slots: SlotTable, searches: Searches) -> None:
        self._runner = runner
        self._slots = slots
        self._searches = searches
        self._source_length = np.zeros_like(searches.width)
        self._lane_of = np.zeros_like(searches.width)
        # Made once: every step names the seats of those who stay.
        self._seats = [FromSeat(seat) for seat in range(len(searches.width))]
        self._present: dict[int, None] = {}
        self._newcomers: dict[int, FromEncoder] = {}
        self._lanes: list[Lane] = []
        self._seated: Seated | None = None
        self._changed = False

    def enter(self, place: int, source_length: int, origin: FromEncoder) -> None:
        """A sentence comes."""
        self._present[place] = None
        self._newcomers[place] = origin
        self._source_length[place] = source_length
        self._lane_of[place] = lane_of(source_length)
        self._changed = True

    def leave(self, place: int) -> None:
        """A sentence goes."""
        del self._present[place]
        self._newcomers.pop(place, None)
        self._changed = True

    def renew(self) -> None:
        """Give fresh caches to the lanes of which everybody has left: theirs may hold anything after a failure."""
        for number, lane in enumerate(self._lanes):
            if not any(place in self._present for place in lane.members):
                self._lanes[number] = Lane(self._runner.new_cache())

    def clear(self) -> None:
        """Forget all lanes."""
        self._lanes = []

    def places(self) -> tuple[IntArray, int]:
        """Who is present, in any order, and the widest search among them."""
        if self._seated is not None and not self._changed:
            return self._seated.places, self._seated.beams
        places = np.fromiter(self._present, np.int64, len(self._present))
        return places, int(self._searches.width[places].max())

    def seat(self) -> Seated:
        """Give every sentence a seat that holds its slots and its source, in the narrowest lane that does."""
        seated = self._seated
        if seated is None or self._changed or any(map(self._outgrown, seated.lanes)):
            seated = self._seated = self._reseated(seated)
        return seated

    def _outgrown(self, lane: Lane) -> bool:
        """Whether a sentence has more slots in use than its seat has."""
        return int(self._slots.ends(lane.places).max()) > lane.cache.slots

    def _reseated(self, seated: Seated | None) -> Seated:
        places, _ = self.places()
        numbers = _WIDTHS.searchsorted(np.maximum(self._slots.ends(places), self._source_length[places]))
        numbers = np.maximum(
            np.maximum(numbers, self._lane_of[places]), narrowest_lane(len(places), self._runner.device)
        )
        if seated is not None and not self._changed and (numbers == self._lane_of[places]).all():
            for lane in filter(self._outgrown, seated.lanes):
                self._fit(lane, self._seats[: len(lane.members)], lane.places)
            return seated
        self._lane_of[places] = numbers
        while len(self._lanes) <= int(numbers.max()):
            self._lanes.append(Lane(self._runner.new_cache()))
        old = [lane.members for lane in self._lanes]
        # From the widest lane down: who moves up is copied before the seat is taken by another.
        for number in reversed(range(len(self._lanes))):
            self._arrange(number, places[numbers == number].tolist(), old)
        self._newcomers.clear()
        self._changed = False
        return side_by_side((lane for lane in self._lanes if lane.members), self._searches)

    def _arrange(self, number: int, staying: list[int], old: list[list[int]]) -> None:
        lane = self._lanes[number]
        here = set(old[number])
        arriving = [place for place in staying if place not in here or place in self._newcomers]
        members = seats(old[number], set(staying) - set(arriving), arriving)
        seat_of = {place: seat for seat, place in enumerate(old[number])}
        origins = [self._origin(number, place, seat_of, old) for place in members]
        stay = len(members) == len(lane.members) and origins == self._seats[: len(members)]
        lane.take(members, self._searches.width, self._source_length)
        if members:
            self._fit(lane, origins, lane.places, stay=stay)

    def _origin(self, number: int, place: int, seat_of: dict[int, int], old: list[list[int]]) -> Origin:
        newcomer = self._newcomers.get(place)
        if newcomer is not None:
            return newcomer
        if place in seat_of:
            return self._seats[seat_of[place]]
        below = next(i for i in range(number) if place in old[i])
        return FromCache(self._lanes[below].cache, old[below].index(place))

    def _fit(self, lane: Lane, origins: Sequence[Origin], places: IntArray, *, stay: bool = True) -> None:
        """Bring a lane's cache to the shape that its members need; `stay` if they sit where they sat."""
        cache = lane.cache
        slots = seat_width(int(self._slots.ends(places).max()), cache.slots, slot_granule(len(places)))
        width = seat_width(int(lane.source_length.max()), cache.source_width)
        if not stay or (slots, width) != (cache.slots, cache.source_width):
            cache.arrange(origins, slots=slots, source_width=width)
