"""What fails at the start, however it fails, is told in one line."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from beamline_server.bundle import Bundle, BundleError
from beamline_server.engine.backend import Cache, Encoded
from beamline_server.models.load import DeviceError, EngineOptions, warm_up
from doubles.service import make_manifest


class Failing:
    """A backend that computes nothing."""

    encode_tokens = 1024
    has_encoder = True

    def __init__(self, device: str, failure: Exception) -> None:
        self.device = device
        self._failure = failure

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        raise self._failure

    def new_cache(self) -> Cache:
        raise self._failure


@pytest.mark.parametrize(
    ("failure", "reason"), [(ValueError("no\n such output"), "no such output"), (MemoryError(), "MemoryError")]
)
def test_graphs_that_cannot_be_computed_are_told_in_one_line(failure: Exception, reason: str) -> None:
    bundle = Bundle(Path("b"), make_manifest(), "")
    with pytest.raises(BundleError) as on_cpu:
        warm_up(bundle, Failing("cpu", failure), EngineOptions())
    assert str(on_cpu.value) == f"b: its graphs cannot be computed ({reason}); export the model again"
    with pytest.raises(DeviceError) as on_gpu:
        warm_up(bundle, Failing("cuda", failure), EngineOptions())
    assert str(on_gpu.value) == f"device cuda cannot be used: {reason}"


def test_what_says_already_what_is_wrong_is_left_as_it_is() -> None:
    told = BundleError(Path("b/weights.bin"), "is missing", "copy the bundle again")
    with pytest.raises(BundleError) as caught:
        warm_up(Bundle(Path("b"), make_manifest(), ""), Failing("cpu", told), EngineOptions())
    assert caught.value is told
