"""The call that the current task handles: who asks, and until when."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """What applies to one request for generation, whatever it asks for.

    Attributes:
        arrived_s: When it arrived, in seconds of the server's monotonic clock.
        deadline_s: When it must have ended, on the same clock.
    """

    arrived_s: float
    deadline_s: float


current_call: ContextVar[Call] = ContextVar("current_call")
"""Set for every request for generation before its handler runs."""
