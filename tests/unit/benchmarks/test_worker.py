"""What a worker does when it is told to, with a contender that only counts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from offline.task import Search, Sentence, Setting, Task, write_sentences
from offline.worker import WARM_UP_BATCHES, Commands


class Counting:
    """A contender whose answer has as many tokens as the source."""

    def __init__(self) -> None:
        self.opened: list[Setting] = []
        self.closed = 0
        self.batches: list[int] = []

    def open(self, setting: Setting) -> None:
        self.opened.append(setting)

    def translate(self, sentences: Sequence[Sentence], search: Search) -> Sequence[Sequence[Any]]:
        self.batches.append(len(sentences))
        return [sentence.ids for sentence in sentences]

    def ids(self, tokens: Sequence[Any]) -> list[int]:
        return list(tokens)

    def close(self) -> None:
        self.closed += 1


class WithProfiles(Counting):
    """One that has measurements of its own as well."""

    def profile(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": name, **arguments}


@pytest.fixture
def sentences(tmp_path: Path) -> str:
    """A file of ten sentences of 1 to 10 tokens."""
    path = tmp_path / "sentences.json"
    write_sentences(path, [Sentence(tuple(range(n)), ("x",) * n, None) for n in range(1, 11)])
    return str(path)


@pytest.fixture
def contender() -> Counting:
    return Counting()


def test_a_measurement_counts_the_tokens_of_its_sentences(contender: Counting, sentences: str) -> None:
    commands = Commands(contender)

    found = commands.measure({"threads": 2}, Task(sentences, 7, 3, Search()).as_json())

    assert (found["sentences"], found["tokens"]) == (7, 1 + 2 + 3 + 4 + 5 + 6 + 7)
    assert found["seconds"] > 0
    assert contender.opened == [{"threads": 2}]
    assert contender.batches[WARM_UP_BATCHES:] == [3, 3, 1]


def test_only_the_first_measurement_of_a_setting_warms_up(contender: Counting, sentences: str) -> None:
    commands, task = Commands(contender), Task(sentences, 8, 4, Search()).as_json()
    commands.measure({"threads": 1}, task)
    contender.batches.clear()

    commands.measure({"threads": 1}, task)
    assert contender.batches == [4, 4]
    assert contender.closed == 0

    commands.measure({"threads": 2}, task)
    assert contender.opened == [{"threads": 1}, {"threads": 2}]
    assert contender.closed == 1


def test_the_first_result_is_one_sentence_with_nothing_before_it(contender: Counting, sentences: str) -> None:
    Commands(contender).first({}, Task(sentences, 10, 4, Search()).as_json())

    assert contender.batches == [1]


def test_answers_come_in_order(contender: Counting, sentences: str) -> None:
    found = Commands(contender).answers({}, Task(sentences, 3, 2, Search()).as_json())

    assert found == {"ids": [[0], [0, 1], [0, 1, 2]]}


def test_a_profile_finds_nothing_open(sentences: str) -> None:
    contender = WithProfiles()
    commands = Commands(contender)
    commands.first({}, Task(sentences, 1, None, Search()).as_json())

    assert commands.profile("company", sentences="file") == {"name": "company", "sentences": "file"}
    assert contender.closed == 1


def test_who_has_no_profiles_says_so(contender: Counting) -> None:
    with pytest.raises(TypeError, match="no measurement 'step' of its own"):
        Commands(contender).profile("step")


def test_memory_is_at_most_its_peak(contender: Counting) -> None:
    found = Commands(contender).memory()

    assert 0 < found["now"] <= found["peak"]
