"""Many lines: order, blank lines, how far is read ahead, and what a failure leaves behind."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from beamline_client import FieldViolation, Hypothesis, InvalidRequest, Result, Timing, Unavailable
from beamline_client.bulk import Line, generate_in_order


def result_for(text: str) -> Result:
    return Result((Hypothesis(text.upper(), -1.0, None),), 1, False, Timing(0.0, 0.0, 0.0, 1))


def shout(texts: Sequence[str]) -> list[Result]:
    return [result_for(text) for text in texts]


def numbered(texts: Sequence[str]) -> list[Line]:
    return [Line(f"line {number}", text) for number, text in enumerate(texts, start=1)]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_line_comes_back_in_order(batch_size: int, concurrency: int) -> None:
    lines = numbered([f"text {i}" for i in range(20)])

    done = list(generate_in_order(lines, shout, batch_size=batch_size, concurrency=concurrency))

    assert done == [(line, result_for(line.text)) for line in lines]


def test_a_slow_first_batch_holds_back_the_later_ones() -> None:
    second_done = threading.Event()

    def generate(texts: Sequence[str]) -> list[Result]:
        if texts == ["first"]:
            assert second_done.wait(30)
        else:
            second_done.set()
        return shout(texts)

    done = generate_in_order(numbered(["first", "second"]), generate, batch_size=1, concurrency=2)

    assert [line.text for line, _ in done] == ["first", "second"]


def test_blank_lines_are_passed_through_without_a_request() -> None:
    sent: list[Sequence[str]] = []

    def generate(texts: Sequence[str]) -> list[Result]:
        sent.append(texts)
        return shout(texts)

    done = list(generate_in_order(numbered(["", "a", " \t", "b", "", ""]), generate, batch_size=4, concurrency=1))

    assert [result and result.text for _, result in done] == [None, "A", None, "B", None, None]
    assert sent == [["a", "b"]]


def test_nothing_is_read_ahead_with_a_concurrency_of_one() -> None:
    read: list[str] = []

    def typed() -> Iterator[Line]:
        for line in numbered(["a", "b", "c"]):
            read.append(line.text)
            yield line

    for line, _ in generate_in_order(typed(), shout, batch_size=1, concurrency=1):
        assert read[-1] == line.text


def test_reading_ahead_is_bounded() -> None:
    read: list[str] = []

    def endless() -> Iterator[Line]:
        while True:
            read.append("x")
            yield Line("line", "x")

    done = generate_in_order(endless(), shout, batch_size=2, concurrency=3)
    next(done)

    assert len(read) == 2 * (2 * 3 - 1)
    done.close()


def test_a_failure_comes_in_its_place() -> None:
    def generate(texts: Sequence[str]) -> list[Result]:
        if "bad" in texts:
            raise Unavailable("gone")
        return shout(texts)

    done = generate_in_order(numbered(["a", "bad", "c"]), generate, batch_size=1, concurrency=1)

    assert next(done)[0].text == "a"
    with pytest.raises(Unavailable):
        next(done)


def test_a_refused_input_is_named_by_its_line() -> None:
    def generate(texts: Sequence[str]) -> list[Result]:
        raise InvalidRequest(
            "inputs[1].text is too long",
            request_id="r1",
            violations=[FieldViolation("inputs[1].text", "at most 10 bytes"), FieldViolation("inputs[7]", "odd")],
        )

    done = generate_in_order(numbered(["a", "", "too long"]), generate, batch_size=3, concurrency=1)
    with pytest.raises(InvalidRequest) as caught:
        next(done)

    assert caught.value.message == "line 3 is too long"
    assert caught.value.violations == (
        FieldViolation("line 3", "at most 10 bytes"),
        FieldViolation("inputs[7]", "odd"),
    )
    assert caught.value.request_id == "r1"
