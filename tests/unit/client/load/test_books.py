"""Books balance for every way in which our requests may have ended at the server, and for no other."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from beamline_client.load.books import balance, mismatches_of, settled
from beamline_client.load.scrape import Samples, parse
from beamline_client.load.target import Outcome
from beamline_server.engine.workers import EngineLoad
from beamline_server.metrics import MethodName, Metrics
from beamline_server.metrics import Outcome as End

NOTHING = None
ANYTHING = (*(end.value for end in End), NOTHING)
ENDS: dict[Outcome, tuple[str | None, ...]] = {
    Outcome.OK: ("ok",),
    Outcome.REJECTED: ("queue_full",),
    Outcome.ERROR: ("invalid", "not_found", "error"),
    Outcome.NOT_SENT: (NOTHING,),
    Outcome.DEADLINE: ANYTHING,
    Outcome.CANCELLED: ANYTHING,
    Outcome.TRANSPORT: ANYTHING,
}
"""How a request that ended so for us may have ended for the server."""
CERTAIN = (Outcome.OK, Outcome.REJECTED, Outcome.ERROR, Outcome.NOT_SENT)
REFUSALS = ("queue_full", "unavailable", "cancelled")


@dataclass(frozen=True)
class Sides:
    """The same requests as the two sides counted them."""

    client: Counter[Outcome]
    server: Counter[str]
    attempts_again: int


@st.composite
def sides(draw: st.DrawFn, outcomes: tuple[Outcome, ...] = tuple(Outcome), *, retries: bool = False) -> Sides:
    client: Counter[Outcome] = Counter()
    server: Counter[str] = Counter()
    attempts_again = 0
    for outcome in draw(st.lists(st.sampled_from(outcomes), max_size=20)):
        client[outcome] += 1
        end = draw(st.sampled_from(ENDS[outcome]))
        if end is not NOTHING:
            server[end] += 1
            if retries:
                # Attempts before the last, some of which have not come as far as the server's counters.
                again = draw(st.integers(0, 2))
                attempts_again += again
                server.update(draw(st.lists(st.sampled_from(REFUSALS), max_size=again)))
    return Sides(client, server, attempts_again)


@given(sides())
def test_every_allowed_end_balances(sides: Sides) -> None:
    assert mismatches_of(sides.client, sides.server) == []


@given(sides(retries=True))
def test_so_does_every_refused_attempt_before_the_last(sides: Sides) -> None:
    assert mismatches_of(sides.client, sides.server, sides.attempts_again) == []


@given(sides(CERTAIN), st.sampled_from(End))
def test_one_request_more_than_ours_does_not(sides: Sides, end: End) -> None:
    assert len(mismatches_of(sides.client, sides.server + Counter([end.value]))) == 1


@given(sides(CERTAIN).filter(lambda sides: sides.server), st.data())
def test_one_request_less_than_ours_does_not(sides: Sides, data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(sorted(sides.server)))

    assert len(mismatches_of(sides.client, sides.server - Counter([lost]))) == 1


@given(sides(), st.sampled_from(["ok", "deadline", "error"]))
def test_what_we_gave_up_explains_no_more_than_itself(sides: Sides, end: str) -> None:
    least = Counter({"ok": sides.client[Outcome.OK], "queue_full": sides.client[Outcome.REJECTED]})
    least["error"] = sides.client[Outcome.ERROR]
    uncertain = sides.client.total() - sum(sides.client[outcome] for outcome in CERTAIN)

    assert mismatches_of(sides.client, least + Counter({end: uncertain})) == []
    assert len(mismatches_of(sides.client, least + Counter({end: uncertain + 1}))) == 1


@given(sides(CERTAIN, retries=True), st.sampled_from(["ok", "deadline", "error", "invalid"]))
def test_retries_explain_refusals_only(sides: Sides, end: str) -> None:
    assert mismatches_of(sides.client, sides.server + Counter([end]), sides.attempts_again + 5)


@given(sides(CERTAIN), st.sampled_from(REFUSALS), st.integers(0, 5))
def test_retries_explain_no_more_than_their_number(sides: Sides, end: str, again: int) -> None:
    assert mismatches_of(sides.client, sides.server + Counter({end: again}), again) == []
    assert mismatches_of(sides.client, sides.server + Counter({end: again + 1}), again)


@pytest.mark.parametrize(
    ("client", "server", "again", "words"),
    [
        ({}, {"ok": 12}, 0, "the server counted 12 more ok than we saw: did others use it during the run?"),
        (
            {Outcome.OK: 5},
            {"ok": 2},
            0,
            "the server counted 3 fewer ok than we saw: are these the metrics of one server of several?",
        ),
        (
            {Outcome.CANCELLED: 2, Outcome.REJECTED: 1},
            {"cancelled": 4, "queue_full": 3},
            1,
            "the server counted 4 more cancelled and 2 more queue_full than we saw, 3 more than the 2 that we gave up "
            "or lost and the 1 sent again explain: did others use it during the run?",
        ),
    ],
)
def test_a_mismatch_says_what_may_be_behind_it(
    client: dict[Outcome, int], server: dict[str, int], again: int, words: str
) -> None:
    assert mismatches_of(client, server, again) == [words]


class Server:
    """A server's counters, and calls that end as the test says."""

    def __init__(self) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.load = EngineLoad(0, 0, 0, 0, 64, 512, None)
        self.metrics.watch_load(lambda: self.load, clock=lambda: 0.0)
        self._method = self.metrics.method(MethodName("beamline.v1.GenerationService", "Generate", "unary"))
        self._info = self.metrics.method(MethodName("beamline.v1.GenerationService", "GetInfo", "unary"))

    def samples(self) -> Samples:
        return parse(generate_latest(self.metrics.registry).decode())

    def call(self, end: End | None) -> None:
        self._method.started()
        if end is not None:
            self._method.handled("OK" if end is End.OK else "UNKNOWN", 0.1)
            self.metrics.request_ended(end, 0.1)

    def info(self) -> None:
        self._info.started()
        self._info.handled("OK", 0.1)


def test_only_what_was_counted_during_the_run_is_compared() -> None:
    server = Server()
    server.call(End.OK)
    server.call(End.ERROR)
    before = server.samples()
    server.info()
    server.call(End.OK)
    server.call(End.CANCELLED)

    books = balance({Outcome.OK: 1, Outcome.CANCELLED: 1, Outcome.ERROR: 0}, before, server.samples(), retries=False)

    assert books.balanced
    assert books.client == {"ok": 1, "cancelled": 1}
    assert books.server == {"ok": 1, "cancelled": 1}
    assert books.mismatches == []


def test_retries_count_only_where_they_were_allowed() -> None:
    server = Server()
    before = server.samples()
    server.call(End.QUEUE_FULL)
    server.metrics.retry_seen()
    server.call(End.OK)
    after = server.samples()

    assert balance({Outcome.OK: 1}, before, after, retries=True).balanced
    assert not balance({Outcome.OK: 1}, before, after, retries=False).balanced


def test_a_call_without_an_end_is_told() -> None:
    server = Server()
    before = server.samples()
    server.call(None)

    books = balance({Outcome.CANCELLED: 1}, before, server.samples(), retries=False)

    assert not books.balanced
    assert books.mismatches == ["calls without an end when the server was last asked: 1; is it still busy?"]


def test_a_call_that_the_server_ended_twice_is_told() -> None:
    server = Server()
    before = server.samples()
    server.call(End.OK)
    server.metrics.request_ended(End.CANCELLED, 0.1)

    books = balance({Outcome.OK: 1, Outcome.CANCELLED: 1}, before, server.samples(), retries=False)

    assert books.mismatches == ["the server counted 2 outcomes, but the ends of 1 calls: please report this"]


def test_a_restarted_server_has_no_books() -> None:
    old = Server()
    old.call(End.OK)

    books = balance({Outcome.OK: 1}, old.samples(), Server().samples(), retries=False)

    assert not books.balanced
    assert "restarted" in books.mismatches[0]


def test_another_programs_page_has_no_books() -> None:
    page = parse("node_load1 0.5\n")

    books = balance({Outcome.OK: 1}, page, page, retries=False)

    assert not books.balanced
    assert books.mismatches == ["the page of metrics has no beamline_requests_total: is it that of a Beamline server?"]


@pytest.mark.parametrize(
    ("queued_rows", "running_rows", "is_settled"), [(0, 0, True), (4, 0, False), (0, 4, False), (4, 4, False)]
)
def test_a_server_without_rows_is_settled(queued_rows: int, running_rows: int, is_settled: bool) -> None:
    server = Server()
    server.load = EngineLoad(1, queued_rows, 1, running_rows, 64, 512, None)

    assert settled(server.samples()) == is_settled


def test_there_is_nothing_to_wait_for_on_another_programs_page() -> None:
    assert settled(parse("node_load1 0.5\n"))
