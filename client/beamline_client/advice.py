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


def advice(error: BeamlineError, *, target: str, timeout_s: float) -> str:
    """One line for the person who called the server at `target` with `timeout_s` seconds per call."""
    match error:
        case InvalidRequest() | NotFound():
            text = f"the request is not valid: {error}"
        case Unavailable():
            text = (
                f"cannot reach a server at {target} ({error}): "
                "is it running and ready? Start one with `beamline serve`, or name another with --server"
            )
        case Overloaded(retry_after_s=None):
            text = f"the server at {target} is busy: try again later, or lower --concurrency and --batch-size"
        case Overloaded():
            text = (
                f"the server at {target} is busy: try again in {error.retry_after_s:.1f} s, "
                "or lower --concurrency and --batch-size"
            )
        case DeadlineExceeded():
            text = f"no answer from {target} within {timeout_s:g} s: raise --timeout, or lower --batch-size"
        case Cancelled():
            text = f"the call to {target} was cancelled: try again"
        case ServerError():
            ids = [f"error id {error.error_id}"] if error.error_id else []
            ids += [f"request id {error.request_id}"] if error.request_id else []
            text = f"the server at {target} failed ({error}): tell its operator ({', '.join(ids) or 'no id known'})"
        case _:
            text = f"what answers at {target} does not keep to the API of Beamline ({error}): check --server"
    return " ".join(text.split())
