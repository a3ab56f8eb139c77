"""Do our counts and the server's agree? Each request ends once for us and at most once for the server.

How it ended for us says how it may have ended there:

    ok            ok
    rejected      queue_full
    error         invalid, not_found or error
    not_sent      nothing: the server has never heard of it
    others        anything or nothing

Others are those that we gave up and those whose connection failed: the server may have noticed or not, may have had the
answer on its way already, or may never have heard of the request.

With retries the server also counts the refused attempts before the last one, each of which has made it see a retry.
"""

from collections.abc import Mapping

from beamline_client.load.report import Books
from beamline_client.load.scrape import Samples, restarted
from beamline_client.load.target import Outcome

_REQUESTS = "beamline_requests_total"
_RETRIES = "beamline_retries_seen_total"
_CERTAIN: tuple[tuple[Outcome, tuple[str, ...]], ...] = (
    (Outcome.OK, ("ok",)),
    (Outcome.REJECTED, ("queue_full",)),
    (Outcome.ERROR, ("invalid", "not_found", "error")),
)
_UNCERTAIN = (Outcome.DEADLINE, Outcome.CANCELLED, Outcome.TRANSPORT)
_UNKNOWN_TO_US = ("unavailable", "deadline", "cancelled")
"""Ends there that nothing but an uncertain end of ours explains."""
_RETRIED = frozenset({"queue_full", "unavailable", "cancelled"})
"""Ends after which the client's gRPC sends a request again."""


def settled(samples: Samples) -> bool:
    """Whether the server has nothing in work, so that its counts are final.

    A page's counters are read before its rows: only those of the next page are final for certain.
    """
    return not any(samples.value(f"beamline_{rows}_rows") for rows in ("running", "queued"))


def balance(client: Mapping[Outcome, int], before: Samples, after: Samples, *, retries: bool) -> Books:
    """Compares our counts with what the server's have grown by.

    Args:
        client: All requests of the run, warm-up included, by how they ended.
        before: The server's page before the first of them.
        after: Its page when it has nothing in work any more.
        retries: Whether refused requests were sent again by gRPC.
    """
    ours = {outcome.label: count for outcome, count in sorted(client.items()) if count}
    ends = {end: round(count) for end, count in after.by_label(_REQUESTS, "outcome").items()}
    if not ends:
        reason = f"the page of metrics has no {_REQUESTS}: is it that of a Beamline server?"
        return Books(balanced=False, client=ours, server={}, mismatches=[reason])
    if restarted(before, after):
        reason = "the server was restarted during the run, so it has forgotten a part: look into its log"
        return Books(balanced=False, client=ours, server={}, mismatches=[reason])
    for end, count in before.by_label(_REQUESTS, "outcome").items():
        ends[end] -= round(count)
    attempts_again = round(after.total(_RETRIES) - before.total(_RETRIES)) if retries else 0
    mismatches = [*mismatches_of(client, ends, attempts_again), *_calls_without_end(before, after, sum(ends.values()))]
    server = {end: count for end, count in sorted(ends.items()) if count}
    return Books(balanced=not mismatches, client=ours, server=server, mismatches=mismatches)


def mismatches_of(client: Mapping[Outcome, int], server: Mapping[str, int], attempts_again: int = 0) -> list[str]:
    """What no combination of the allowed ends explains, in words; empty if the books balance.

    Args:
        client: Requests by how they ended for us.
        server: Requests by how they ended for the server.
        attempts_again: Attempts that the server saw after the first of a request.
    """
    found: list[str] = []
    surplus: dict[str, int] = {end: server.get(end, 0) for end in _UNKNOWN_TO_US}
    for outcome, ends in _CERTAIN:
        more = sum(server.get(end, 0) for end in ends) - client.get(outcome, 0)
        if more < 0:
            found.append(
                f"the server counted {-more} fewer {_either(ends)} than we saw: "
                "are these the metrics of one server of several?"
            )
        surplus[ends[-1]] = max(more, 0)
    uncertain = sum(client.get(outcome, 0) for outcome in _UNCERTAIN)
    # Attempts before the last were refused; only so many of the surplus as were can be theirs.
    explained_by_retries = min(attempts_again, sum(surplus[end] for end in _RETRIED))
    excess = sum(surplus.values()) - explained_by_retries - uncertain
    if excess > 0:
        found.append(_too_many(excess, surplus, uncertain, attempts_again))
    return found


def _too_many(excess: int, surplus: Mapping[str, int], uncertain: int, attempts_again: int) -> str:
    names = {ends[-1]: _either(ends) for _, ends in _CERTAIN}
    more = " and ".join(f"{count} more {names.get(end, end)}" for end, count in surplus.items() if count)
    known = [f"the {uncertain} that we gave up or lost"] if uncertain else []
    known += [f"the {attempts_again} sent again"] if attempts_again else []
    explained = f", {excess} more than {' and '.join(known)} explain" if known else ""
    return f"the server counted {more} than we saw{explained}: did others use it during the run?"


def _either(ends: tuple[str, ...]) -> str:
    return " or ".join(ends)


def _calls_without_end(before: Samples, after: Samples, ended: int) -> list[str]:
    """Where the server's own series disagree: calls that came against requests that ended."""
    started = _calls(after, "started") - _calls(before, "started")
    handled = _calls(after, "handled") - _calls(before, "handled")
    found = []
    if started > handled:
        found.append(f"calls without an end when the server was last asked: {started - handled}; is it still busy?")
    if handled != ended:
        found.append(f"the server counted {ended} outcomes, but the ends of {handled} calls: please report this")
    return found


def _calls(samples: Samples, what: str) -> int:
    methods = samples.by_label(f"grpc_server_{what}_total", "grpc_method")
    return round(sum(count for method, count in methods.items() if method.startswith("Generate")))
