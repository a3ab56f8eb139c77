"""The queue against a plain list: order, cancellation, deadlines, and what all of them ask for."""

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import cost
from beamline_server.engine.queue import Queue
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions


def request(number: int, beams: int = 1, deadline: float | None = None) -> GenerationRequest:
    return GenerationRequest(RequestId(number), (number,), SearchOptions(beam_size=beams), deadline)


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
                assert queue.take(count) == twin.waiting[:count]
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
