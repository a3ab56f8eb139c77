"""The host's share of a step is measured with the engine's own code; what is timed answers as if it were not."""

from dataclasses import replace

import pytest
from engine_host import _RULES, VOCABULARY, FreeBackend, host_time

from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import Backend
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.request import Completed, GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import EngineCore
from offline.session_clock import TimedBackend

SENTENCES, BEAMS, TOKENS = 3, 4, 6


def searched(backend: Backend) -> list[Completed]:
    core = EngineCore(backend, _RULES, Capacity(64, 1 << 20), clock=lambda: 0.0, observer=NullObserver())
    options = SearchOptions(BEAMS, min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    core.accept(GenerationRequest(RequestId(i), (5, 6, 7), options) for i in range(SENTENCES))
    ended = []
    while not core.idle:
        ended += [event for event in core.step() if isinstance(event, Completed)]
    return ended


@pytest.mark.parametrize(("sentences", "beams"), [(1, 4), (5, 1)])
def test_steps_without_a_model_take_little_time(sentences: int, beams: int) -> None:
    found = host_time(sentences, beams, steps=40)
    assert found.steps >= 40
    assert 0 < found.least_us <= found.median_us <= found.p90_us
    assert str(replace(found, median_us=17.25)).startswith(f"    {sentences} x {beams} rows:    17.2 µs a step")


def test_a_backend_that_takes_no_time_searches_as_any() -> None:
    ended = searched(backend := FreeBackend())
    assert len(ended) == SENTENCES
    for outcome in ended:
        tokens = outcome.hypotheses[0].tokens
        assert len(tokens) == TOKENS
        assert all(0 < token < VOCABULARY for token in tokens)
    assert backend.seconds > 0


def test_a_timed_backend_answers_what_the_other_answers() -> None:
    """And notes one call for every encoder call, every step that is placed, and every bucket that runs."""
    timed = TimedBackend(FreeBackend())
    assert [e.hypotheses for e in searched(timed)] == [e.hypotheses for e in searched(FreeBackend())]
    assert timed.device == "cpu"
    assert len(timed.encodes) == 1
    assert len(timed.placings) == len(timed.runs) == TOKENS
    assert [call.rows for call in timed.runs] == [SENTENCES, *[SENTENCES * BEAMS] * (TOKENS - 1)]
    assert all(call.seconds >= 0 for call in timed.runs)
    timed.clear()
    assert not [*timed.encodes, *timed.placings, *timed.runs]
