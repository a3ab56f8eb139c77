"""Many lines: order, blank lines, how far is read ahead, and what a failure leaves behind."""

import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client import FieldViolation, Hypothesis, InvalidRequest, Result, Timing, Unavailable
from beamline_client.bulk import Generated, Line, batched, generate_in_order

PLENTY = 1_000_000


def result_for(text: str) -> Result:
    return Result((Hypothesis(text.upper(), -1.0, None),), 1, False, Timing(0.0, 0.0, 0.0, 1))


def shout(texts: Sequence[str]) -> list[Result]:
    return [result_for(text) for text in texts]


def numbered(texts: Sequence[str]) -> list[Line]:
    return [Line(f"line {number}", text) for number, text in enumerate(texts, start=1)]


def by(lines_at_once: int, lines: Sequence[Line]) -> Iterator[list[Line]]:
    return batched(lines, lines_at_once=lines_at_once, bytes_at_once=PLENTY)


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_line_comes_back_in_order(batch_size: int, concurrency: int) -> None:
    lines = numbered([f"text {i}" for i in range(20)])

    done = list(generate_in_order(by(batch_size, lines), shout, concurrency=concurrency))

    assert done == [Generated(line, result_for(line.text)) for line in lines]


def test_a_slow_first_batch_holds_back_the_later_ones() -> None:
    second_done = threading.Event()

    def generate(texts: Sequence[str]) -> list[Result]:
        if texts == ["first"]:
            assert second_done.wait(30)
        else:
            second_done.set()
        return shout(texts)

    done = generate_in_order(by(1, numbered(["first", "second"])), generate, concurrency=2)

    assert [each.line.text for each in done] == ["first", "second"]


def test_lines_with_nothing_to_send_are_passed_through_without_a_request() -> None:
    sent: list[Sequence[str]] = []

    def generate(texts: Sequence[str]) -> list[Result]:
        sent.append(texts)
        return shout(texts)

    lines = [*numbered(["", "a", " \t", "b", "", ""]), Line("line 7", "\ufffd", "is not UTF-8")]
    done = list(generate_in_order(by(4, lines), generate, concurrency=1))

    assert [each.result and each.result.text for each in done] == [None, "A", None, "B", None, None, None]
    assert [each.problem for each in done] == [None] * 6 + ["is not UTF-8"]
    assert sent == [["a", "b"]]


def test_nothing_is_read_ahead_with_a_concurrency_of_one() -> None:
    read: list[str] = []

    def typed() -> Iterator[Line]:
        for line in numbered(["a", "b", "c"]):
            read.append(line.text)
            yield line

    batches = batched(typed(), lines_at_once=1, bytes_at_once=PLENTY)
    for done in generate_in_order(batches, shout, concurrency=1):
        assert read[-1] == done.line.text


def test_reading_ahead_is_bounded() -> None:
    read: list[str] = []

    def endless() -> Iterator[Line]:
        while True:
            read.append("x")
            yield Line("line", "x")

    batches = batched(endless(), lines_at_once=2, bytes_at_once=PLENTY)
    done = generate_in_order(batches, shout, concurrency=3)
    next(done)

    assert len(read) == 2 * (2 * 3 - 1)
    done.close()


def test_a_failure_comes_in_its_place() -> None:
    def generate(texts: Sequence[str]) -> list[Result]:
        if "bad" in texts:
            raise Unavailable("gone")
        return shout(texts)

    done = generate_in_order(by(1, numbered(["a", "bad", "c"])), generate, concurrency=1)

    assert next(done).line.text == "a"
    with pytest.raises(Unavailable):
        next(done)


@given(
    sizes=st.lists(st.integers(0, 9), max_size=30),
    lines_at_once=st.integers(1, 5),
    bytes_at_once=st.integers(-1, 20),
    around=st.integers(0, 4),
)
def test_batches_have_all_lines_and_no_more_than_fit(
    sizes: list[int], lines_at_once: int, bytes_at_once: int, around: int
) -> None:
    lines = numbered(["x" * size for size in sizes])

    batches = list(batched(lines, lines_at_once=lines_at_once, bytes_at_once=bytes_at_once, bytes_around=around))

    assert [line for batch in batches for line in batch] == lines
    for batch in batches:
        assert 1 <= len(batch) <= lines_at_once
        assert len(batch) == 1 or sum(len(line.text) + around for line in batch) <= bytes_at_once


class TestRefusals:
    """A server refuses a request as a whole, and names the inputs that are not valid."""

    @staticmethod
    def refusing(*bad: str, told_at_once: int = 100) -> list[Generated]:
        def generate(texts: Sequence[str]) -> list[Result]:
            found = [FieldViolation(f"inputs[{i}].text", f"is {text}") for i, text in enumerate(texts) if text in bad]
            if not found:
                return shout(texts)
            more = [FieldViolation("", "and more violations")] if len(found) > told_at_once else []
            raise InvalidRequest("no", violations=[*found[:told_at_once], *more])

        return list(generate_in_order(by(10, numbered(["a", "", "odd", "b", "bad"])), generate, concurrency=1))

    @pytest.mark.parametrize("told_at_once", [1, 100])
    def test_the_other_lines_of_the_request_are_not_lost(self, told_at_once: int) -> None:
        done = self.refusing("odd", "bad", told_at_once=told_at_once)

        assert [each.line.name for each in done] == [f"line {number}" for number in range(1, 6)]
        assert [each.result and each.result.text for each in done] == ["A", None, None, "B", None]
        assert [each.problem for each in done] == [None, None, "is odd", None, "is bad"]

    def test_all_of_them_can_be_refused(self) -> None:
        assert [each.problem for each in self.refusing("a", "odd", "b", "bad")] == [
            *("is a", None, "is odd", "is b", "is bad")
        ]

    @pytest.mark.parametrize(
        "violations",
        [
            [],
            [FieldViolation("search.beam_size", "is 99")],
            [FieldViolation("inputs[0].text", "is odd"), FieldViolation("search.beam_size", "is 99")],
            [FieldViolation("inputs", "has 9 entries; expected 1 to 4")],
            [FieldViolation("inputs[7].text", "is not there")],
            [FieldViolation("inputs[0].target_prefix.text", "is empty")],
            [FieldViolation("inputs[0].text", "is odd"), FieldViolation("inputs[0].target_prefix", "is missing")],
        ],
    )
    def test_what_no_line_is_to_blame_for_is_raised(self, violations: list[FieldViolation]) -> None:
        def generate(texts: Sequence[str]) -> list[Result]:
            raise InvalidRequest("no", violations=violations)

        with pytest.raises(InvalidRequest):
            list(generate_in_order(by(3, numbered(["a", "b"])), generate, concurrency=1))
