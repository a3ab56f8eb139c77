"""Which batching is best for a peer: candidates are tried at rates just above the best one's, one after the other.

Pure: what to try next follows from what was tried. A full search for the highest rate of every candidate would take
hours; here a candidate that is no better is known after a run or two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

STEP = 1.05
"""A candidate is better if it meets the SLO at so many times the rate of the best one so far."""
ATTEMPTS = 2
"""A candidate is given up when it has missed so often in a row: a machine can have a bad moment."""

BATCHES = (16, 32, 64)
DELAYS_MS = (2.0, 5.0, 10.0)
FIRST = (32, 5.0)
PARTS = (8, 16)
AT_A_TIME = (4, 8, 16, 64)


@dataclass(frozen=True, slots=True)
class Batching:
    """How a server is started.

    Attributes:
        max_batch: Requests that start together; with continuous batching, that run at a time.
        max_delay_ms: How long the first of them waits; None is continuous batching, where none does.
        workers: Batches at a time.
        part: Sentences that CTranslate2 gets at once, those of similar lengths together; None is the whole batch.
        isa: Instruction set that CTranslate2 is told to use; None is its choice.
    """

    max_batch: int
    max_delay_ms: float | None
    workers: int
    part: int | None = None
    isa: str | None = None

    def __str__(self) -> str:
        delay = self.max_delay_ms
        words = [f"{self.max_batch} at a time" if delay is None else f"{self.max_batch} × {delay:g} ms"]
        words += [f"{self.workers} workers"] if self.workers > 1 else []
        words += [f"parts of {self.part}"] if self.part else []
        words += [self.isa] if self.isa else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Try:
    """A candidate at a rate, and whether it met the SLO."""

    batching: Batching
    rate_per_s: float
    met: bool
    p99_ms: float | None = None


def best(tries: Sequence[Try]) -> Try:
    """The one that met the highest rate."""
    return max((each for each in tries if each.met), key=lambda each: each.rate_per_s)


def next_try(candidates: Sequence[Batching], tries: Sequence[Try]) -> Try | None:
    """What to try next, before it is known whether it is met; None when all candidates are given up.

    Each in turn climbs from the best rate until it misses. At least one try must have been met.
    """
    for candidate in candidates:
        own = [each.met for each in tries if each.batching == candidate]
        if True in own[-ATTEMPTS:] or len(own) < ATTEMPTS:
            return Try(candidate, best(tries).rate_per_s * STEP, met=False)
    return None


def first(workers: int, *, continuous: bool = False) -> Batching:
    """Where a tuning begins; for continuous batching, with what a server does by itself."""
    batch, delay_ms = FIRST
    return Batching(batch, None if continuous else delay_ms, workers)


def rounds(*, continuous: bool = False, ct2: bool = False, isas: Sequence[str] = ()) -> list[str]:
    """The rounds of a tuning, whose candidates are made from the best of the round before; see `candidates`."""
    if continuous:
        return ["at a time"]
    return [*(["parts"] if ct2 else []), *(["isa"] if ct2 and isas else []), "grid", "workers"]


def candidates(name: str, leader: Batching, isas: Sequence[str] = ()) -> Iterator[Batching]:
    """The candidates of a round but for the leader.

    Args:
        name: One of `rounds`.
        leader: The best so far.
        isas: Instruction sets to tell CTranslate2.
    """
    match name:
        case "at a time":
            yield from (replace(leader, max_batch=count) for count in AT_A_TIME)
        case "parts":
            yield from (replace(leader, part=part) for part in PARTS)
        case "isa":
            yield from (replace(leader, isa=isa) for isa in isas)
        case "grid":
            grid = [replace(leader, max_batch=batch, max_delay_ms=ms) for batch in BATCHES for ms in DELAYS_MS]
            yield from (each for each in grid if each != leader)
        case "workers":
            yield replace(leader, workers=2 * leader.workers)
        case _:
            raise ValueError(f"there is no round {name}")
