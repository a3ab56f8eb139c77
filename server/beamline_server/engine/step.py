"""The engine of one worker: admit, place, run, decide, deliver. Synchronous; one thread owns it.

`workers.py` gives it a thread; tests drive it by hand.
"""

import logging
import math
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from beamline_server.engine.admission import (
    ENCODE_TOGETHER,
    MOST_ROWS,
    Admission,
    Capacity,
    Continuous,
    Cost,
    Waiting,
    cost,
)
from beamline_server.engine.backend import NOT_ENCODED, Backend, Bucket, Encoded
from beamline_server.engine.errors import DeadlineExceeded, EngineError, RequestCancelled, StepFailed
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.pace import Pace
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.queue import Queue
from beamline_server.engine.request import (
    Completed,
    Event,
    Failed,
    GenerationRequest,
    Piece,
    Priority,
    RequestId,
    Timing,
    prompted,
)
from beamline_server.engine.search import decide, start
from beamline_server.engine.shares import Shares
from beamline_server.engine.table import SequenceTable
from beamline_server.engine.turns import Turns, accounts_with_few

SURE = 0.7
"""Part of the time that an answer is expected to take, for which there must be time when its request starts."""
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
    """A request that is in the table; touched when it starts, ends or streams."""

    request: GenerationRequest
    cost: Cost
    queued_at: float
    started_at: float
    encode_s: float
    sent: int = 0


class EngineCore:
    """Continuous-batched beam search on one backend.

    Args:
        backend: Computes.
        rules: What the model fixes.
        capacity: Rows and cache slots at a time.
        clock: Monotonic seconds.
        observer: Is told what each step did.
        encode_tokens: Source tokens to encode per step at most; by default what the backend says.
        admission: When requests may start.
    """

    def __init__(  # noqa: PLR0913 - what a core stands on; nothing of it belongs together
        self,
        backend: Backend,
        rules: ModelRules,
        capacity: Capacity,
        *,
        clock: Clock,
        observer: StepObserver,
        encode_tokens: int | None = None,
        admission: Admission = Continuous(),  # noqa: B008 - a frozen value
    ) -> None:
        self._backend = backend
        self._rules = rules
        self._capacity = capacity
        self._clock = clock
        self._observer = observer
        self._encode_tokens = encode_tokens or backend.encode_tokens
        self._admission = admission
        self._search = rules.search.arrays()
        self._queue = Queue()
        self._encoded: dict[RequestId, tuple[Encoded, int]] = {}  # ahead of their start
        self._room = capacity.whole
        self._shares = Shares(capacity)
        self._turns = Turns()
        self._few: list[int] | None = None
        """Indices of the sequences whose callers have few rows; None while that is not known."""
        self._aside_s = 0.0
        """Seconds that steps of few have taken since the last one in which all went."""
        self._table = SequenceTable(self._room.rows, rules.search.eos)
        self._cache = backend.new_cache()
        self._free = list(range(self._room.rows - 1, -1, -1))
        self._running: dict[int, _Running] = {}
        self._index_of: dict[RequestId, int] = {}
        self._streaming: set[int] = set()
        self._feeding: set[int] = set()
        self._cancelled: dict[RequestId, float] = {}
        self._earliest_deadline = math.inf
        self.last_step_at: float | None = None
        self._goes_on = False
        """Whether the last step left something to do for the next one."""
        self.pace = Pace()
        self.failures = 0
        """Runs of the model that have failed since the last one that has not."""
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
            return -math.inf
        return min(self._opens_at(), self._queue.earliest_deadline)

    @property
    def queued_requests(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def queued_rows(self) -> int:
        """Rows that waiting requests ask for."""
        return self._queue.rows

    @property
    def running_requests(self) -> int:
        """Requests that hold rows."""
        return len(self._running)

    @property
    def running_rows(self) -> int:
        """Rows that running requests hold."""
        return self._capacity.whole.rows - self._room.rows

    def check(self) -> None:
        """Recount what is free and what is held.

        Raises:
            AssertionError: rows, slots or places in the table do not add up to what there is.
        """
        held, whole = [running.cost for running in self._running.values()], self._capacity.whole
        assert self._room.rows + sum(c.rows for c in held) == whole.rows, "rows are lost"
        assert self._room.rows + sum(self._shares.rows.values()) == whole.rows, "rows are nobody's"
        assert self._room.slots + sum(c.slots for c in held) == whole.slots, "cache slots are lost"
        assert sorted([*self._free, *self._running]) == list(range(whole.rows)), "places are lost"
        assert {r.request.id for r in self._running.values()} == set(self._index_of), "requests are lost"
        assert self._queue.rows == sum(cost(request).rows for request in self._queue), "the queue is miscounted"
        assert self._encoded.keys() <= {request.id for request in self._queue}, "encodings are held for nobody"

    # -- messages -----------------------------------------------------------------------------------------------------

    def accept(self, requests: Iterable[GenerationRequest]) -> None:
        """Queue requests that were admitted."""
        now = self._clock()
        for request in requests if self._backend.has_encoder else map(prompted, requests):
            # What was cancelled before it came is another request, which has ended, of the same id.
            self._cancelled.pop(request.id, None)
            self._queue.append(request, now, self.pace.work(request))

    def cancel(self, ids: Iterable[RequestId], wished_at: float | None = None) -> None:
        """Drop requests at the next step, whose callers gave up at `wished_at` (default: now); unknown ids are over."""
        self._cancelled |= dict.fromkeys(ids, self._clock() if wished_at is None else wished_at)

    def fail_all(self, make_error: Callable[[], EngineError]) -> list[Event]:
        """End everything that is queued or running with an error."""
        queued = self._queue.clear()
        self._encoded.clear()
        running = [self._leave(index).request for index in list(self._running)]
        return [Failed(request.id, make_error()) for request in (*queued, *running)]

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Advance everything that runs by one token; returns what became known."""
        now = self._clock()
        events = [*self._drop_cancelled(), *self._drop_late(now), *self._drop_hopeless(now), *self._admit(now)]
        if not self._running:
            self._goes_on, self._aside_s = False, 0.0
            return events
        began, running, rows, went, over = self._clock(), len(self._running), 0, 0, 0
        going = self._going()
        for bucket in self._place(going, events):
            went += len(bucket.members)
            ran, done = self._advance(bucket, events)
            rows, over = rows + ran, over + done
        if self._feeding:
            self._give_back_rows()
        self._turns.took(self._note(began, rows, went, all_went=went == running), was_of_few=going is not None)
        events += self._deliver(over)
        self._goes_on = bool(self._running)
        return events

    def _drop_cancelled(self) -> list[Event]:
        if not self._cancelled:
            return []
        cancelled, self._cancelled = self._cancelled, {}
        held = [(self._index_of[i], wished_at) for i, wished_at in cancelled.items() if i in self._index_of]
        events: list[Event] = [self._release(index, RequestCancelled(), wished_at) for index, wished_at in held]
        return events + self._unqueued(self._queue.cancel(cancelled.keys()), RequestCancelled)

    def _drop_late(self, now: float) -> list[Event]:
        if now < min(self._earliest_deadline, self._queue.earliest_deadline):
            return []
        deadlines = {i: r.request.deadline for i, r in self._running.items() if r.request.deadline is not None}
        late = [(index, deadline) for index, deadline in deadlines.items() if deadline <= now]
        events: list[Event] = [self._release(index, DeadlineExceeded("decoding"), wished) for index, wished in late]
        self._earliest_deadline = min((d for d in deadlines.values() if d > now), default=math.inf)
        return events + self._unqueued(self._queue.expire(now), lambda: DeadlineExceeded("queueing"))

    def _drop_hopeless(self, now: float) -> list[Event]:
        """Who is next in the queue and will most likely be late leaves it, so that its place is not wasted."""
        if not self._queue:
            return []
        return self._unqueued(self._queue.give_up(self._is_hopeless, now), lambda: DeadlineExceeded("queueing"))

    def _is_hopeless(self, request: GenerationRequest, now: float) -> bool:
        busy = min(1.0, self.running_rows / self._capacity.rows)
        deadline = request.deadline
        return deadline is not None and now + SURE * busy * self.pace.service_s(request) > deadline

    def _release(self, index: int, error: EngineError, wished_at: float) -> Failed:
        """End a request that nobody has waited for since `wished_at`; tell how many steps have ended since."""
        self._observer.released(sum(end > wished_at for end in self._ends))
        return Failed(self._leave(index).request.id, error)

    def _unqueued(self, gone: Sequence[GenerationRequest], error: Callable[[], EngineError]) -> list[Event]:
        for request in gone:
            self._encoded.pop(request.id, None)
        return [Failed(request.id, error()) for request in gone]

    def _admit(self, now: float) -> list[Event]:
        """Start as many from the head of the queue as there is room for."""
        if not self._queue or now < self._opens_at():
            return []
        candidates = self._candidates()
        startable = self._shares.startable(candidates, self._queue.waiting, self._room)
        starters = self._admission.starters(startable, self._room, encode_tokens=self._encode_tokens)
        if not starters:
            return []
        starting = self._queue.take(starters)
        failure = self._encode(starters, candidates, now)
        encode_s = self._clock() - now
        events: list[Event] = []
        for request, queued_at in starting:
            encoded = self._encoded.pop(request.id, None)
            if encoded is not None:
                self._enter(_Running(request, cost(request), queued_at, now, encode_s), *encoded)
            elif failure is not None:
                events.append(Failed(request.id, failure))
        return events

    def _candidates(self) -> Iterable[GenerationRequest]:
        """Who may start, in order: where others want to go first, nobody who has half of the rows already."""
        if self._turns.of_few:
            many = {of for of, rows in self._shares.rows.items() if 2 * rows >= self._capacity.rows}
            others = {of for of in self._queue.waiting if of not in many and of[1] is Priority.NORMAL}
            if many and (others or self._of_few()):
                return [request for request in self._queue if request.account in others] if others else []
        return self._queue

    def _encode(
        self, starting: Sequence[GenerationRequest], candidates: Iterable[GenerationRequest], now: float
    ) -> StepFailed | None:
        """Encode who starts, unless that has been done, and a few who wait; returns what went wrong."""
        needed = [request for request in starting if request.id not in self._encoded]
        if not needed:
            return None
        if len(self._encoded) < ENCODE_TOGETHER:  # or more and more would be encoded of whom nobody may start
            started = {request.id for request in starting}
            following = (r for r in candidates if r.id not in self._encoded and r.id not in started)
            needed += self._admission.encoded_with(needed, following, encode_tokens=self._encode_tokens)
        sources = [request.source for request in needed]
        if not self._backend.has_encoder:
            self._encoded |= {request.id: (NOT_ENCODED, 0) for request in needed}
            return None
        try:
            encoded = self._backend.encode(sources)
        except Exception as error:  # every waiter must hear of it
            return self._failed(error, "encoding")
        self.failures = 0
        self._observer.encoded(self._clock() - now, len(sources), sum(map(len, sources)), encoded.padded_tokens)
        self._encoded |= {request.id: (encoded, number) for number, request in enumerate(needed)}
        return None

    def _opens_at(self) -> float:
        return self._admission.opens_at(Waiting(len(self._queue), self._queue.oldest_at, len(self._running)))

    def _enter(self, running: _Running, encoded: Encoded, number: int) -> None:
        request, index = running.request, self._free.pop()
        self._room = self._room.less(running.cost)
        if running.cost.rows > request.options.beam_size:
            self._feeding.add(index)
        self._shares.start(request)
        self._running[index] = running
        self._index_of[request.id] = index
        if request.stream:
            self._streaming.add(index)
        if request.deadline is not None:
            self._earliest_deadline = min(self._earliest_deadline, request.deadline)
        self._table.enter(index, request, self._rules.decoder_start)
        start(self._table.arrays, index)
        self._cache.enter(index, encoded, number)
        self._few = None

    def _leave(self, index: int) -> _Running:
        self._cache.leave(index)
        return self._forget(index)

    def _forget(self, index: int) -> _Running:
        running = self._running.pop(index)
        del self._index_of[running.request.id]
        self._free.append(index)
        self._streaming.discard(index)
        self._feeding.discard(index)
        self._table.leave(index)
        self._room = self._room.more(running.cost)
        self._shares.end(running.request, running.cost)
        self._few = None
        return running

    def _give_back_rows(self) -> None:
        """Those whose prefix has been fed have no more rows from now on than their search has beams."""
        sequences = self._table.arrays.sequences
        for index in [i for i in self._feeding if sequences[i].length]:
            self._feeding.discard(index)
            running = self._running[index]
            over = Cost(running.cost.rows - running.request.options.beam_size, 0)
            running.cost -= over
            self._room = self._room.more(over)
            self._shares.give_back(running.request, over)
            self._few = None

    def _going(self) -> Sequence[int] | None:
        """Indices of the sequences that the next step computes; None for all."""
        return (self._of_few() or None) if self._turns.of_few else None

    def _of_few(self) -> Sequence[int]:
        """Indices of the sequences whose callers have few rows."""
        if self._few is None:
            few = accounts_with_few(self._shares.rows)
            requests = ((index, running.request) for index, running in self._running.items())
            self._few = [i for i, r in requests if r.account in few and r.priority is Priority.NORMAL]
        return self._few

    def _place(self, going: Sequence[int] | None, events: list[Event]) -> Sequence[Bucket]:
        """Give the sequences that go room for their rows, in the buckets that are to run."""
        try:
            return self._cache.place(self._table.arrays, going)
        except Exception as error:  # whatever it was, every waiter must hear of it
            failure = self._failed(error, "placing")
            self._cache = self._backend.new_cache()
            events += [Failed(self._forget(index).request.id, failure) for index in list(self._running)]
            return []

    def _advance(self, bucket: Bucket, events: list[Event]) -> tuple[int, int]:
        """Run a bucket and decide for its sequences; if that fails, only they end. Returns rows, and who is over."""
        needed, search = bucket.needed, self._rules.search
        try:
            self._table.reserve(slots=needed.slots + MOST_ROWS, steps=needed.length + 1)
            result = bucket.run(self._table.arrays, search.needed_candidates(needed.beams, self._rules.vocabulary))
            over = decide(self._search, self._table.arrays, bucket.members, result.top_logprob, result.top_token)
        except Exception as error:  # as above
            failure = self._failed(error, "a decode step")
            events += [Failed(self._leave(index).request.id, failure) for index in bucket.members.tolist()]
            return 0, 0
        self.failures = 0
        return needed.rows, over

    def _failed(self, error: Exception, phase: str) -> StepFailed:
        self.failures += 1
        return logged_failure(error, phase)

    def _note(self, began: float, rows: int, went: int, *, all_went: bool) -> float:
        """A step has ended; returns how long it took, with what stood before it."""
        before, self.last_step_at = self.last_step_at, self._clock()
        self._ends.append(self.last_step_at)
        # What stands between two steps counts, above all encoding.
        seconds = self.last_step_at - (began if before is None or not self._goes_on else before)
        if all_went:
            # Of steps of few rows nothing follows for many.
            if 2 * rows >= self._capacity.rows:
                self.pace.stepped(rows, seconds, self._aside_s)
            self._aside_s = 0.0
        else:
            self._aside_s += seconds
        if rows:
            self._observer.stepped(self.last_step_at - began, rows, went)
        return seconds

    def _deliver(self, over: int) -> list[Event]:
        """What the running sequences have to tell after a step; those that are over leave."""
        done = self._table.done() if over else []
        pieces = [piece for index in self._streaming.difference(done) for piece in self._piece(index)]
        return [*pieces, *(self._complete(index) for index in done)]

    def _piece(self, index: int) -> list[Event]:
        running = self._running[index]
        tokens = self._table.certain(index, running.sent)
        running.sent += len(tokens)
        return [Piece(running.request.id, tokens)] if tokens else []

    def _complete(self, index: int) -> Event:
        hypotheses = self._table.hypotheses(index, self._running[index].request.options.n_best)
        steps = self._table.steps(index)
        running = self._leave(index)
        if not hypotheses:
            return Failed(running.request.id, logged_failure(ArithmeticError("no finite scores"), "a decode step"))
        self.pace.answered(running.request, steps)
        started, ended = running.started_at, self._ends[-1]
        decode_s = ended - started - running.encode_s
        timing = Timing(started - running.queued_at, running.encode_s, decode_s, steps)
        return Completed(running.request.id, hypotheses, timing)


def logged_failure(error: BaseException, phase: str) -> StepFailed:
    """A failure for the callers, whose cause is in the log under its id."""
    failure = StepFailed(uuid.uuid4().hex[:16])
    _log.error("%s failed", phase, exc_info=error, extra={"event": "step_failed", "error_id": failure.error_id})
    return failure
