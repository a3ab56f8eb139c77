"""Whether the answers were right: every one is counted, whoever gave it first, and compared with what was recorded."""

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from beamline_client.load.quality import AnswerBook, GoldenFile, GoldenUnusable, answer_hash, read_golden
from beamline_client.load.records import RECORD, Records
from beamline_client.load.target import Outcome, Question
from beamline_client.results import SearchOptions

texts = st.lists(st.text(max_size=20), min_size=1, max_size=4).map(tuple)

Given = tuple[int, tuple[str, ...]]
"""A question, and what was answered."""


def question(
    number: int, source: str = "", *, stream: bool = False, references: Sequence[str] = (), **search: Any
) -> Question:
    return Question(number, source or f"q{number}", SearchOptions(**search), stream, "any", tuple(references))


def records(answers: Sequence[Given], outcome: Outcome = Outcome.OK) -> Records:
    rows = np.zeros(len(answers), RECORD)
    rows["outcome"] = outcome
    rows["question"] = [number for number, _ in answers]
    rows["answer"] = [answer_hash(given_) for _, given_ in answers]
    return rows


def take(book: AnswerBook, answers: Sequence[Given], batch: int = 1000) -> AnswerBook:
    """As the generators send it: what a hash stands for comes before, or with, its first record."""
    rest = iter(answers)
    while some := list(islice(rest, batch)):
        for number, given_ in some:
            book.learn(number, answer_hash(given_), given_)
        book.add(records(some))
    return book


def golden(answers: dict[str, tuple[str, ...]], tmp_path: Path) -> GoldenFile:
    path = tmp_path / "golden.jsonl"
    lines = (json.dumps({"source": source, "texts": given_}) + "\n" for source, given_ in answers.items())
    path.write_text("".join(lines), "utf-8")
    return read_golden(path)


@given(several=st.sets(texts, max_size=20))
def test_different_answers_have_different_hashes(several: set[tuple[str, ...]]) -> None:
    hashes = {answer_hash(one) for one in several}

    assert len(hashes) == len(several)
    assert all(0 < one < 2**64 for one in hashes)


def test_hashes_tell_where_one_hypothesis_ends() -> None:
    assert len({answer_hash(one) for one in (("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("",), ())}) == 6


def test_hashes_are_the_same_in_every_process() -> None:
    program = "from beamline_client.load.quality import answer_hash; print(answer_hash(('à', 'b')))"
    path = [str(Path(__file__).parents[4] / folder) for folder in ("client", "protos")]
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {program}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONHASHSEED": "1"},
    )

    assert int(ran.stdout) == answer_hash(("à", "b"))


answers_to_5 = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([("a",), ("b",), ("a", "b"), ("",)])), max_size=60)


@given(answers=answers_to_5, batch=st.integers(1, 60))
def test_the_first_answer_wins_and_others_are_counted(answers: list[Given], batch: int) -> None:
    book = take(AnswerBook(tuple(map(question, range(5)))), answers, batch)

    first: dict[int, tuple[str, ...]] = {}
    differing = [given_ for number, given_ in answers if first.setdefault(number, given_) != given_]
    quality = book.quality()
    if quality is None:
        assert not answers
        return
    assert quality.inconsistent == len(differing)
    assert quality.distinct == len(set(answers))
    assert bool(quality.examples) == bool(differing)
    assert len(quality.examples) <= 5
    assert (quality.bleu, quality.chrf, quality.signature, quality.golden) == (None, None, None, None)
    assert bool(book.failures()) == bool(differing)


def test_only_answers_count() -> None:
    book = AnswerBook((question(0),))

    for outcome in Outcome:
        if outcome is not Outcome.OK:
            book.add(records([(0, ("x",))], outcome))
    book.add(np.zeros(3, RECORD))  # hash 0: no answer
    book.add(np.zeros(0, RECORD))

    assert book.quality() is None
    assert book.failures() == []


def test_a_stream_and_its_unary_twin_ask_the_same() -> None:
    same = (question(0, "a", beam_size=4), question(1, "a", stream=True, beam_size=4), question(2, "a", beam_size=1))

    agreed = take(AnswerBook(same), [(1, ("x",)), (0, ("x",)), (2, ("y",))]).quality()
    apart = take(AnswerBook(same), [(1, ("x",)), (0, ("y",))]).quality()

    assert agreed is not None
    assert (agreed.distinct, agreed.inconsistent) == (2, 0)
    assert apart is not None
    assert (apart.distinct, apart.inconsistent) == (2, 1)


def test_a_failure_says_what_was_answered_in_one_line() -> None:
    book = take(AnswerBook((question(0, "Où ?"),)), [(0, ("Where?",)), (0, ("Where?\nThere!",)), (0, ("Where?",))])

    assert book.failures() == [
        "answers that differ from the first one to the same question: 1 of 3, "
        r"such as 'Où ?': 'Where?\nThere!' after 'Where?'"
    ]


def test_a_server_that_always_answers_differently_is_counted_not_kept() -> None:
    book = take(AnswerBook((question(0), question(1))), [(number % 2, (f"{number}" * 9,)) for number in range(5000)])

    quality = book.quality()
    assert quality is not None
    assert (quality.distinct, quality.inconsistent) == (5000, 4998)
    assert sum(map(len, book._texts.values())) <= 10
    assert all(len(example) < 200 for example in quality.examples)


def test_scores_are_those_of_sacrebleu_over_different_answers(tmp_path: Path) -> None:
    asked = (
        question(0, references=["the cat sat on the mat", "a cat sat on a mat", "the cat was on the mat"]),
        question(1, references=["a dog barks at the moon"]),
        question(2),
        question(3, references=["never asked"]),
    )
    given_ = [
        (0, ("the cat sat on a mat", "second best")),
        (1, ("the dog barks at the moon .",)),
        (2, ("no reference",)),
    ]

    quality = take(AnswerBook(asked), given_ * 3).quality()

    assert quality is not None
    hypotheses = ["the cat sat on a mat", "the dog barks at the moon ."]
    streams = [[asked[0].references[0], asked[1].references[0]], *([one, None] for one in asked[0].references[1:])]
    assert quality.bleu == pytest.approx(BLEU(force=True).corpus_score(hypotheses, streams).score, abs=1e-3)
    assert quality.chrf == pytest.approx(CHRF().corpus_score(hypotheses, streams).score, abs=1e-3)
    assert quality.signature is not None
    assert "nrefs:var" in quality.signature
    assert "tok:13a" in quality.signature


@pytest.mark.parametrize("references", [["w x y z"], ["w x y z", "something else altogether"]])
def test_right_answers_score_100_and_a_missing_reference_costs_nothing(references: list[str]) -> None:
    asked = (question(0, references=references), question(1, references=["k l m n"]))

    quality = take(AnswerBook(asked), [(0, ("w x y z",)), (1, ("k l m n",))]).quality()

    assert quality is not None
    assert quality.bleu == pytest.approx(100)
    assert quality.chrf == pytest.approx(100)


def test_an_answer_that_is_wrong_lowers_the_scores() -> None:
    asked = (question(0, references=["w x y z"]),)

    right, wrong = (
        take(AnswerBook(asked), answers).quality()
        for answers in (
            [(0, ("w x y z",))],
            [(0, ("w x y z",)), (0, ("a b c d",))],
        )
    )

    assert right is not None
    assert wrong is not None
    assert right.bleu is not None
    assert right.bleu > (wrong.bleu or 0)


def test_every_answer_is_compared_with_the_recorded_one(tmp_path: Path) -> None:
    recorded = golden({"q0": ("right",), "q1": ("right",), "q9": ("never asked",)}, tmp_path)
    book = AnswerBook(tuple(map(question, range(3))), recorded)

    take(book, [(0, ("right",))] * 4 + [(1, ("wrong",))] * 3 + [(1, ("right",)), (2, ("?",)), (2, ("?",))])

    quality = book.quality()
    assert quality is not None
    assert quality.golden is not None
    assert quality.golden.model_dump() == {
        "file": str(recorded.path),
        "compared": 8,
        "different": 3,
        "missing": 2,
        "examples": ["'q1': 'wrong' instead of 'right'"],
    }
    failures = book.failures()
    assert failures[1:] == [
        f"answers that differ from {recorded.path}: 3 of 8, such as 'q1': 'wrong' instead of 'right'",
        f"answers to questions that {recorded.path} does not have: 2 of 10; record it with this workload",
    ]


def test_a_fast_wrong_server_fails_and_a_right_one_does_not(tmp_path: Path) -> None:
    recorded = golden({"q0": ("right", "second")}, tmp_path)

    for answer, failures in (
        (("right", "second"), 0),
        (("wrong", "second"), 1),
        (("right", "other"), 1),
        (("right",), 1),
    ):
        assert len(take(AnswerBook((question(0),), recorded), [(0, answer)]).failures()) == failures


@given(
    sources=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=9, unique=True),
    answers=st.lists(texts, min_size=9, max_size=9),
    packed=st.booleans(),
    beam_size=st.none() | st.integers(1, 9),
)
def test_what_was_recorded_is_what_is_right(
    sources: list[str],
    answers: list[tuple[str, ...]],
    packed: bool,
    beam_size: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    search: dict[str, Any] = {} if beam_size is None else {"beam_size": beam_size, "n_best": 1, "max_new_tokens": 9}
    asked = tuple(question(number, source, **search) for number, source in enumerate(sources))
    given_ = list(zip(range(len(sources)), answers, strict=False))
    path = tmp_path_factory.mktemp("golden") / ("g.jsonl.gz" if packed else "g.jsonl")
    twin = path.with_name(f"twin-{path.name}")

    take(AnswerBook(asked), given_).write_golden(path)
    take(AnswerBook(asked), given_[::-1]).write_golden(twin)

    assert path.read_bytes() == twin.read_bytes()
    recorded = read_golden(path)
    assert len(recorded.answers) == len(sources)
    streamed = tuple(replace(one, stream=True) for one in asked)
    assert take(AnswerBook(streamed, recorded), given_).failures() == []
    other = tuple(replace(one, search=SearchOptions(beam_size=99)) for one in asked)
    assert len(take(AnswerBook(other, recorded), given_).failures()) == 1


def test_the_first_of_several_answers_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "golden.jsonl"

    take(AnswerBook((question(0, "é", beam_size=4), question(1))), [(0, ("first",)), (0, ("second",))]).write_golden(
        path
    )

    assert json.loads(path.read_text("utf-8")) == {
        "source": "é",
        "beam_size": 4,
        "n_best": None,
        "max_new_tokens": None,
        "texts": ["first"],
    }


def test_recording_nothing_or_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GoldenUnusable, match="nothing was answered"):
        AnswerBook((question(0),)).write_golden(tmp_path / "golden")
    with pytest.raises(GoldenUnusable, match=r"cannot write .*: Is a directory"):
        take(AnswerBook((question(0),)), [(0, ("x",))]).write_golden(tmp_path)
    assert list(tmp_path.iterdir()) == []


GOOD = {"source": "a", "beam_size": 4, "n_best": None, "max_new_tokens": None, "texts": ["x"]}


def test_numbers_may_be_left_out_and_lines_repeated_or_empty(tmp_path: Path) -> None:
    path = tmp_path / "golden"
    path.write_text('{"source": "a", "texts": ["x"]}\n\n{"source": "a", "beam_size": null, "texts": ["x"]}\n')

    assert len(read_golden(path).answers) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no JSON", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ("[]", "no object with the fields source, beam_size"),
        (GOOD | {"beam": 4}, "no object with the fields"),
        (GOOD | {"source": ""}, "no source"),
        (GOOD | {"source": 1}, "no source"),
        (GOOD | {"texts": []}, "no texts"),
        (GOOD | {"texts": "x"}, "no texts"),
        (GOOD | {"texts": ["x", None]}, "no texts"),
        (GOOD | {"beam_size": True}, "beam_size that is neither"),
        (GOOD | {"n_best": 0}, "n_best that is neither"),
        (GOOD | {"max_new_tokens": 1.5}, "max_new_tokens that is neither"),
        (GOOD | {"texts": ["y"]}, "contradicts"),
    ],
)
def test_a_line_that_is_none_is_named(line: str | dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "golden"
    path.write_text(f"{json.dumps(GOOD)}\n{line if isinstance(line, str) else json.dumps(line)}\n")

    with pytest.raises(GoldenUnusable, match=reason) as refused:
        read_golden(path)
    assert f"{path}, line 2" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty", b"\n", "no recorded answers"),
        ("latin", b"\xe9", "not UTF-8"),
        ("cut.gz", gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-5], "no whole gzip file"),
    ],
)
def test_files_without_answers_are_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(GoldenUnusable, match=reason):
        read_golden(path)
    with pytest.raises(GoldenUnusable, match="No such file"):
        read_golden(tmp_path / "missing")


def test_text_that_no_server_can_send_is_different_from_all_that_it_can(tmp_path: Path) -> None:
    recorded = golden({"q0": ("\ud800",)}, tmp_path)

    assert len(take(AnswerBook((question(0),), recorded), [(0, ("x",))]).failures()) == 1
