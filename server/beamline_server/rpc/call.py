"""What applies to the call that the current task handles, and how to end one."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_MARK = "_beamline_generates"
CallIsDead: Any = grpc.aio.InternalError
"""What sending raises when the caller is gone and gRPC has not cancelled the handler yet."""


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
    """Mark a servicer's method: its calls count as requests for generation, and take `max_duration_s` at most.

    It is given the bytes of the request.
    """
    setattr(method, _MARK, True)
    return method


def does_generate(behaviour: object) -> bool:
    """Whether a method is so marked."""
    return getattr(behaviour, _MARK, False) is True


async def end_call(
    context: Any, code: grpc.StatusCode, text: str, trailers: tuple[tuple[str, str | bytes], ...]
) -> None:
    """End a call with a status; if its caller is gone, nothing.

    grpcio keeps what it raises here for as long as the call's state lives, and raises it again when the handler
    returns. With its traceback it would refer to this call, and so to itself: the call and its request, which may be
    large, would stay until Python collects such circles.
    """
    try:
        await context.abort(code, text, trailers)
    except grpc.aio.AbortError as error:
        error.__traceback__ = None
    except CallIsDead:
        pass
