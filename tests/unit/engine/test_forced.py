"""Given targets, run: what the model says after every one of their tokens is what the table says."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.backend import StepResult
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.search import start
from beamline_server.engine.table import SequenceTable
from beamline_server.models.forced import forced_decode, forced_rows
from doubles.engine import RandomTable, TableBackend, table_rules
from doubles.memory import Tokens

VOCABULARY = 8
RULES = table_rules(VOCABULARY)
TABLE = RandomTable(VOCABULARY)


class Pair(NamedTuple):
    """A source, and a target that begins with the decoder start."""

    source: Tokens
    target: Tokens


tokens = st.integers(0, VOCABULARY - 1)
pairs = st.builds(
    lambda source, target: Pair(tuple(source), (0, *target)),
    st.lists(tokens, min_size=1, max_size=70),
    st.lists(tokens, max_size=50),
)


@given(st.lists(pairs, min_size=1, max_size=5), st.integers(1, 16), st.booleans(), st.sampled_from(["cpu", "cuda"]))
def test_every_row_is_the_tables(several: list[Pair], part: int, logprobs: bool, device: str) -> None:
    """Of all targets, each once, whatever is kept of earlier rows."""
    backend = TableBackend(TABLE, RULES, device=device)
    sources, targets = [pair.source for pair in several], [pair.target for pair in several]
    rows = list(forced_rows(backend, sources, targets, logprobs=logprobs, part=part))
    assert sorted((i, position) for i, position, _ in rows) == [
        (i, position) for i, target in enumerate(targets) for position in range(len(target))
    ]
    for i, position, row in rows:
        expected = TABLE(sources[i], targets[i][: position + 1])
        assert row.top_token.tolist() == [int(expected.argmax())]
        assert row.top_logprob.tolist() == [float(expected.max())]
        if logprobs:
            assert row.logprob is not None
            assert np.array_equal(row.logprob, expected)
        else:
            assert row.logprob is None


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 40])
def test_the_best_tokens_after_a_target_are_those_of_every_step(length: int) -> None:
    target = (0, *np.random.default_rng(length).integers(0, VOCABULARY, length - 1).tolist())
    best, logprobs = forced_decode(TableBackend(TABLE, RULES), (3, 4), target)
    expected = [TABLE((3, 4), target[: position + 1]) for position in range(length)]
    assert best == [int(row.argmax()) for row in expected]
    assert logprobs == [float(row.max()) for row in expected]


def run(backend: TableBackend, *, logprobs: bool) -> StepResult:
    """A step of two sequences, one of which is fed a prefix of three tokens."""
    table, cache, encoded = SequenceTable(2, (1,)), backend.new_cache(), backend.encode([(3, 4), (5,)])
    for index, (source, prefix) in enumerate([((3, 4), ()), ((5,), (6, 7))]):
        request = GenerationRequest(RequestId(index), source, SearchOptions(), target_prefix=prefix)
        table.enter(index, request, 0)
        start(table.arrays, index)
        cache.enter(index, encoded, index)
    (bucket,) = cache.place(table.arrays)
    assert bucket.members.tolist() == [0, 1]
    return bucket.run(table.arrays, 3, logprobs=logprobs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_log_probabilities_of_all_tokens_come_when_they_are_asked_for(device: str) -> None:
    result = run(TableBackend(TABLE, RULES, device=device), logprobs=True)
    rows = [((3, 4), (0,)), ((5,), (0,)), ((5,), (0, 6)), ((5,), (0, 6, 7))]
    expected = np.stack([TABLE(source, prefix) for source, prefix in rows])
    assert result.logprob is not None
    assert np.array_equal(result.logprob, expected)
    assert np.array_equal(result.top_logprob, -np.sort(-expected, axis=1)[:, :3])
    assert np.array_equal(np.take_along_axis(expected, result.top_token, axis=1), result.top_logprob)


def test_who_does_not_ask_for_them_does_not_get_them() -> None:
    asked, not_asked = (run(TableBackend(TABLE, RULES), logprobs=wanted) for wanted in (True, False))
    assert not_asked.logprob is None
    assert np.array_equal(asked.top_logprob, not_asked.top_logprob)
    assert np.array_equal(asked.top_token, not_asked.top_token)
