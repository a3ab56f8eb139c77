"""Where two searches part, and by how much the oracle preferred its decision there."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from beamline_export.agreement import NEAR_TIE, Parting, find_parting, search_all
from beamline_export.reference_search import Candidate, SearchTrace, Step, reference_search
from beamline_export.spec import ExportError
from beamline_server.engine.request import EarlyStopping, SearchOptions
from doubles.engine import Faults, RandomTable, TableBackend, table_rules

VOCABULARY = 12
SOURCE = (3, 5, 1)
TABLE = RandomTable(VOCABULARY, seed=1)
RULES = table_rules(VOCABULARY)


def traced(options: SearchOptions, nudge: dict[tuple[int, ...], tuple[int, float]] | None = None) -> SearchTrace:
    """The reference search over the table, in which some prefixes prefer some token by a little."""

    def next_logprobs(prefixes: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        rows = []
        for prefix in prefixes:
            row = TABLE(SOURCE, tuple(prefix)).copy()
            token, by = (nudge or {}).get(tuple(prefix[1:]), (0, 0.0))
            row[token] += np.float32(by)
            rows.append(row)
        return np.stack(rows)

    return reference_search(next_logprobs, RULES.search, options, RULES.decoder_start)


def parting(trace: SearchTrace, options: SearchOptions) -> Parting | None:
    return find_parting(trace, TableBackend(TABLE, RULES), RULES, SOURCE, options)


@pytest.mark.parametrize("beam", [1, 2, 4])
@pytest.mark.parametrize("early_stopping", EarlyStopping)
def test_searches_that_agree_do_not_part(beam: int, early_stopping: EarlyStopping) -> None:
    options = SearchOptions(beam, beam, max_new_tokens=9, early_stopping=early_stopping)
    assert parting(traced(options), options) is None


@pytest.mark.parametrize("by", [0.0, 1e-6, 0.3])
def test_the_step_and_the_margin_of_a_changed_decision_are_found(by: float) -> None:
    """A greedy search is pushed to its second choice at the third step, by a little more than it takes."""
    options = SearchOptions(1, 1, max_new_tokens=9)
    path = traced(options).hypotheses[0].tokens
    assert len(path) > 3
    row = TABLE(SOURCE, (RULES.decoder_start, *path[:2]))
    second, first = np.argsort(row)[-2:]
    push = float(row[first] - row[second]) + by + 1e-5
    trace = traced(options, {path[:2]: (int(second), push)})
    found = parting(trace, options)
    assert found is not None
    assert found.step == 2
    assert found.margin == pytest.approx(by + 1e-5, abs=3e-6)
    assert (found.margin < NEAR_TIE) == (by < 0.1)


def test_a_beam_that_the_oracle_never_saw_is_no_near_tie() -> None:
    options = SearchOptions(2, 2, max_new_tokens=6)
    trace = traced(options)
    first = trace.steps[0]
    other = Step(first.beams[::-1], tuple(c for c in first.ranked if c not in first.beams), np.inf)
    found = parting(SearchTrace(trace.hypotheses[::-1], (other, *trace.steps[1:])), options)
    assert found is not None
    assert (found.step, found.margin) == (0, np.inf)


def test_a_difference_at_the_end_has_the_margin_of_the_end() -> None:
    """Beams are the same throughout, but other hypotheses are returned."""
    options = SearchOptions(3, 3, max_new_tokens=6)
    trace = traced(options)
    found = parting(SearchTrace(trace.hypotheses[::-1], trace.steps), options)
    assert found is not None
    assert found.step == len(trace.steps) - 1
    assert found.margin > NEAR_TIE


def test_a_step_tells_its_closest_call() -> None:
    ranked = tuple(Candidate((i,), np.float32(total)) for i, total in enumerate((-1.0, -1.5, -1.75, -3.0)))
    assert Step((), ranked, np.inf).margin == 0.25
    assert Step((), ranked[:1], np.inf).margin == np.inf


def test_a_failed_search_is_an_export_error() -> None:
    runner = TableBackend(TABLE, RULES, faults=Faults(step={1: RuntimeError("out of order")}))
    with pytest.raises(ExportError, match="a beam search failed"):
        search_all(runner, RULES, [(SOURCE, SearchOptions(max_new_tokens=3))])


def test_answers_come_in_the_order_of_the_questions() -> None:
    searches = [((i, i + 1), SearchOptions(1 + i % 3, 1, max_new_tokens=2 + i)) for i in range(7)]
    together = search_all(TableBackend(TABLE, RULES), RULES, searches)
    for search, answer in zip(searches, together, strict=True):
        assert search_all(TableBackend(TABLE, RULES), RULES, [search])[0].hypotheses == answer.hypotheses
