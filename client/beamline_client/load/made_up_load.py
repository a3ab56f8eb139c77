"""Requests to a made-up server with a queue, drawn from a seed: the figures behind the example reports."""

import heapq
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from beamline_client.load.target import FAILURES, Outcome

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

DURATION_S, WARM_UP_S = 30.0, 3.0
KINDS = ("beam 1, 1-8 words", "beam 4, 1-8 words", "beam 4, 9-20 words")
SLOTS = 12
"""Requests that the server works on at a time; the more there are, the slower it gets. It can do about 160 a second."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What became of n requests; arrays of shape [n], times in seconds, instants from the start of the run."""

    intended_s: Floats
    lag_s: Floats
    queue_s: Floats
    encode_s: Floats
    decode_s: Floats
    elsewhere_s: Floats
    first_piece_s: Floats
    """From the send; nan for those that are no streams."""
    tokens: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int64]
    """Index into KINDS."""
    outcome: npt.NDArray[np.int64]

    @property
    def from_send_s(self) -> Floats:
        """Time from the send to the end."""
        answered_s = self.queue_s + self.encode_s + self.decode_s + self.elsewhere_s
        ends_s = {Outcome.REJECTED: 0.002, Outcome.CANCELLED: 0.05}
        ended_s = np.select([self.outcome == outcome for outcome in ends_s], list(ends_s.values()), answered_s)
        return np.asarray(ended_s, dtype=np.float64)

    @property
    def latency_s(self) -> Floats:
        """Time from the intended send to the end."""
        return self.lag_s + self.from_send_s

    @property
    def done_s(self) -> Floats:
        """When they ended."""
        return self.intended_s + self.latency_s

    @property
    def answered(self) -> Flags:
        """Which were answered."""
        answered: Flags = self.outcome == Outcome.OK
        return answered

    @property
    def failed(self) -> Flags:
        """Which failed."""
        failed: Flags = np.isin(self.outcome, list(FAILURES))
        return failed

    @property
    def measured(self) -> Flags:
        """Which were meant to be sent after the warm-up."""
        return self.intended_s >= WARM_UP_S

    def slowed(self, factor: float) -> "Drawn":
        """The same requests, with all times that the server takes multiplied."""
        times = ("queue_s", "encode_s", "decode_s", "elsewhere_s", "first_piece_s")
        return replace(self, **{name: getattr(self, name) * factor for name in times})


def draw(seed: int, rate_per_s: float) -> Drawn:
    """Poisson arrivals over DURATION_S, worked on first come, first served."""
    rng = np.random.default_rng(seed)
    intended_s = np.cumsum(rng.exponential(1 / rate_per_s, int(DURATION_S * rate_per_s * 1.5) + 50))
    intended_s = intended_s[intended_s < DURATION_S]
    n = intended_s.size
    kind = rng.choice(len(KINDS), n, p=[0.5, 0.3, 0.2])
    tokens = np.where(kind == 2, rng.integers(12, 30, n), rng.integers(3, 12, n))
    outcome = np.full(n, int(Outcome.OK))
    outcome[rng.random(n) < 0.01] = Outcome.CANCELLED
    outcome[rng.random(n) < 0.003] = Outcome.REJECTED
    encode_s = rng.lognormal(np.log(0.004), 0.2, n)
    alone_s = (tokens + 1) * np.where(kind == 0, 0.004, 0.0055) * rng.lognormal(0, 0.1, n)
    queue_s, decode_s = _served(intended_s, encode_s, alone_s, outcome == Outcome.OK)
    return Drawn(
        intended_s=intended_s,
        lag_s=rng.exponential(0.0001, n),
        queue_s=queue_s,
        encode_s=encode_s,
        decode_s=decode_s,
        elsewhere_s=rng.lognormal(np.log(0.0015), 0.4, n),
        first_piece_s=np.where(rng.random(n) < 0.3, queue_s + encode_s + decode_s / (tokens + 1), np.nan),
        tokens=tokens,
        kind=kind,
        outcome=outcome,
    )


def _served(arrived_s: Floats, encode_s: Floats, alone_s: Floats, worked_on: Flags) -> tuple[Floats, Floats]:
    """How long they waited for a slot, and how long decoding took beside the others; all of shape [n]."""
    queue_s, decode_s = np.zeros(arrived_s.size), alone_s.copy()
    free_at_s = [0.0] * SLOTS
    for i in np.flatnonzero(worked_on).tolist():
        starts_s = max(heapq.heappop(free_at_s), float(arrived_s[i]))
        busy = sum(free_s > starts_s for free_s in free_at_s)
        queue_s[i] = starts_s - arrived_s[i]
        decode_s[i] *= 0.7 + 0.8 * busy / SLOTS
        heapq.heappush(free_at_s, starts_s + float(encode_s[i] + decode_s[i]))
    return queue_s, decode_s
