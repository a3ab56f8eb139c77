"""The engine of one worker: receive, plan, encode, step, commit. Synchronous; one thread owns it.

    accept/cancel → step: drop who is late → start newcomers → seat everybody → decode each lane → events

`loop.py` gives it a thread; tests drive it by hand.
"""

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.admission import LANE_WIDTHS, Capacity, Cost, cost, lane_of
from beamline_server.engine.batch import Layout, encoder_batch, layout, step_batch
from beamline_server.engine.beam import DEAD, BoolArray, IntArray, Limits, SearchRules, advance, parent_of, token_of
from beamline_server.engine.beam_singly import SINGLY_UP_TO, advance_singly
from beamline_server.engine.errors import DeadlineExceeded, EngineError, RequestCancelled, StepFailed
from beamline_server.engine.kv_pool import SlotTable
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import Completed, Event, Failed, GenerationRequest, Piece, RequestId, Timing
from beamline_server.engine.runner import Cache, FromCache, FromEncoder, FromSeat, Origin, StepRunner
from beamline_server.engine.scheduler import (
    Admission,
    Continuous,
    Room,
    Waiting,
    narrowest_lane,
    round_up,
    seat_width,
    seats,
    slot_granule,
)
from beamline_server.engine.searches import Searches

LANES = np.array(LANE_WIDTHS)
MAX_BEAMS = 16
ENCODE_TOKENS = 1024
_log = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class ModelRules:
    """What the engine knows of the model."""

    search: SearchRules
    decoder_start: int
    vocabulary: int
    max_source_tokens: int
    max_target_tokens: int


@dataclass(slots=True)
class _Running:
    """A sentence that holds a place; touched when it starts, ends or streams."""

    request: GenerationRequest
    cost: Cost
    queued_at: float
    started_at: float
    encode_s: float
    origin: FromEncoder | None
    sent: int = 0


class _Lane:
    """Sentences that share an attention rectangle: who sits where, and what stays the same as long as they do."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.members: list[int] = []
        self.places: IntArray = np.zeros(0, np.int64)
        self.limits: Limits
        self.beams = 0
        self.source_length = self.places
        self._layout: Layout | None = None

    def seat(self, members: list[int], searches: Searches, source_length: IntArray) -> None:
        """Take in who sits here from now on."""
        self.members = members
        self.places = np.array(members, np.int64)
        self._layout = None
        if members:
            self.limits = searches.limits(self.places)
            self.beams = int(self.limits.width.max())
            self.source_length = source_length[self.places]

    def layout(self, live: BoolArray) -> Layout:
        """Where the live beams stand; once all are alive it does not change from step to step."""
        if self._layout is None or not (self._layout.live == live).all():
            self._layout = layout(live)
        return self._layout


class EngineCore:
    """Continuous-batched beam search on one step runner.

    Args:
        runner: Computes.
        rules: What the model fixes.
        capacity: Rows and cache slots at a time.
        clock: Monotonic seconds.
        observer: Is told what each step did.
        encode_tokens: Source tokens to encode per step at most, so that newcomers don't stall the running.
        admission: When requests may start.
    """

    def __init__(  # noqa: PLR0913 - what a core stands on; nothing of it belongs together
        self,
        runner: StepRunner,
        rules: ModelRules,
        capacity: Capacity,
        *,
        clock: Clock,
        observer: StepObserver,
        encode_tokens: int = ENCODE_TOKENS,
        admission: Admission = Continuous(),  # noqa: B008 - a frozen value
    ) -> None:
        self._runner = runner
        self._rules = rules
        self._capacity = capacity
        self._clock = clock
        self._observer = observer
        self._encode_tokens = encode_tokens
        self._admission = admission
        self._queue: deque[tuple[GenerationRequest, float]] = deque()
        self._earliest_deadline = np.inf
        places = capacity.rows
        self._free_places = list(range(places - 1, -1, -1))
        self._room = Room(places, capacity.rows, capacity.slots)
        self._running: dict[int, _Running] = {}
        self._place_of: dict[RequestId, int] = {}
        self._cancelled: set[RequestId] = set()
        self._streaming: set[int] = set()
        self._deadline = np.full(places, np.inf)
        self._source_length = np.zeros(places, np.int64)
        self._lane_of = np.zeros(places, np.int64)
        self._slot = np.zeros((places, MAX_BEAMS), np.int64)
        self._searches = Searches(places, MAX_BEAMS, rules.search.eos)
        self._slots = SlotTable(places, MAX_BEAMS)
        self._lanes: list[_Lane] = []
        # Made once: every step names the seats of those who stay.
        self._seats = [FromSeat(seat) for seat in range(places)]
        self._places: IntArray = np.zeros(0, np.int64)
        self._beams = 0
        self._changed = False
        self.queued_rows = 0
        self.last_step_at: float | None = None

    # -- what others may ask ------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._queue and not self._running

    @property
    def rests_until(self) -> float:
        """Until when a step has nothing to do unless a message comes, in seconds of the clock; -inf if it has now."""
        if self._running or not self._queue:
            return -np.inf
        return min(self._opens_at(), self._earliest_deadline)

    @property
    def queued_requests(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def running_requests(self) -> int:
        """Requests that hold rows."""
        return len(self._running)

    @property
    def running_rows(self) -> int:
        """Rows that running requests hold."""
        return self._capacity.rows - self._room.rows

    def check(self) -> None:
        """Recount what is free and what is held.

        Raises:
            AssertionError: rows, slots or places do not add up to what there is.
        """
        held = [running.cost for running in self._running.values()]
        assert self._room.rows + sum(c.rows for c in held) == self._capacity.rows, "rows are lost"
        assert self._room.slots + sum(c.slots for c in held) == self._capacity.slots, "cache slots are lost"
        assert sorted([*self._free_places, *self._running]) == list(range(self._capacity.rows)), "places are lost"
        assert self._room.places == len(self._free_places), "places are miscounted"
        assert {r.request.id for r in self._running.values()} == set(self._place_of), "requests are lost"
        assert self.queued_rows == sum(request.options.beam_size for request, _ in self._queue), (
            "the queue is miscounted"
        )
        assert self._slots.in_use() == 0 or self._running, "slots are held by nobody"

    # -- messages -----------------------------------------------------------------------------------------------------

    def accept(self, requests: Iterable[GenerationRequest]) -> None:
        """Queue requests that were admitted."""
        now = self._clock()
        for request in requests:
            # What was cancelled before it came is another request, which has ended, of the same id.
            self._cancelled.discard(request.id)
            self._queue.append((request, now))
            self.queued_rows += request.options.beam_size
            if request.deadline is not None:
                self._earliest_deadline = min(self._earliest_deadline, request.deadline)

    def cancel(self, ids: Iterable[RequestId]) -> None:
        """Drop requests at the next step; unknown ids have ended already."""
        self._cancelled.update(ids)

    def fail_all(self, make_error: Callable[[], EngineError]) -> list[Event]:
        """End everything that is queued or running with an error."""
        events: list[Event] = [Failed(request.id, make_error()) for request, _ in self._queue]
        self._queue.clear()
        self.queued_rows = 0
        for place in list(self._running):
            events.append(Failed(self._leave(place).request.id, make_error()))
        self._lanes = []
        return events

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Advance everything that runs by one token; returns what became known."""
        now = self._clock()
        events = [*self._drop_cancelled(), *self._drop_late(now), *self._start(now)]
        if not self._running:
            return events
        try:
            lanes = self._seat()
        except Exception as error:  # whatever it was, every waiter must hear of it
            return [*events, *self._fail(list(self._running), error, "seating")]
        for lane in lanes:
            try:
                events += self._decode(lane)
            except Exception as error:  # as above; other lanes go on
                events += self._fail(lane.members, error, "a decode step")
        self.last_step_at = self._clock()
        return events

    def _drop_cancelled(self) -> list[Event]:
        if not self._cancelled:
            return []
        cancelled, self._cancelled = self._cancelled, set()
        events: list[Event] = []
        for place in [self._place_of[i] for i in cancelled if i in self._place_of]:
            events.append(Failed(self._leave(place).request.id, RequestCancelled()))
            self._observer.released(0)
        return events + self._unqueue(lambda request: request.id in cancelled, RequestCancelled)

    def _drop_late(self, now: float) -> list[Event]:
        if now < self._earliest_deadline:
            return []
        events: list[Event] = []
        for place in np.flatnonzero(self._deadline <= now):
            events.append(Failed(self._leave(int(place)).request.id, DeadlineExceeded("decoding")))
            self._observer.released(0)
        events += self._unqueue(
            lambda request: request.deadline is not None and request.deadline <= now,
            lambda: DeadlineExceeded("queueing"),
        )
        waiting = [request.deadline for request, _ in self._queue if request.deadline is not None]
        self._earliest_deadline = min([*waiting, float(self._deadline.min(initial=np.inf))], default=np.inf)
        return events

    def _unqueue(self, goes: Callable[[GenerationRequest], bool], error: Callable[[], EngineError]) -> list[Event]:
        leaving = [request for request, _ in self._queue if goes(request)]
        if leaving:
            self._queue = deque(entry for entry in self._queue if not goes(entry[0]))
            self.queued_rows -= sum(request.options.beam_size for request in leaving)
        return [Failed(request.id, error()) for request in leaving]

    def _start(self, now: float) -> list[Event]:
        """Encode as many from the head of the queue as there is room for, and give them places."""
        if not self._queue or now < self._opens_at():
            return []
        queue = (request for request, _ in self._queue)
        count = self._admission.starters(queue, self._room, encode_tokens=self._encode_tokens)
        if not count:
            return []
        starting = [self._queue.popleft() for _ in range(count)]
        self.queued_rows -= sum(request.options.beam_size for request, _ in starting)
        sources = [request.source for request, _ in starting]
        width = round_up(max(map(len, sources)))
        try:
            encoded = self._runner.encode(encoder_batch(sources, source_width=width))
        except Exception as error:  # every waiter must hear of it
            failure = logged_failure(error, "encoding")
            return [Failed(request.id, failure) for request, _ in starting]
        encode_s = self._clock() - now
        tokens = sum(map(len, sources))
        self._observer.encoded(encode_s, count, tokens, width * count - tokens)
        for index, (request, queued_at) in enumerate(starting):
            origin = FromEncoder(encoded, index)
            self._enter(_Running(request, cost(request), queued_at, now, encode_s, origin))
        return []

    def _opens_at(self) -> float:
        return self._admission.opens_at(Waiting(len(self._queue), self._queue[0][1], len(self._running)))

    def _enter(self, running: _Running) -> None:
        request, place = running.request, self._free_places.pop()
        self._room = Room(
            self._room.places - 1, self._room.rows - running.cost.rows, self._room.slots - running.cost.slots
        )
        self._running[place] = running
        self._place_of[request.id] = place
        self._changed = True
        if request.stream:
            self._streaming.add(place)
        self._deadline[place] = np.inf if request.deadline is None else request.deadline
        self._source_length[place] = len(request.source)
        self._lane_of[place] = lane_of(len(request.source))
        self._searches.start(place, request.options, self._rules.decoder_start)
        self._slots.clear(place)

    def _leave(self, place: int) -> _Running:
        running = self._running.pop(place)
        del self._place_of[running.request.id]
        self._free_places.append(place)
        self._streaming.discard(place)
        self._deadline[place] = np.inf
        self._slots.clear(place)
        self._room = Room(
            self._room.places + 1, self._room.rows + running.cost.rows, self._room.slots + running.cost.slots
        )
        self._changed = True
        return running

    def _seat(self) -> list[_Lane]:
        """Give every beam a slot and every sentence a seat in the narrowest lane that holds it."""
        searches = self._searches
        if self._changed:
            self._places = np.fromiter(self._running, np.int64, len(self._running))
            self._beams = int(searches.width[self._places].max())
        places, beams = self._places, self._beams
        live = searches.score[places, :beams] > DEAD
        self._slot[places, :beams] = self._slots.assign(places, parent_of(searches.choice[places, :beams]), live)
        if self._changed or any(map(self._outgrown, self._lanes)):
            self._reseat(places)
        return [lane for lane in self._lanes if lane.members]

    def _outgrown(self, lane: _Lane) -> bool:
        """Whether a sentence has more slots in use than its seat has."""
        return bool(lane.members) and int(self._slots.ends(lane.places).max()) > lane.cache.slots

    def _reseat(self, places: IntArray) -> None:
        numbers = LANES.searchsorted(np.maximum(self._slots.ends(places), self._source_length[places]))
        numbers = np.maximum(
            np.maximum(numbers, self._lane_of[places]), narrowest_lane(len(places), self._runner.device)
        )
        if not self._changed and (numbers == self._lane_of[places]).all():
            for lane in filter(self._outgrown, self._lanes):
                self._fit(lane, self._seats[: len(lane.members)], lane.places)
            return
        self._lane_of[places] = numbers
        while len(self._lanes) <= int(numbers.max()):
            self._lanes.append(_Lane(self._runner.new_cache()))
        old = [lane.members for lane in self._lanes]
        # From the widest lane down: who moves up is copied before the seat is taken by another.
        for number in reversed(range(len(self._lanes))):
            self._arrange(number, places[numbers == number].tolist(), old)
        for running in self._running.values():
            running.origin = None
        self._changed = False

    def _arrange(self, number: int, staying: list[int], old: list[list[int]]) -> None:
        lane = self._lanes[number]
        here = set(old[number])
        arriving = [place for place in staying if place not in here or self._running[place].origin is not None]
        members = seats(old[number], set(staying) - set(arriving), arriving)
        seat_of = {place: seat for seat, place in enumerate(old[number])}
        origins = [self._origin(number, place, seat_of, old) for place in members]
        stay = len(members) == len(lane.members) and origins == self._seats[: len(members)]
        lane.seat(members, self._searches, self._source_length)
        if members:
            self._fit(lane, origins, lane.places, stay=stay)

    def _origin(self, number: int, place: int, seat_of: dict[int, int], old: list[list[int]]) -> Origin:
        newcomer = self._running[place].origin
        if newcomer is not None:
            return newcomer
        if place in seat_of:
            return self._seats[seat_of[place]]
        below = next(i for i in range(number) if place in old[i])
        return FromCache(self._lanes[below].cache, old[below].index(place))

    def _fit(self, lane: _Lane, origins: Sequence[Origin], places: IntArray, *, stay: bool = True) -> None:
        """Bring a lane's cache to the shape that its members need; `stay` if they sit where they sat."""
        cache = lane.cache
        slots = seat_width(int(self._slots.ends(places).max()), cache.slots, slot_granule(len(places)))
        width = seat_width(int(lane.source_length.max()), cache.source_width)
        if not stay or (slots, width) != (cache.slots, cache.source_width):
            cache.arrange(origins, slots=slots, source_width=width)

    def _decode(self, lane: _Lane) -> list[Event]:
        began = self._clock()
        places, beams, searches = lane.places, lane.beams, self._searches
        score, choice, step = searches.score[places, :beams], searches.choice[places, :beams], searches.step[places]
        at = lane.layout(score > DEAD)
        batch = step_batch(
            at,
            token=token_of(choice),
            step=step,
            slot=self._slot[places, :beams],
            ancestors=self._slots.mask(places, at.row_of.shape[1], lane.cache.slots),
            source_length=lane.source_length,
            candidates=self._rules.search.needed_candidates(beams, self._rules.vocabulary),
        )
        logprob, token = self._runner.step(lane.cache, batch)
        decide = advance_singly if len(places) <= SINGLY_UP_TO else advance
        selection = decide(
            self._rules.search,
            lane.limits,
            step=step,
            score=score,
            finished=searches.finished,
            places=places,
            top_logprob=_by_beam(logprob, at.live, DEAD),
            top_token=_by_beam(token, at.live, 0),
        )
        searches.commit(places, selection)
        now = self._clock()
        self._observer.stepped(now - began, len(batch.ids), len(places))
        done = [lane.members[i] for i in selection.done.nonzero()[0]]
        streaming = self._streaming.difference(done).intersection(lane.members) if self._streaming else ()
        pieces = [piece for place in streaming for piece in self._piece(place)]
        return [*pieces, *(self._complete(place, now) for place in done)]

    def _piece(self, place: int) -> list[Event]:
        running = self._running[place]
        tokens = tuple(self._searches.certain(place, running.sent))
        running.sent += len(tokens)
        return [Piece(running.request.id, tokens)] if tokens else []

    def _complete(self, place: int, now: float) -> Event:
        steps = int(self._searches.step[place])
        hypotheses = self._searches.hypotheses(place, self._running[place].request.options.n_best)
        running = self._leave(place)
        if not hypotheses:
            return Failed(running.request.id, logged_failure(ArithmeticError("no finite scores"), "a decode step"))
        started = running.started_at
        decode_s = now - started - running.encode_s
        timing = Timing(started - running.queued_at, running.encode_s, decode_s, steps)
        return Completed(running.request.id, hypotheses, timing)

    def _fail(self, places: Sequence[int], error: Exception, phase: str) -> list[Event]:
        """End some sentences; their caches may hold anything now, so whatever sat with them starts from fresh ones."""
        failure = logged_failure(error, phase)
        events: list[Event] = [Failed(self._leave(place).request.id, failure) for place in list(places)]
        for number, lane in enumerate(self._lanes):
            if not any(place in self._running for place in lane.members):
                self._lanes[number] = _Lane(self._runner.new_cache())
        return events


def _by_beam(rows: NDArray[Any], live: BoolArray, fill: object) -> NDArray[Any]:
    """Packed rows (N, C) as (S, K, C); `fill` where no beam is live."""
    shape = (*live.shape, rows.shape[1])
    if len(rows) == live.size:
        return rows.reshape(shape)
    result = np.full(shape, fill, rows.dtype)
    result[live] = rows
    return result


def logged_failure(error: BaseException, phase: str) -> StepFailed:
    """A failure for the callers, whose cause is in the log under its id."""
    failure = StepFailed(uuid.uuid4().hex[:16])
    _log.error("%s failed", phase, exc_info=error, extra={"event": "step_failed", "error_id": failure.error_id})
    return failure
