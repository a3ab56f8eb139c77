"""What is put under load, as the generator sees it: three methods, so that other servers can be measured too."""

import enum
from dataclasses import dataclass
from typing import Protocol

from beamline_client.results import SearchOptions


class Outcome(enum.IntEnum):
    """How a request ended, for its caller."""

    OK = 0
    """Answered."""
    REJECTED = 1
    """Refused because the server is full."""
    DEADLINE = 2
    """Not answered within its deadline."""
    CANCELLED = 3
    """Given up by us, as planned."""
    TRANSPORT = 4
    """The connection failed, or the server closed it or went away."""
    ERROR = 5
    """Any other answer that is none: an invalid request, a fault of the server."""
    NOT_SENT = 6
    """Not sent: the generator had too many in flight, or was interrupted."""

    @property
    def label(self) -> str:
        """The name in reports."""
        return self.name.lower()


FAILURES = frozenset({Outcome.REJECTED, Outcome.DEADLINE, Outcome.TRANSPORT, Outcome.ERROR})
"""Outcomes that count as errors: everything but answers and what we ourselves gave up or did not send."""


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask. The same question has the same right answer, whenever and beside whatever it is asked."""

    number: int
    """Of this question among all of a workload."""
    source: str
    search: SearchOptions
    stream: bool
    """Whether the answer is asked for piece by piece."""
    bucket: str
    """The length bucket it was drawn from, as the user named it."""
    references: tuple[str, ...] = ()
    """Right answers, for BLEU and chrF; may be empty."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question, and how patient its caller is."""

    question: Question
    deadline_s: float
    """Time to the deadline, in seconds from the send."""
    cancel_after_s: float | None
    """When the caller gives up, in seconds from the send; None is never."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request."""

    outcome: Outcome
    code: int
    """The transport's status, as gRPC numbers them."""
    message: str = ""
    """Why it failed, in words."""
    texts: tuple[str, ...] = ()
    """The hypotheses, best first."""
    tokens: int = 0
    """Tokens of the best hypothesis."""
    first_piece_s: float | None = None
    """From the send to the first message of a stream, in seconds."""
    queue_s: float | None = None
    """Where the server says that the time went, in seconds; None when it does not say."""
    encode_s: float | None = None
    decode_s: float | None = None
    steps: int = 0
    """Decoder steps."""


class TargetUnusable(Exception):
    """The target cannot be put under load; the text is one line that says why and what to do."""


class Target(Protocol):
    """A server under load, in one generator process. Used within one event loop."""

    async def prepare(self) -> None:
        """Connects, so that the first request does not pay for it.

        Raises:
            TargetUnusable: It cannot.
        """

    async def call(self, request: Request) -> Answer:
        """Sends the request and waits for its end. Raises nothing but asyncio.CancelledError."""

    async def close(self) -> None:
        """Disconnects."""


class TargetFactory(Protocol):
    """Makes a target in a generator process; picklable, for it travels there."""

    def __call__(self, questions: tuple[Question, ...]) -> Target:
        """A target for a workload with these questions; question i has number i."""
