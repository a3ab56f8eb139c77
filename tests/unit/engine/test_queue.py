"""The queue against a plain list: order, cancellation, deadlines, and what all of them ask for."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import cost
from beamline_server.engine.queue import Queue
from beamline_server.engine.request import GenerationRequest, Priority, RequestId, SearchOptions


def request(number: int, beams: int = 1, deadline: float | None = None) -> GenerationRequest:
    return GenerationRequest(RequestId(number), (number,), SearchOptions(beam_size=beams), deadline)


def take_first(queue: Queue, count: int) -> list[tuple[GenerationRequest, float]]:
    return queue.take(list(islice(queue, count)))


class Twin:
    """What is in the queue, as (request, when it came)."""

    def __init__(self) -> None:
        self.waiting: list[tuple[GenerationRequest, float]] = []

    def take_out(self, numbers: Sequence[int]) -> list[GenerationRequest]:
        gone = [asked for asked, _ in self.waiting if asked.id in numbers]
        self.waiting = [entry for entry in self.waiting if entry[0].id not in numbers]
        return gone


def check(queue: Queue, twin: Twin) -> None:
    assert list(queue) == [asked for asked, _ in twin.waiting]
    assert len(queue) == len(twin.waiting)
    assert bool(queue) == bool(twin.waiting)
    assert queue.rows == sum(cost(asked).rows for asked, _ in twin.waiting)
    if twin.waiting:
        assert queue.oldest_at == twin.waiting[0][1]
    # One who has left may wake in vain; nobody sleeps too long.
    deadlines = [asked.deadline for asked, _ in twin.waiting if asked.deadline is not None]
    assert queue.earliest_deadline <= min(deadlines, default=math.inf)


@given(st.data())
def test_a_queue_is_a_list_from_which_requests_leave_by_the_head_by_id_or_by_time(data: st.DataObject) -> None:
    queue, twin, now = Queue(), Twin(), 0.0
    for number in range(data.draw(st.integers(0, 30))):
        now += data.draw(st.sampled_from([0.0, 1.0, 2.5]))
        match data.draw(st.sampled_from(["come", "come", "come", "take", "cancel", "expire", "clear"])):
            case "come":
                after_s = data.draw(st.none() | st.sampled_from([0.0, 1.0, 4.0, 20.0]))
                asked = request(number, data.draw(st.integers(1, 16)), None if after_s is None else now + after_s)
                queue.append(asked, now)
                twin.waiting.append((asked, now))
            case "take":
                count = data.draw(st.integers(0, len(twin.waiting)))
                assert take_first(queue, count) == twin.waiting[:count]
                twin.waiting = twin.waiting[count:]
            case "cancel":
                numbers = data.draw(st.lists(st.integers(0, 30), max_size=4))
                assert queue.cancel([RequestId(n) for n in numbers]) == twin.take_out(numbers)
            case "expire":
                late = [a.id for a, _ in twin.waiting if a.deadline is not None and a.deadline <= now]
                assert queue.expire(now) == twin.take_out(late)
            case "clear":
                assert queue.clear() == twin.take_out(range(100))
        check(queue, twin)


def test_the_next_deadline_counts_when_the_first_has_passed() -> None:
    queue = Queue()
    for number, deadline in enumerate((9.0, 3.0, None, 5.0)):
        queue.append(request(number, deadline=deadline), 0.0)
    assert [asked.id for asked in queue.expire(3.0)] == [1]
    assert queue.earliest_deadline == 5.0
    assert [asked.id for asked in queue.expire(100.0)] == [0, 3]
    assert queue.earliest_deadline == math.inf


def of(caller: str, number: int) -> GenerationRequest:
    return replace(request(number), caller=caller)


def order(queue: Queue) -> list[RequestId]:
    return [asked.id for asked in queue]


def test_a_caller_with_little_work_is_not_held_up_by_one_with_much() -> None:
    queue = Queue()
    for number in range(100):
        queue.append(of("greedy", number), 0.0, work=50.0)
    taken = [asked.id for asked, _ in take_first(queue, 3)]
    queue.append(of("polite", 1000), 0.0, work=1.0)
    assert taken == [0, 1, 2]
    assert order(queue)[:3] == [1000, 3, 4]
    queue.append(of("polite", 1001), 0.0, work=1.0)
    assert order(queue).index(RequestId(1001)) <= 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=1, max_size=60))
def test_those_who_wait_all_the_time_get_equal_shares(asked: list[tuple[str, int]]) -> None:
    """While two callers both wait, the work that they were given differs by no more than two of their requests."""
    queue = Queue()
    for number, (caller, work) in enumerate(asked):
        queue.append(of(caller, number), 0.0, work=float(work))
    left, given_to = Counter(caller for caller, _ in asked), Counter[str]()
    most = 2 * max(work for _, work in asked)
    while len(queue):
        [(next_one, _)] = take_first(queue, 1)
        assert next_one.id == min(other.id for other in [next_one, *queue] if other.caller == next_one.caller)
        left[next_one.caller] -= 1
        given_to[next_one.caller] += asked[next_one.id][1]
        waiting = [given_to[caller] for caller in left if left[caller]]
        assert not waiting or max(waiting) - min(waiting) <= most


def test_those_who_are_passed_keep_their_turn() -> None:
    queue = Queue()
    for number in range(4):
        queue.append(request(number, beams=number + 1), float(number))
    second, fourth = list(queue)[1::2]
    assert queue.take([second, fourth]) == [(second, 1.0), (fourth, 3.0)]
    assert order(queue) == [0, 2]
    assert (queue.rows, queue.oldest_at) == (1 + 3, 0.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(Priority)), max_size=30))
def test_batch_requests_come_last_and_in_the_order_that_they_would_have_alone(
    asked: list[tuple[str, Priority]],
) -> None:
    both, alone = Queue(), {priority: Queue() for priority in Priority}
    for number, (caller, priority) in enumerate(asked):
        one = replace(of(caller, number), priority=priority)
        both.append(one, 0.0, work=2.0)
        alone[priority].append(one, 0.0, work=2.0)
    taken = []
    while len(both):
        taken += [one for one, _ in take_first(both, 3)]
    assert taken == [*alone[Priority.NORMAL], *alone[Priority.BATCH]]


def test_who_was_away_has_saved_up_nothing() -> None:
    queue = Queue()
    queue.append(of("a", 1), 0.0, work=1.0)
    take_first(queue, 1)
    for number in range(10, 20):
        queue.append(of("b", number), 0.0, work=10.0)
        take_first(queue, 1)
    for number in range(20, 30):
        queue.append(of("b", number), 0.0, work=10.0)
        queue.append(of("a", 10 * number), 0.0, work=10.0)
    first = [asked.caller for asked, _ in take_first(queue, 10)]
    assert 4 <= first.count("a") <= 6


def test_those_who_are_next_and_hopeless_leave_it() -> None:
    queue = Queue()
    for number in range(5):
        queue.append(request(number, beams=2), 0.0)
    gone = queue.give_up(lambda asked, now: asked.id + now < 4, 2.0)
    assert [asked.id for asked in gone] == [0, 1]
    assert order(queue) == [2, 3, 4]
    assert queue.rows == 6
    assert queue.give_up(lambda asked, _: asked.id == 3, 2.0) == []
