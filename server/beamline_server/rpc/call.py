"""The call that the current task handles: when it came, until when it may take, and whether it asks for generation."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_MARK = "_beamline_generates"


@dataclass(frozen=True, slots=True)
class Call:
    """What applies to one call, whatever it asks for.

    Attributes:
        arrived_s: When it arrived, in seconds of the server's monotonic clock.
        deadline_s: When it must have ended, on the same clock.
        caller: Who makes it.
    """

    arrived_s: float
    deadline_s: float
    caller: str = ""


current_call: ContextVar[Call] = ContextVar("current_call")
"""Set for every call, of whatever method, before its handler runs."""


def generates(method: FunctionT) -> FunctionT:
    """Mark a servicer's method: its calls count as requests for generation, and take `max_duration_s` at most."""
    setattr(method, _MARK, True)
    return method


def does_generate(behaviour: object) -> bool:
    """Whether a method is so marked."""
    return getattr(behaviour, _MARK, False) is True
