"""A prompt is what a target begins with: what it costs, and how long it is expected to take."""

import pytest

from beamline_server.engine.admission import cost
from beamline_server.engine.pace import Pace
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions, prompted


def asked(prompt: int, *, prefix: tuple[int, ...] = (), beams: int = 2, most: int = 50) -> GenerationRequest:
    options = SearchOptions(beam_size=beams, max_new_tokens=most)
    return GenerationRequest(RequestId(1), tuple(range(prompt)), options, target_prefix=prefix, caller="c")


def test_a_prompt_is_the_decoder_start_and_a_prefix() -> None:
    request = prompted(asked(3, prefix=(7, 8)))
    assert (request.source, request.decoder_start, request.target_prefix) == ((), 0, (1, 2, 7, 8))
    assert (request.id, request.caller, request.options) == (1, "c", asked(3).options)
    assert prompted(request) is request
    alone = prompted(asked(1))
    assert (alone.decoder_start, alone.target_prefix) == (0, ())


def test_it_costs_what_a_prefix_costs() -> None:
    assert cost(prompted(asked(200, beams=4, most=20))).slots >= 199 + 4 * 20
    assert cost(prompted(asked(200))).rows == 16
    assert cost(prompted(asked(3))).rows == 3


def test_steps_that_feed_a_prompt_are_expected_and_not_learned() -> None:
    pace = Pace()
    for tokens in (1, 16, 17, 160):
        request = prompted(asked(tokens))
        pace.answered(request, steps=-(-tokens // 16) - 1 + 30)
    assert pace.steps_per_answer == pytest.approx(30)
    assert pace.steps_per_token == 0
    assert pace.steps(prompted(asked(1))) == pytest.approx(30)
    assert pace.steps(prompted(asked(161))) == pytest.approx(30 + 10)
    assert pace.steps(prompted(asked(161, most=7))) == pytest.approx(7 + 10)
    assert pace.work(prompted(asked(161, beams=2))) == pytest.approx(160 + 2 * 30)
