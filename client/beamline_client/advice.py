"""What to tell a person about a failed call: one line that says what to do next, and the exit status."""

from beamline_client.errors import (
    BeamlineError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
    Unavailable,
)

EXIT_SERVER_FAILED = 1
EXIT_BAD_USAGE = 2


def exit_status(error: BeamlineError) -> int:
    """The exit status: 2 when the caller must change something, 1 when the server or the way to it failed."""
    return EXIT_BAD_USAGE if isinstance(error, InvalidRequest | NotFound) else EXIT_SERVER_FAILED


def advice(error: BeamlineError, *, target: str, timeout_s: float, more_time: str = "", less_work: str = "") -> str:
    """One line for the person who ran a command that called a server.

    Args:
        error: What the call raised.
        target: Where the server was called.
        timeout_s: How long the call had, in seconds.
        more_time: What the person can do to give it more, by the command's flags; empty for nothing.
        less_work: The same, to ask for less at once.
    """
    match error:
        case InvalidRequest() | NotFound():
            text = f"the request is not valid: {error}"
        case Unavailable(hint=None):
            text = (
                f"cannot reach a server at {target} ({error.message}): "
                "is it running and ready? Start one with `beamline serve`, or name another with --server"
            )
        case Unavailable():
            text = (
                f"cannot reach a server at {target}: {error.hint}. "
                f"Start one with `beamline serve`, or name another with --server ({error.message})"
            )
        case Overloaded():
            text = f"the server at {target} is busy: {_any_of(error.next_step, less_work)}"
        case DeadlineExceeded():
            remedies = _any_of(more_time, less_work, "check --server")
            text = f"no answer from {target} within {timeout_s:g} s: {'; '.join(filter(None, (remedies, error.hint)))}"
        case Cancelled():
            text = f"the call to {target} was cancelled: try again"
        case ServerError():
            text = f"the server at {target} failed ({error.message}): {error.next_step}"
        case _:
            text = f"what answers at {target} does not keep to the API of Beamline ({error.message}): check --server"
    return " ".join(text.split())


def _any_of(*remedies: str) -> str:
    return ", or ".join(filter(None, remedies))
