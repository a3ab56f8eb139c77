"""A core stepped by hand, for tests: everybody gets the answer that they would get alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from beamline_server.engine.admission import Capacity
from beamline_server.engine.observer import NullObserver, StepObserver
from beamline_server.engine.request import (
    Completed,
    Event,
    Failed,
    GenerationRequest,
    Piece,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.step import EngineCore
from doubles.engine import (
    Faults,
    ManualClock,
    RandomTable,
    TableBackend,
    run_alone,
    table_rules,
)
from doubles.memory import Tokens

RULES = table_rules(8)
TABLE = RandomTable(8)


@dataclass
class Bench:
    """A core with what it stands on. One step takes one second."""

    core: EngineCore
    backend: TableBackend
    clock: ManualClock

    def step(self) -> list[Event]:
        """A step, and a second; what is held is recounted."""
        events = self.core.step()
        self.core.check()
        self.clock.advance(1.0)
        return events

    def finish(self) -> dict[RequestId, Completed | Failed]:
        """Step until idle; the outcomes from now on."""
        events: list[Event] = []
        while not self.core.idle:
            events += self.step()
        return outcomes(events)


def bench(
    *,
    rows: int = 64,
    slots: int = 1 << 16,
    encode_tokens: int = 1024,
    faults: Faults | None = None,
    observer: StepObserver | None = None,
    make_backend: Callable[..., TableBackend] = TableBackend,
) -> Bench:
    """A core on a table.

    Args:
        rows: At a time.
        slots: Of its caches.
        encode_tokens: To encode per step at most.
        faults: Of the backend.
        observer: Is told of steps.
        make_backend: Another kind of backend.
    """
    backend, clock = make_backend(TABLE, RULES, faults=faults), ManualClock()
    core = EngineCore(
        backend,
        RULES,
        Capacity(rows, slots),
        clock=clock,
        observer=observer or NullObserver(),
        encode_tokens=encode_tokens,
    )
    return Bench(core, backend, clock)


def request(
    number: int,
    *,
    beams: int = 1,
    tokens: int = 6,
    source_tokens: int = 3,
    deadline: float | None = None,
    stream: bool = False,
) -> GenerationRequest:
    """A request that generates exactly so many tokens; its source tells it from all others."""
    options = SearchOptions(beam_size=beams, n_best=beams, min_new_tokens=tokens, max_new_tokens=tokens)
    return GenerationRequest(RequestId(number), source_of(number, source_tokens), options, deadline, stream)


def source_of(number: int, length: int) -> Tokens:
    """The source of a request: of that length, and no other's."""
    return (*range(length - 1), number)


def outcomes(events: Sequence[Event]) -> dict[RequestId, Completed | Failed]:
    """How requests ended; AssertionError if one ended twice."""
    ends = [event for event in events if not isinstance(event, Piece)]
    assert len({end.id for end in ends}) == len(ends), "a request has more than one outcome"
    return {end.id: end for end in ends}


def pieces(events: Sequence[Event], number: int) -> Tokens:
    """The tokens that were streamed of a request."""
    return tuple(token for e in events if isinstance(e, Piece) and e.id == number for token in e.tokens)


def alone(asked: GenerationRequest) -> Completed:
    """What a request gets on an engine of its own."""
    outcome = run_alone(TableBackend(TABLE, RULES), RULES, asked)
    assert isinstance(outcome, Completed)
    return outcome


def assert_as_alone(outcome: Completed | Failed, asked: GenerationRequest) -> None:
    """AssertionError unless it is what the request gets alone."""
    assert isinstance(outcome, Completed)
    assert outcome.hypotheses == alone(asked).hypotheses


def failure(outcome: Completed | Failed) -> Exception:
    """The error of a request that failed."""
    assert isinstance(outcome, Failed)
    return outcome.error
