"""The engine of one worker: receive, plan, encode, step, commit. Synchronous; one thread owns it.

    accept/cancel → step: drop who is late → start newcomers → seat everybody → decode each lane → events

`loop.py` gives it a thread; tests drive it by hand.
"""

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from beamline_server.engine.admission import MAX_BEAMS, Capacity, Cost, cost
from beamline_server.engine.batch import Candidates, encoder_batch, step_batch
from beamline_server.engine.beam import DEAD, IntArray, SearchRules, Selection, advance, parent_of, token_of
from beamline_server.engine.errors import DeadlineExceeded, EngineError, RequestCancelled, StepFailed
from beamline_server.engine.kv_pool import SlotTable
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import Completed, Event, Failed, GenerationRequest, Piece, RequestId, Timing
from beamline_server.engine.runner import FromEncoder, StepRunner
from beamline_server.engine.scheduler import Admission, Continuous, Room, Waiting, round_up
from beamline_server.engine.scoring import FloatArray
from beamline_server.engine.searches import Searches
from beamline_server.engine.seating import Seated, Seating

ENCODE_TOKENS = 1024
_STEPS_REMEMBERED = 16
"""Ends of steps that a core remembers, to tell how many of them a request that nobody waits for sat through."""
_log = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class ModelRules:
    """What the engine knows of the model."""

    search: SearchRules
    decoder_start: int
    vocabulary: int
    max_source_tokens: int


@dataclass(slots=True)
class _Running:
    """A sentence that holds a place; touched when it starts, ends or streams."""

    request: GenerationRequest
    cost: Cost
    queued_at: float
    started_at: float
    encode_s: float
    sent: int = 0


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
        self._encoded: dict[RequestId, FromEncoder] = {}  # ahead of their start
        self._earliest_deadline = np.inf
        places = capacity.rows
        self._free_places = list(range(places - 1, -1, -1))
        self._room = Room(places, capacity.rows, capacity.slots)
        self._running: dict[int, _Running] = {}
        self._place_of: dict[RequestId, int] = {}
        self._cancelled: dict[RequestId, float] = {}
        self._streaming: set[int] = set()
        self._deadline = np.full(places, np.inf)
        self._slot = np.zeros((places, MAX_BEAMS), np.int64)
        self._searches = Searches(places, MAX_BEAMS, rules.search.eos)
        self._slots = SlotTable(places, MAX_BEAMS)
        self._seating = Seating(runner, self._slots, self._searches)
        self.queued_rows = 0
        self.last_step_at: float | None = None
        self._ends: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

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
        assert self._encoded.keys() <= {request.id for request, _ in self._queue}, "encodings are held for nobody"
        assert self._slots.in_use() == 0 or self._running, "slots are held by nobody"

    # -- messages -----------------------------------------------------------------------------------------------------

    def accept(self, requests: Iterable[GenerationRequest]) -> None:
        """Queue requests that were admitted."""
        now = self._clock()
        for request in requests:
            # What was cancelled before it came is another request, which has ended, of the same id.
            self._cancelled.pop(request.id, None)
            self._queue.append((request, now))
            self.queued_rows += request.options.beam_size
            if request.deadline is not None:
                self._earliest_deadline = min(self._earliest_deadline, request.deadline)

    def cancel(self, ids: Iterable[RequestId], wished_at: float | None = None) -> None:
        """Drop requests at the next step, whose callers gave up at `wished_at` (default: now); unknown ids are over."""
        self._cancelled |= dict.fromkeys(ids, self._clock() if wished_at is None else wished_at)

    def fail_all(self, make_error: Callable[[], EngineError]) -> list[Event]:
        """End everything that is queued or running with an error."""
        events: list[Event] = [Failed(request.id, make_error()) for request, _ in self._queue]
        self._queue.clear()
        self._encoded.clear()
        self.queued_rows = 0
        for place in list(self._running):
            events.append(Failed(self._leave(place).request.id, make_error()))
        self._seating.clear()
        return events

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Advance everything that runs by one token; returns what became known."""
        now = self._clock()
        events = [*self._drop_cancelled(), *self._drop_late(now), *self._start(now)]
        if not self._running:
            return events
        try:
            seated = self._seat()
        except Exception as error:  # whatever it was, every waiter must hear of it
            return [*events, *self._fail(list(self._running), error, "seating")]
        events += self._decode(seated)
        self.last_step_at = self._clock()
        self._ends.append(self.last_step_at)
        return events

    def _drop_cancelled(self) -> list[Event]:
        if not self._cancelled:
            return []
        cancelled, self._cancelled = self._cancelled, {}
        held = [(self._place_of[i], wished_at) for i, wished_at in cancelled.items() if i in self._place_of]
        events: list[Event] = [self._release(place, RequestCancelled(), wished_at) for place, wished_at in held]
        return events + self._unqueue(lambda request: request.id in cancelled, RequestCancelled)

    def _drop_late(self, now: float) -> list[Event]:
        if now < self._earliest_deadline:
            return []
        late = [(place, self._deadline[place]) for place in np.flatnonzero(self._deadline <= now).tolist()]
        events: list[Event] = [self._release(place, DeadlineExceeded("decoding"), wished) for place, wished in late]
        events += self._unqueue(
            lambda request: request.deadline is not None and request.deadline <= now,
            lambda: DeadlineExceeded("queueing"),
        )
        waiting = [request.deadline for request, _ in self._queue if request.deadline is not None]
        self._earliest_deadline = min([*waiting, float(self._deadline.min(initial=np.inf))], default=np.inf)
        return events

    def _release(self, place: int, error: EngineError, wished_at: float) -> Failed:
        """End a sentence that nobody has waited for since `wished_at`; tell how many steps have ended since."""
        self._observer.released(sum(end > wished_at for end in self._ends))
        return Failed(self._leave(place).request.id, error)

    def _unqueue(self, goes: Callable[[GenerationRequest], bool], error: Callable[[], EngineError]) -> list[Event]:
        leaving = [request for request, _ in self._queue if goes(request)]
        if leaving:
            self._queue = deque(entry for entry in self._queue if not goes(entry[0]))
            self.queued_rows -= sum(request.options.beam_size for request in leaving)
            for request in leaving:
                self._encoded.pop(request.id, None)
        return [Failed(request.id, error()) for request in leaving]

    def _start(self, now: float) -> list[Event]:
        """Give places to as many from the head of the queue as there is room for."""
        if not self._queue or now < self._opens_at():
            return []
        queue = (request for request, _ in self._queue)
        count = self._admission.starters(queue, self._room, encode_tokens=self._encode_tokens)
        if not count:
            return []
        starting = [self._queue.popleft() for _ in range(count)]
        self.queued_rows -= sum(request.options.beam_size for request, _ in starting)
        failure = self._encode([request for request, _ in starting], now)
        encode_s = self._clock() - now
        events: list[Event] = []
        for request, queued_at in starting:
            origin = self._encoded.pop(request.id, None)
            if origin is None:
                assert failure is not None
                events.append(Failed(request.id, failure))
            else:
                self._enter(_Running(request, cost(request), queued_at, now, encode_s), origin)
        return events

    def _encode(self, starting: Sequence[GenerationRequest], now: float) -> StepFailed | None:
        """Encode who starts, unless that has been done, and a few who wait; returns what went wrong."""
        needed = [request for request in starting if request.id not in self._encoded]
        if not needed:
            return None
        following = (request for request, _ in self._queue if request.id not in self._encoded)
        needed += self._admission.encoded_with(needed, following, encode_tokens=self._encode_tokens)
        sources = [request.source for request in needed]
        width = round_up(max(map(len, sources)))
        try:
            encoded = self._runner.encode(encoder_batch(sources, source_width=width))
        except Exception as error:  # every waiter must hear of it
            return logged_failure(error, "encoding")
        tokens = sum(map(len, sources))
        self._observer.encoded(self._clock() - now, len(sources), tokens, width * len(sources) - tokens)
        self._encoded |= {request.id: FromEncoder(encoded, index) for index, request in enumerate(needed)}
        return None

    def _opens_at(self) -> float:
        return self._admission.opens_at(Waiting(len(self._queue), self._queue[0][1], len(self._running)))

    def _enter(self, running: _Running, origin: FromEncoder) -> None:
        request, place = running.request, self._free_places.pop()
        self._room = Room(
            self._room.places - 1, self._room.rows - running.cost.rows, self._room.slots - running.cost.slots
        )
        self._running[place] = running
        self._place_of[request.id] = place
        if request.stream:
            self._streaming.add(place)
        self._deadline[place] = np.inf if request.deadline is None else request.deadline
        self._searches.start(place, request.options, self._rules.decoder_start)
        self._slots.clear(place)
        self._seating.enter(place, len(request.source), origin)

    def _leave(self, place: int) -> _Running:
        running = self._running.pop(place)
        del self._place_of[running.request.id]
        self._free_places.append(place)
        self._streaming.discard(place)
        self._deadline[place] = np.inf
        self._slots.clear(place)
        self._seating.leave(place)
        self._room = Room(
            self._room.places + 1, self._room.rows + running.cost.rows, self._room.slots + running.cost.slots
        )
        return running

    def _seat(self) -> Seated:
        """Give every live beam a slot for its new token, and every sentence a seat that has it."""
        places, beams = self._seating.places()
        live = self._searches.score[places, :beams] > DEAD
        parent = parent_of(self._searches.choice[places, :beams])
        self._slot[places, :beams] = self._slots.assign(places, parent, live)
        return self._seating.seat()

    def _decode(self, seated: Seated) -> list[Event]:
        """Run each lane, then decide for all sentences at once."""
        began, events = self._clock(), list[Event]()
        places, beams, searches = seated.places, seated.beams, self._searches
        score, choice, step = searches.score[places, :beams], searches.choice[places, :beams], searches.step[places]
        live, token, slot = score > DEAD, token_of(choice), self._slot[places, :beams]
        candidates = Candidates(live, self._rules.search.needed_candidates(beams, self._rules.vocabulary))
        for lane, part in zip(seated.lanes, seated.parts, strict=True):
            narrow = part, slice(lane.beams)
            try:
                at = lane.layout(live[narrow])
                batch = step_batch(
                    at,
                    token=token[narrow],
                    step=step[part],
                    slot=slot[narrow],
                    ancestors=self._slots.mask(lane.places, at.row_of.shape[1], lane.cache.slots),
                    source_length=lane.source_length,
                    candidates=candidates.count,
                )
                candidates.put(part, at, *self._runner.step(lane.cache, batch))
            except Exception as error:  # every waiter must hear of it; other lanes go on
                events += self._fail(lane.members, error, "a decode step")
        if events:
            there = [i for i, place in enumerate(seated.members) if place in self._running]
            if not there:
                return events
            seated, live, score, step = seated.only(there, searches), live[there], score[there], step[there]
            candidates = candidates.only(there)
        try:
            selection = self._decide(seated, step, score, candidates)
        except Exception as error:  # as above
            return [*events, *self._fail(seated.members, error, "a decode step")]
        now = self._clock()
        self._observer.stepped(now - began, int(np.count_nonzero(live)), len(seated.members))
        done = [seated.members[i] for i in selection.done.nonzero()[0]]
        pieces = [piece for place in self._streaming.difference(done) for piece in self._piece(place)]
        return [*events, *pieces, *(self._complete(place, now) for place in done)]

    def _decide(self, seated: Seated, step: IntArray, score: FloatArray, candidates: Candidates) -> Selection:
        selection = advance(
            self._rules.search,
            seated.limits,
            step=step,
            score=score,
            finished=self._searches.finished,
            places=seated.places,
            top_logprob=candidates.logprob,
            top_token=candidates.token,
        )
        self._searches.commit(seated.places, selection)
        return selection

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
        self._seating.renew()
        return events


def logged_failure(error: BaseException, phase: str) -> StepFailed:
    """A failure for the callers, whose cause is in the log under its id."""
    failure = StepFailed(uuid.uuid4().hex[:16])
    _log.error("%s failed", phase, exc_info=error, extra={"event": "step_failed", "error_id": failure.error_id})
    return failure
