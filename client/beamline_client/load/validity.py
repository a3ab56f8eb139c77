"""Whether a run may be believed: the generator judges itself."""

from collections.abc import Iterable, Mapping

from beamline_client.load.report import GeneratorProcess
from beamline_client.load.target import Outcome

LAG_ALLOWED_MS = 1.0
LAG_ALLOWED_SHARE = 0.02
"""The lag's p99 may be a millisecond, or this share of the median latency."""
CPU_ALLOWED = 0.8
"""Share of its core that a process may use; beyond, its own queue starts to show in the latencies."""


def allowed_lag_ms(median_ms: float | None) -> float:
    """What the p99 of the generator's lag may be, in milliseconds, at this median latency."""
    return max(LAG_ALLOWED_MS, LAG_ALLOWED_SHARE * (median_ms or 0.0))


def objections(
    *,
    lag_p99_ms: float | None,
    median_ms: float | None,
    processes: Iterable[GeneratorProcess],
    outcomes: Mapping[Outcome, int],
    max_in_flight: int,
    lost: int = 0,
) -> list[str]:
    """Why the figures may be the generator's instead of the server's; empty if they are not.

    Args:
        lag_p99_ms: 99th percentile of actual less intended send; None in a closed loop.
        median_ms: Median latency from the intended send; None without answers.
        processes: The generator's.
        outcomes: Of all requests.
        max_in_flight: The most requests that the generator allowed itself.
        lost: Requests of the schedule whose end is not known although the run came to its own.
    """
    found = []
    allowed_ms = allowed_lag_ms(median_ms)
    if lag_p99_ms is not None and lag_p99_ms > allowed_ms:
        found.append(
            f"the generator sent late: its lag has a p99 of {lag_p99_ms:.2f} ms, allowed are {allowed_ms:.2f} ms; "
            "give it cores of its own (--pin, or another machine), or lower the rate"
        )
    found += [
        f"{process.name} used {process.cpu_share:.0%} of its core, allowed are {CPU_ALLOWED:.0%}; "
        "use more processes (--workers), or lower the rate"
        for process in processes
        if process.cpu_share > CPU_ALLOWED
    ]
    if missed := outcomes.get(Outcome.NOT_SENT, 0):
        found.append(
            f"{missed} requests were not sent, for {max_in_flight} were in flight; "
            "raise --max-in-flight, or lower the rate or the deadlines"
        )
    if lost:
        found.append(f"{lost} requests have no record: a fault of the load generator, please report it")
    return found
