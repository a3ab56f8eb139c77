"""What is asked: the shares that were written, the same for the same seed, whole in its parts."""

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.arrivals import draw_arrivals, parse_rate
from beamline_client.load.sentences import Sentence, SentencesUnusable
from beamline_client.load.target import Request
from beamline_client.load.workload import (
    MAX_CLASSES,
    Workload,
    WorkloadOptions,
    WorkloadUnusable,
    check_limits,
    check_options,
    draw_workload,
)
from beamline_client.results import Limits, ModelInfo, SearchOptions, ServerInfo

SENTENCES = [Sentence(" ".join(f"w{number}" for _ in range(1 + number % 9)), (f"r{number}",)) for number in range(97)]
MIXED = WorkloadOptions(
    lengths="any:80%,20-30:20%",
    beams="1:20%,4:70%,8:10%",
    n_best="1",
    deadlines="500ms:10%,30s:90%",
    stream="25%",
    cancel="5%",
    cancel_within="50-200ms",
    max_new_tokens=64,
)
REQUESTS = 20_000


def requests_of(workload: Workload) -> list[Request]:
    return [workload.request(row) for row in range(len(workload))]


@pytest.fixture(scope="module")
def mixed() -> list[Request]:
    return requests_of(draw_workload(SENTENCES, MIXED, REQUESTS, seed=1))


def assert_shares(values: list[Any], expected: dict[Any, float]) -> None:
    """Each value as often as its share says, within 5 standard deviations."""
    counts = Counter(values)
    assert counts.keys() <= expected.keys()
    for value, share in expected.items():
        spread = math.sqrt(len(values) * share * (1 - share))
        assert counts[value] == pytest.approx(len(values) * share, abs=5 * spread)


def test_shares_are_those_that_were_written(mixed: list[Request]) -> None:
    assert_shares([request.question.bucket for request in mixed], {"any": 0.8, "20-30": 0.2})
    assert_shares([request.question.search.beam_size for request in mixed], {1: 0.2, 4: 0.7, 8: 0.1})
    assert_shares([request.deadline_s for request in mixed], {0.5: 0.1, 30.0: 0.9})
    assert_shares([request.question.stream for request in mixed], {True: 0.25, False: 0.75})
    assert_shares([request.cancel_after_s is not None for request in mixed], {True: 0.05, False: 0.95})
    assert {request.question.search.n_best for request in mixed} == {1}
    assert {request.question.search.max_new_tokens for request in mixed} == {64}


def test_options_are_drawn_apart_from_each_other(mixed: list[Request]) -> None:
    streams = [request for request in mixed if request.question.stream]

    assert_shares([request.question.search.beam_size for request in streams], {1: 0.2, 4: 0.7, 8: 0.1})
    assert_shares([request.question.bucket for request in streams], {"any": 0.8, "20-30": 0.2})
    assert_shares([request.cancel_after_s is not None for request in streams], {True: 0.05, False: 0.95})


def test_callers_give_up_at_any_time_of_the_range(mixed: list[Request]) -> None:
    times = [request.cancel_after_s for request in mixed if request.cancel_after_s is not None]

    assert 0.05 <= min(times) < 0.06
    assert 0.19 < max(times) <= 0.2 + 1e-6
    assert np.mean(times) == pytest.approx(0.125, abs=0.01)


def test_lengths_lie_in_their_buckets(mixed: list[Request]) -> None:
    for request in mixed:
        if request.question.bucket == "20-30":
            assert 20 <= len(request.question.source.split()) <= 30
        else:
            assert request.question.references == (f"r{request.question.source.split()[0][1:]}",)


def test_questions_are_numbered_different_and_all_asked() -> None:
    workload = draw_workload(SENTENCES, MIXED, 3000, seed=2)

    assert [question.number for question in workload.questions] == list(range(len(workload.questions)))
    assert len({dataclasses.replace(question, number=0) for question in workload.questions}) == len(workload.questions)
    assert np.array_equal(np.unique(workload.question), np.arange(len(workload.questions)))
    assert [column.dtype for column in (workload.question, workload.deadline_s, workload.class_of)] == [
        *(np.uint32, np.float32, np.uint16)
    ]


@pytest.mark.parametrize("requests", [1, 96, 97, 98, 500])
def test_all_sentences_are_asked_equally_often_in_no_order(requests: int) -> None:
    workload = draw_workload(SENTENCES, WorkloadOptions(), requests, seed=3)

    sources = [request.question.source for request in requests_of(workload)]
    counts = Counter(sources)
    assert {counts[sentence.source] for sentence in SENTENCES} <= {requests // 97, -(-requests // 97)}
    for first in range(0, requests, 97):
        assert len(set(sources[first : first + 97])) == len(sources[first : first + 97])
    if requests > 97:
        assert sources[:97] != sources[97 : 2 * 97]


def test_same_seed_same_workload_another_seed_another() -> None:
    first, again, other = (draw_workload(SENTENCES, MIXED, 500, seed) for seed in (5, 5, 6))

    assert requests_of(first) == requests_of(again)
    assert requests_of(first) != requests_of(other)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"beams": "2"}, "search"),
        ({"stream": "50%"}, "stream"),
        ({"deadlines": "1s"}, "deadline_s"),
        ({"cancel": "50%"}, "cancel_after_s"),
    ],
)
def test_changing_one_option_leaves_the_rest_as_it_was(change: dict[str, str], changed: str) -> None:
    def columns(options: WorkloadOptions) -> dict[str, list[object]]:
        drawn = requests_of(draw_workload(SENTENCES, options, 500, seed=5))
        return {
            "source": [request.question.source for request in drawn],
            "search": [request.question.search for request in drawn],
            "stream": [request.question.stream for request in drawn],
            "deadline_s": [request.deadline_s for request in drawn],
            "cancel_after_s": [request.cancel_after_s for request in drawn],
        }

    before, after = columns(MIXED), columns(dataclasses.replace(MIXED, **change))  # type: ignore[arg-type]
    assert {name for name in before if before[name] != after[name]} == {changed}


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    short, long = (draw_workload(SENTENCES, MIXED, requests, seed=5) for requests in (300, 2000))

    def asked(workload: Workload) -> list[tuple[object, ...]]:
        return [
            (request.question.source, request.question.search, request.question.stream, request.deadline_s)
            for request in requests_of(workload)[:300]
        ]

    assert asked(short) == asked(long)


def test_the_workload_owes_nothing_to_the_arrivals() -> None:
    """Drawn from the same numbers, long gaps would go with some kinds of requests."""
    workload = draw_workload(SENTENCES, WorkloadOptions(beams="1,4"), REQUESTS, seed=9)
    gaps = np.diff(draw_arrivals(parse_rate("1000"), "poisson", 30.0, 9))[: REQUESTS - 1]

    beams = np.array([question.search.beam_size for question in workload.questions])[workload.question][1:]
    assert abs(np.corrcoef(gaps, beams.astype(float))[0, 1]) < 5 / math.sqrt(REQUESTS)


@given(requests=st.integers(1, 200), workers=st.integers(1, 9))
def test_parts_are_a_partition(requests: int, workers: int) -> None:
    workload = draw_workload(SENTENCES, MIXED, requests, seed=4)

    parts = [workload.part(worker, workers) for worker in range(workers)]

    everything = requests_of(workload)
    assert sum(map(len, parts)) == requests
    for worker, part in enumerate(parts):
        assert requests_of(part) == everything[worker::workers]
        assert part.questions is workload.questions
        assert part.class_names == workload.class_names


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (WorkloadOptions(), {"all"}),
        (WorkloadOptions(beams="4", stream="100%"), {"all"}),
        (WorkloadOptions(beams="1,4"), {"beam 1", "beam 4"}),
        (WorkloadOptions(stream="50%"), {"stream", "unary"}),
        (WorkloadOptions(n_best="1,2"), {"1-best", "2-best"}),
        (
            WorkloadOptions(lengths="any,20-30", beams="1,4"),
            {f"beam {beam}, {length}" for beam in (1, 4) for length in ("any length", "20-30 words")},
        ),
    ],
)
def test_classes_are_named_after_what_varies(options: WorkloadOptions, names: set[str]) -> None:
    workload = draw_workload(SENTENCES, options, 500, seed=1)

    assert set(workload.class_names) == names
    assert len(workload.class_of) == len(workload.questions)
    for question, place in zip(workload.questions, workload.class_of.tolist(), strict=True):
        name = workload.class_names[place]
        assert "beam" not in name or f"beam {question.search.beam_size}" in name
        assert ("20-30" in name) == (question.bucket == "20-30")


def test_the_rarest_classes_are_one_when_there_are_many() -> None:
    beams = ",".join(f"{beam}:{beam}" for beam in range(1, 41))
    workload = draw_workload(SENTENCES, WorkloadOptions(beams=beams), REQUESTS, seed=1)

    counts = np.bincount(workload.class_of[workload.question], minlength=MAX_CLASSES)
    assert len(workload.class_names) == MAX_CLASSES
    assert workload.class_names[-1] == "other"
    assert np.all(np.diff(counts[:-1]) <= 0)
    assert {"beam 1", "beam 2", "beam 3"}.isdisjoint(workload.class_names)
    assert counts.min() > 0


def test_all_problems_of_the_options_are_in_one_line() -> None:
    bad = WorkloadOptions("long", "0", "x", "0s", "20", "200%", "200ms", 0)

    with pytest.raises(WorkloadUnusable) as refused:
        check_options(bad)
    problems = str(refused.value).split("; ")
    names = ["lengths", "beams", "n-best", "deadlines", "stream", "cancel", "cancel within", "max-new-tokens"]
    assert [problem.partition(":")[0] for problem in problems] == names
    assert "\n" not in str(refused.value)
    with pytest.raises(WorkloadUnusable):
        draw_workload(SENTENCES, bad, 1, 0)


def test_a_beam_must_hold_the_n_best_of_any_combination() -> None:
    check_options(WorkloadOptions(beams="4,8", n_best="1,4"))
    check_options(WorkloadOptions(n_best="4"))  # the server's default may be as wide
    with pytest.raises(WorkloadUnusable, match="a beam of 1 finds no 4"):
        check_options(WorkloadOptions(beams="1:1%,8:99%", n_best="1:99%,4:1%"))


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(WorkloadUnusable, match="without requests"):
        draw_workload(SENTENCES, WorkloadOptions(), 0, 0)
    with pytest.raises(WorkloadUnusable, match="seed"):
        draw_workload(SENTENCES, WorkloadOptions(), 1, -1)
    with pytest.raises(SentencesUnusable, match="50000-60000"):
        draw_workload(SENTENCES, WorkloadOptions(lengths="50000-60000"), 1, 0)


def server(**default_search: Any) -> ServerInfo:
    return ServerInfo(
        ModelInfo("m", "marian", "fp32", "cpu", 9, 9, True, "0"),
        Limits(
            max_inputs=1,
            max_text_bytes=200,
            max_source_tokens=99,
            max_new_tokens=64,
            max_beam_size=8,
            max_message_bytes=9999,
            max_duration_s=30.0,
        ),
        SearchOptions(**default_search),
        {},
    )


def problems(info: ServerInfo | None = None, sentences: list[Sentence] | None = None, **options: Any) -> list[str]:
    workload = draw_workload(sentences or SENTENCES, WorkloadOptions(**options), 500, seed=1)
    return check_limits(workload, info or server(beam_size=4, n_best=1))


def test_a_workload_within_the_limits_has_no_problems() -> None:
    assert problems() == []
    assert problems(beams="8", n_best="8", max_new_tokens=64, deadlines="30s,100ms", stream="50%") == []
    assert problems(sentences=[Sentence("é" * 100)]) == []
    assert problems(n_best="4") == []
    assert problems(server(), n_best="4") == []  # the server does not say how wide its beam is


def test_what_the_server_would_refuse_is_named_once() -> None:
    assert problems(beams="1,9,16") == ["a beam of 16 is above the server's limit of 8"]
    assert problems(max_new_tokens=65) == ["max_new_tokens of 65 is above the server's limit of 64"]
    assert problems(deadlines="1s:99%,31s:1%") == ["a deadline of 31 s is above the server's limit of 30 s"]
    assert problems(n_best="1,5") == ["an n-best of 5 is more than a beam of 4 finds"]
    assert problems(server(beam_size=4, n_best=2), beams="1", stream="50%") == [
        "an n-best of 2 is more than a beam of 1 finds"
    ]
    assert problems(sentences=[Sentence("é" * 101)]) == [
        "a source of 202 bytes is above the server's limit of 200 bytes"
    ]
    assert len(problems(beams="9", max_new_tokens=65, deadlines="31s")) == 3
