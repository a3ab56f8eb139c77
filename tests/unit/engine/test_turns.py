"""Callers with few rows also go in steps of their own, and everybody gets the answer that they would get alone."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import ENCODE_TOGETHER
from beamline_server.engine.backend import Bucket, Cache, Encoded
from beamline_server.engine.request import Completed, Failed, GenerationRequest, Priority, RequestId
from beamline_server.engine.table import Table
from beamline_server.engine.turns import Turns, accounts_with_few
from doubles.core import Bench, assert_as_alone, bench, outcomes, request
from doubles.engine import TableBackend


class ApartCache:
    """A cache in which every sequence is in a bucket of its own, so that just those go who are to go."""

    def __init__(self, backend: "ApartBackend") -> None:
        self._backend = backend
        self._of: dict[int, Cache] = {}

    def enter(self, index: int, encoded: Encoded, number: int) -> None:
        self._of[index] = self._backend.cache_of_one()
        self._of[index].enter(index, encoded, number)

    def leave(self, index: int) -> None:
        self._of.pop(index).leave(index)

    def place(self, table: Table, going: Sequence[int] | None = None) -> Sequence[Bucket]:
        return [bucket for index in (self._of if going is None else going) for bucket in self._of[index].place(table)]


class ApartBackend(TableBackend):
    """A backend with such a cache."""

    def new_cache(self) -> Cache:
        return ApartCache(self)

    def cache_of_one(self) -> Cache:
        return super().new_cache()


def of(caller: str, asked: GenerationRequest) -> GenerationRequest:
    return replace(asked, caller=caller)


def apart() -> Bench:
    return bench(make_backend=ApartBackend)


HEAVY = [of("heavy", request(number, beams=16, tokens=20)) for number in range(3)]
POLITE = of("polite", request(9, beams=4, tokens=8))


def test_who_has_few_rows_goes_alone_as_long_as_there_is_credit() -> None:
    running = apart()
    running.core.accept(HEAVY)
    running.core.step()
    running.core.accept([POLITE])
    before, steps = len(running.backend.trace), 0
    while POLITE.id not in outcomes(running.core.step()):
        steps += 1
    assert steps == 7
    assert [step.sources for step in running.backend.trace[before:]] == 8 * [(POLITE.source,)]
    for number, outcome in running.finish().items():
        assert_as_alone(outcome, HEAVY[number])


def test_in_the_long_run_they_have_half_of_the_time() -> None:
    turns, seconds = Turns(), {True: 0.0, False: 0.0}
    for _ in range(1000):
        few = turns.of_few
        took = 0.0015 if few else 0.012
        turns.took(took, was_of_few=few)
        seconds[few] += took
    assert seconds[True] < seconds[False] + 0.12
    assert seconds[True] > 0.9 * seconds[False]


def test_credit_is_saved_up_to_a_bound() -> None:
    turns = Turns()
    for _ in range(100):
        turns.took(1.0, was_of_few=False)
    turns.took(0.11, was_of_few=True)
    assert not turns.of_few
    turns.took(0.02, was_of_few=False)
    assert turns.of_few


def with_few(held: dict[str, int]) -> set[str]:
    accounts = {(caller, Priority.NORMAL): rows for caller, rows in held.items()}
    return {caller for caller, _ in accounts_with_few(accounts)}


def test_all_go_where_nobody_has_far_more_than_others() -> None:
    assert with_few({}) == set()
    assert with_few({"a": 128}) == set()
    assert with_few({"a": 16, "b": 16, "c": 16}) == set()
    assert with_few({"a": 4, "b": 8, "c": 16, "d": 32}) == set()
    assert with_few({"a": 4, "b": 15}) == set()


def test_who_has_a_quarter_of_what_others_have_has_few() -> None:
    assert with_few({"a": 4, "b": 16}) == {"a"}
    assert with_few({"a": 112, "b": 4, "c": 5}) == {"b", "c"}
    assert with_few({"a": 58, "b": 58, "c": 4}) == {"c"}
    # Together they would have more than a quarter: a step of theirs would be no short one.
    assert with_few({"heavy": 56, **{str(number): 4 for number in range(5)}}) == set()


@given(st.dictionaries(st.text(max_size=2), st.integers(1, 128), max_size=12))
def test_whoever_has_few_has_less_than_all_others(held: dict[str, int]) -> None:
    few = with_few(held)
    others = [rows for caller, rows in held.items() if caller not in few]
    if few:
        assert 4 * sum(held[caller] for caller in few) <= sum(held.values())
        assert 4 * max(held[caller] for caller in few) <= min(others)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 16), st.integers(1, 12), st.integers(0, 6)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([0.0, 0.01, 0.05, 1.0]),
)
def test_answers_do_not_depend_on_turns(coming: list[tuple[str, int, int, int]], seconds_of_a_step: float) -> None:
    running = apart()
    found: dict[RequestId, Completed | Failed] = {}
    asked = [of(caller, request(i, beams=beams, tokens=tokens)) for i, (caller, beams, tokens, _) in enumerate(coming)]
    step = 0
    while step <= 6 or not running.core.idle:
        running.core.accept([one for one, (*_, at) in zip(asked, coming, strict=True) if at == step])
        found |= outcomes(running.core.step())
        running.core.check()
        running.clock.advance(seconds_of_a_step)
        step += 1
    assert len(found) == len(asked)
    for one in asked:
        assert_as_alone(found[one.id], one)


def test_who_comes_for_the_first_time_does_not_wait_for_those_who_hold_everything() -> None:
    running = bench(rows=64, make_backend=ApartBackend)
    running.core.accept([*HEAVY, of("heavy", request(3, beams=16, tokens=20)), of("heavy", request(4, tokens=20))])
    running.core.step()
    assert running.core.running_rows == 64
    running.core.accept([POLITE])
    running.core.step()
    running.core.check()
    assert (running.core.running_rows, running.core.queued_requests) == (68, 1)


def test_where_all_go_nevertheless_nobody_is_kept_from_starting_for_long() -> None:
    """Credit is used up by steps that are meant for few, also on a backend that lets all go."""
    running = bench(rows=64)
    running.core.accept(HEAVY)
    running.core.step()
    later = [of("heavy", request(number, beams=4, tokens=2)) for number in (10, 11)]
    running.core.accept([of("polite", request(9, beams=1, tokens=30)), *later])
    steps, ended = 0, set[int]()
    while not ended >= {10, 11}:
        ended |= set(outcomes(running.core.step()))
        running.clock.advance(0.02)
        steps += 1
    assert steps < 12  # those of the large caller that run already end at the twentieth


def test_batch_requests_do_not_go_before_those_of_a_large_caller() -> None:
    running = bench(rows=64, make_backend=ApartBackend)
    running.core.accept(HEAVY)
    running.core.step()
    batch = [replace(of("other", request(number, beams=4, tokens=4)), priority=Priority.BATCH) for number in (20, 21)]
    running.core.accept([*batch, of("heavy", request(10, beams=16, tokens=4))])
    before = len(running.backend.trace)
    running.core.step()
    sources = [source for step in running.backend.trace[before:] for source in step.sources]
    assert sources == [*(heavy.source for heavy in HEAVY), request(10).source]


def test_no_more_are_encoded_ahead_than_go_together() -> None:
    """Newcomers who start one by one do not have ever more encoded of those who find no room."""
    running = bench(rows=64)
    for caller, first in (("a", 0), ("b", 50)):
        running.core.accept(of(caller, request(first + i, beams=beams, tokens=30)) for i, beams in enumerate((16, 14)))
    running.core.step()
    for caller, first in (("a", 10), ("b", 60)):
        running.core.accept(of(caller, request(first + i, beams=16)) for i in range(20))
    for number in range(4):
        running.core.accept([of(f"c{number}", request(100 + number))])
        running.core.step()
        assert running.core.running_requests == 5 + number
        assert len(running.core._encoded) < 2 * ENCODE_TOGETHER
