"""When to ask a server again that is not ready yet."""

from dataclasses import dataclass

from beamline_client.errors import BeamlineError, DeadlineExceeded, Overloaded, Unavailable

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
_DOUBLINGS = 4  # enough to reach the longest pause


@dataclass(frozen=True, slots=True)
class ReadinessWait:
    """One wait for one server: until when, and how long to pause between two attempts."""

    target: str
    """The server's address, for the error."""
    started_s: float
    """When the wait began, on the caller's monotonic clock, in seconds."""
    timeout_s: float
    """How long the wait may take, in seconds."""

    def remaining_s(self, now_s: float) -> float:
        """How much time is left, in seconds; not below 0."""
        return max(0.0, self.started_s + self.timeout_s - now_s)

    def pause_s(self, error: BeamlineError, *, attempt: int, now_s: float) -> float:
        """How long to wait after a failed attempt before the next one, in seconds.

        Args:
            error: What the attempt raised.
            attempt: Its number: 0, 1, …
            now_s: The time on the clock of `started_s`.

        Raises:
            Unavailable: No time is left.
            BeamlineError: `error` itself, when waiting cannot help.
        """
        if not isinstance(error, Unavailable | Overloaded | DeadlineExceeded):
            raise error
        pause_s = min(_FIRST_PAUSE_S * (1 << min(attempt, _DOUBLINGS)), _LONGEST_PAUSE_S)
        if pause_s >= self.remaining_s(now_s):
            reason = "nothing answers there" if isinstance(error, DeadlineExceeded) else error.message
            message = f"{self.target} did not become ready within {self.timeout_s:g} s: {reason}"
            raise Unavailable(message, request_id=error.request_id, hint=error.hint) from error
        return pause_s
