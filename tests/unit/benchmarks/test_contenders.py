"""Who takes part, in which settings, and how much each has to do."""

import pytest

from offline.contender_process import last_words
from offline.contenders import CONTENDERS, settings
from offline.machine import known_instructions
from offline.models import RANDOM_SENTENCES
from offline.plan import BATCHES, FULL, QUICK
from offline.task import Sentence, batches, longest_first
from offline.worker import KINDS


def test_every_contender_has_a_worker_and_settings() -> None:
    for contender in CONTENDERS:
        assert contender.kind in KINDS
        for batch in (*BATCHES, None):
            assert settings(contender.kind, batch)
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)


@pytest.mark.parametrize("batch", BATCHES)
def test_nobody_uses_more_threads_than_there_are_cores(batch: int) -> None:
    for contender in CONTENDERS:
        for setting in settings(contender.kind, batch):
            threads = setting.get("threads", setting.get("threads_per_worker"))
            assert setting.get("workers", 1) * threads <= 2


@pytest.mark.parametrize("batch", BATCHES)
def test_ctranslate2_computes_a_batch_at_once(batch: int) -> None:
    for setting in settings("ctranslate2", batch):
        assert setting["workers"] * setting["batch"] >= batch


def test_a_fast_contender_gets_more_random_sentences_and_always_whole_batches() -> None:
    assert FULL.random_sentences(8, 20.0, slow=False) == 24
    assert FULL.random_sentences(8, 20.0, slow=True) == 8
    assert FULL.random_sentences(32, 1.0, slow=False) == 32
    assert FULL.random_sentences(1, 1e6, slow=False) == RANDOM_SENTENCES
    assert QUICK.random_sentences(32, 1e6, slow=False) == 32


def test_batches_are_slices_in_order() -> None:
    assert list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(batches([1, 2, 3], None)) == [[1, 2, 3]]
    assert list(batches([], None)) == []


def test_the_longest_come_first_and_equals_in_order() -> None:
    sources = [Sentence((0,) * n, ("x",) * n, None) for n in (2, 3, 1, 3)]

    assert longest_first(sources) == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Traceback\nValueError: no such thing\n\n", "ValueError: no such thing"),
        ("OSError: /home/somebody/models/config.json: missing", "OSError: config.json: missing"),
        ("ERROR: none at https://index.example/simple/torch (tried twice)", "ERROR: none at … (tried twice)"),
        ("ERROR: no wheel for x/y", "ERROR: no wheel for x/y"),
        ("", ""),
    ],
)
def test_why_a_contender_failed_is_told_without_this_machines_folders(text: str, said: str) -> None:
    assert last_words(text) == said


def test_instructions_are_those_that_matter_here() -> None:
    assert known_instructions("processor : 0\nflags : fpu avx2 avx512_vnni sse\nflags : fpu\n") == [
        "avx2",
        "avx512_vnni",
    ]
    assert known_instructions("") == []
