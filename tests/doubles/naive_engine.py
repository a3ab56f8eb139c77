"""A naive engine of a whole batch: lists and tuples, one sequence after another; the oracle of the batch.

It has no table, slots, rows, buckets or packing: every hypothesis carries its own tokens, and what comes after them is
looked up. What is decided follows the definitions: Hugging Face `generate`'s beam search, first come first served, as
many at a time as there is room for at their worst.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from beamline_server.engine.admission import MOST_ROWS, Capacity, Cost, cost
from beamline_server.engine.pace import Pace
from beamline_server.engine.request import (
    EarlyStopping,
    Finish,
    GenerationRequest,
    Hypothesis,
    LengthPenaltyKind,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.step import SURE, ModelRules
from beamline_server.engine.table import FloatArray

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Path:
    """A hypothesis: what it has generated, and the running sums of its log-probabilities."""

    tokens: Tokens = ()
    totals: tuple[np.float32, ...] = (np.float32(0),)

    def continued(self, token: int, logprob: np.float32) -> "Path":
        """The hypothesis with one token more."""
        return Path((*self.tokens, token), (*self.totals, np.float32(self.totals[-1] + logprob)))

    def score(self, length: int, options: SearchOptions) -> np.float32:
        """Its sum divided by the length penalty of so many tokens."""
        gnmt = options.length_penalty_kind is LengthPenaltyKind.GNMT
        base = (5 + length) / 6 if gnmt else float(length)
        return np.float32(self.totals[-1] / np.float32(base**options.length_penalty))


@dataclass
class Search:
    """A running request."""

    request: GenerationRequest
    unfed: int
    """Tokens before the first generated one that no step has read yet."""
    live: list[Path] = field(default_factory=lambda: [Path()])
    finished: list[Path] = field(default_factory=list)
    told: int = 0
    steps: int = 0

    @property
    def cost(self) -> Cost:
        """What it holds: rows of its beams alone, once what it begins with has been read."""
        whole = cost(self.request)
        return whole if self.unfed else Cost(self.request.options.beam_size, whole.slots)

    @property
    def rows(self) -> int:
        """Tokens that the next step reads."""
        return min(self.unfed, MOST_ROWS) or len(self.live)


@dataclass
class NaiveStep:
    """What a step came to, by request: rows that ran, tokens that are certain, the best hypotheses, why it failed."""

    rows: dict[RequestId, int] = field(default_factory=dict)
    pieces: dict[RequestId, Tokens] = field(default_factory=dict)
    completed: dict[RequestId, tuple[Hypothesis, ...]] = field(default_factory=dict)
    failed: dict[RequestId, str] = field(default_factory=dict)


class NaiveEngine:
    """What an `EngineCore` is, told from outside.

    Args:
        table: (source, prefix that begins with the decoder start) -> log-probabilities, (V,).
        rules: What the model fixes.
        capacity: Rows and slots at a time.
        encode_tokens: Source tokens, padding included, of those who start at a step.
    """

    def __init__(
        self,
        table: Callable[[Tokens, Tokens], FloatArray],
        rules: ModelRules,
        capacity: Capacity,
        *,
        encode_tokens: int,
    ) -> None:
        self._table = table
        self._rules = rules
        self._capacity = capacity
        self._encode_tokens = encode_tokens
        self._queue: list[GenerationRequest] = []
        self._running: list[Search] = []
        self._cancelled: set[RequestId] = set()
        self._pace, self._goes_on = Pace(), False

    def accept(self, requests: Iterable[GenerationRequest]) -> None:
        """Requests come."""
        self._queue += requests

    def cancel(self, ids: Iterable[RequestId]) -> None:
        """Drop requests at the next step."""
        self._cancelled |= set(ids)

    def step(self, now: float) -> NaiveStep:
        """Drop who has given up or has no hope, start who fits, advance all by a token. A step takes a second."""
        result = NaiveStep()
        self._drop(now, result)
        self._give_up(now, result)
        self._start()
        for search in self._running:
            result.rows[search.request.id] = search.rows
            if self._advance(search):
                self._end(search, result)
            elif search.request.stream:
                self._tell(search, result)
        if 2 * sum(result.rows.values()) >= self._capacity.rows:
            self._pace.stepped(sum(result.rows.values()), 1.0 if self._goes_on else 0.0)
        self._running = [s for s in self._running if s.request.id not in {*result.completed, *result.failed}]
        self._goes_on = bool(self._running)
        return result

    def _drop(self, now: float, result: NaiveStep) -> None:
        for asked in [*self._queue, *(search.request for search in self._running)]:
            if asked.id in self._cancelled:
                result.failed[asked.id] = "cancelled"
            elif asked.deadline is not None and asked.deadline <= now:
                result.failed[asked.id] = "late"
        self._queue = [asked for asked in self._queue if asked.id not in result.failed]
        self._running = [search for search in self._running if search.request.id not in result.failed]
        self._cancelled.clear()

    def _give_up(self, now: float, result: NaiveStep) -> None:
        """Who is next and will most likely be late leaves."""
        taken = sum(search.cost.rows for search in self._running)
        while self._queue:
            asked = self._queue[0]
            expected_s = SURE * min(1.0, taken / self._capacity.rows) * self._pace.service_s(asked)
            if asked.deadline is None or now + expected_s <= asked.deadline:
                break
            result.failed[self._queue.pop(0).id] = "late"

    def _start(self) -> None:
        longest, started = 0, 0
        while self._queue:
            asked = self._queue[0]
            costs = [cost(asked), *(search.cost for search in self._running)]
            longest = max(longest, len(asked.source))
            fits = sum(c.rows for c in costs) <= self._capacity.rows
            fits = fits and sum(c.slots for c in costs) <= self._capacity.slots
            if not fits or (started and (started + 1) * longest > self._encode_tokens):
                break
            started += 1
            self._running.append(Search(self._queue.pop(0), 1 + len(asked.target_prefix)))

    def _advance(self, search: Search) -> bool:
        """A step of one sequence; returns whether it is over."""
        search.steps += 1
        search.unfed -= min(search.unfed, MOST_ROWS)
        if search.unfed:
            return False
        options = search.request.options
        length = len(search.live[0].tokens) + 1
        candidates = [path for parent in search.live for path in self._continuations(search.request, parent)]
        candidates.sort(key=lambda path: -path.totals[-1])
        ranked = candidates[: max(2, 1 + len(self._rules.search.eos)) * options.beam_size]
        at_limit = length == options.max_new_tokens
        ends = [path for path in ranked if at_limit or path.tokens[-1] in self._rules.search.eos]
        search.finished += [path for path in ends if path in ranked[: options.beam_size]]
        search.finished.sort(key=lambda path: -path.score(len(path.tokens), options))
        del search.finished[options.beam_size :]
        search.live = [path for path in ranked if path not in ends][: options.beam_size]
        return at_limit or not search.live or self._cannot_improve(search, length)

    def _continuations(self, asked: GenerationRequest, path: Path) -> list[Path]:
        rules, options, length = self._rules.search, asked.options, len(path.tokens)
        first = rules.forced_first if asked.forced_first is None else asked.forced_first
        first = None if asked.target_prefix else first
        forced = first if length == 0 else None
        if rules.forced_last is not None and length + 1 == options.max_new_tokens:
            forced = rules.forced_last
        if forced is not None:
            return [path.continued(forced, np.float32(0))]
        forbidden = {*rules.banned, *(rules.banned_at_start if length == (0 if first is None else 1) else ())}
        forbidden |= set(rules.eos) if length < options.min_new_tokens else set()
        start = self._rules.decoder_start if asked.decoder_start is None else asked.decoder_start
        row = self._table(asked.source, (start, *asked.target_prefix, *path.tokens))
        allowed = [token for token in range(len(row)) if token not in forbidden and row[token] > -np.inf]
        allowed.sort(key=lambda token: -row[token])
        return [path.continued(token, row[token]) for token in allowed]

    def _cannot_improve(self, search: Search, length: int) -> bool:
        options = search.request.options
        if len(search.finished) < options.beam_size:
            return False
        if options.beam_size == 1 or options.early_stopping is EarlyStopping.WHEN_FULL:
            return True
        hopeful = options.early_stopping is EarlyStopping.NEVER and options.length_penalty > 0
        worst = search.finished[-1]
        reachable = search.live[0].score(options.max_new_tokens if hopeful else length, options)
        return bool(reachable <= worst.score(len(worst.tokens), options))

    def _end(self, search: Search, result: NaiveStep) -> None:
        options = search.request.options
        best = tuple(self._hypothesis(path, options) for path in search.finished[: options.n_best])
        if best:
            self._pace.answered(search.request, search.steps)
            result.completed[search.request.id] = best
        else:
            result.failed[search.request.id] = "nothing found"

    def _hypothesis(self, path: Path, options: SearchOptions) -> Hypothesis:
        logprobs = tuple(float(after) - float(before) for before, after in pairwise(path.totals))
        finish = Finish.END_OF_SEQUENCE if path.tokens[-1] in self._rules.search.eos else Finish.LENGTH
        return Hypothesis(path.tokens, float(path.score(len(path.tokens), options)), logprobs, finish)

    def _tell(self, search: Search, result: NaiveStep) -> None:
        """Tell what all that may still win begin with, as far as it has not been told."""
        rivals = [path.tokens for path in (*search.live, *search.finished[:1])]
        shared = 0
        while all(len(tokens) > shared for tokens in rivals) and len({tokens[shared] for tokens in rivals}) == 1:
            shared += 1
        if shared > search.told:
            result.pieces[search.request.id] = rivals[0][search.told : shared]
            search.told = shared
