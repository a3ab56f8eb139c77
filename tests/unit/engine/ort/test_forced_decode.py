"""What the model says after each token of a given target, whatever number of steps it takes to feed it."""

from collections.abc import Callable

import pytest

from beamline_server.bundle import Bundle
from beamline_server.engine.admission import MOST_ROWS
from beamline_server.engine.ort.cpu import CpuBackend
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.models.forced import forced_decode
from doubles.fed import logprobs_alone

SOURCE = (5, 6, 7, 1)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [1, MOST_ROWS, 2 * MOST_ROWS, 40])
def test_every_token_of_a_long_target_has_what_follows_it(
    tiny: Callable[[str], Bundle], kind: str, length: int
) -> None:
    """Steps of as many rows share their outputs: what was read is kept."""
    bundle = tiny("fp32")
    backend = CpuBackend(bundle, threads=1) if kind == "cpu" else CudaBackend(bundle, device="cpu")
    target = (2, *(3 + 7 * i % 117 for i in range(length - 1)))
    expected = logprobs_alone(backend, SOURCE, target)
    tokens, logprobs = forced_decode(backend, SOURCE, target)
    assert tokens == expected.argmax(axis=1).tolist()
    assert logprobs == pytest.approx(expected.max(axis=1).tolist(), abs=1e-4)
