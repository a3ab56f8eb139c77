"""The backend for the CPU: what is bound stays bound, and what a failed step leaves behind is thrown away."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from beamline_server.bundle import Bundle
from beamline_server.engine.ort.cpu import CpuBackend, CpuMemory
from beamline_server.engine.ort.cuda.buckets import FromBatch
from doubles.fed import FedSequences, Tokens, newcomers

SOURCES: list[Tokens] = [(5, 6, 7, 1), (8, 1), (9, 10, 11, 12, 13, 1), (6, 6, 1)]
TARGETS: list[Tokens] = [(2, *range(10 * number + 3, 10 * number + 13)) for number in range(1, 5)]


class CountedBinding:
    """A binding that notes what is bound."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.bound: list[str] = []

    def bind_input(self, name: str, *place: Any) -> None:
        self.bound.append(name)
        self.inner.bind_input(name, *place)

    def bind_output(self, name: str, *place: Any) -> None:
        self.bound.append(name)
        self.inner.bind_output(name, *place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class CountingMemory(CpuMemory):
    """A memory that tells what it has bound since it was last asked."""

    def __init__(self, sessions: Any) -> None:
        super().__init__(sessions)
        self.counted = CountedBinding(self._binding)
        self._binding = self.counted

    def newly_bound(self) -> set[str]:
        bound, self.counted.bound = set(self.counted.bound), []
        return bound


@pytest.fixture
def backend(tiny: Callable[[str], Bundle]) -> CpuBackend:
    return CpuBackend(tiny("fp32"), threads=1)


@pytest.fixture
def memory(backend: CpuBackend) -> CountingMemory:
    memory = CountingMemory(backend._sessions)
    memory.arrange(newcomers(backend, SOURCES), slots=16, source_width=8)
    return memory


INPUTS = {"ids", "positions", "slot", "row_of", "back", "ancestors", "source_length"}
OUTPUTS = {"top_logprob", "top_token"}


def is_cache(name: str) -> bool:
    return name.startswith(("self_", "cross_"))


def test_while_nobody_comes_or_goes_nothing_is_bound_anew(memory: CountingMemory) -> None:
    fed = FedSequences(SOURCES, TARGETS)
    fed.run(memory, range(4))
    first = memory.newly_bound()
    assert first >= INPUTS | OUTPUTS
    assert "logprob" not in first
    for _ in range(5):
        fed.feed(range(4))
        fed.run(memory, range(4))
        assert memory.newly_bound() == set()


def test_caches_are_bound_anew_when_they_move_and_only_then(memory: CountingMemory) -> None:
    fed = FedSequences(SOURCES, TARGETS)
    fed.run(memory, range(4))
    memory.newly_bound()
    fed.run(memory, range(4), candidates=5)
    assert memory.newly_bound() == INPUTS | OUTPUTS
    memory.arrange([FromBatch(number) for number in range(4)], slots=32, source_width=8)
    fed.run(memory, range(4), candidates=5)
    bound = memory.newly_bound()
    assert bound > INPUTS | OUTPUTS
    assert any(is_cache(name) for name in bound)


def test_all_logprobs_are_bound_only_where_they_are_asked_for(memory: CountingMemory) -> None:
    fed = FedSequences(SOURCES, TARGETS)
    for logprobs, asked_anew in ((False, True), (True, True), (True, False), (False, True), (False, False)):
        fed.run(memory, range(4), logprobs=logprobs)
        bound = memory.newly_bound()
        assert bool(bound) is asked_anew
        assert ("logprob" in bound) == (logprobs and asked_anew)
        outputs = len(memory.counted.inner.get_outputs())
        assert outputs == len(OUTPUTS) + logprobs + 2 * 2  # and the pools of two layers


def test_a_step_fails_with_onnxruntimes_words_and_the_next_one_computes(memory: CountingMemory) -> None:
    """A token that the model does not have is one that nobody can ask for."""
    fed = FedSequences(SOURCES[:1], [(2, 10**6, 3)])
    memory.arrange([FromBatch(0)], slots=16, source_width=8)
    expected = fed.run(memory, [0])
    fed.feed([0])
    with pytest.raises(Exception, match="out of data bounds"):
        fed.run(memory, [0])
    again = FedSequences(SOURCES[:1], [(2, 3)])
    assert np.array_equal(again.run(memory, [0]).top_logprob, expected.top_logprob)


def test_sources_of_no_length_in_common_are_encoded_alike_alone(backend: CpuBackend) -> None:
    together = backend.encode(SOURCES).tensors
    for number, source in enumerate(SOURCES):
        for tensor, lone in zip(together, backend.encode([source]).tensors, strict=True):
            assert np.array_equal(tensor[number, : len(source)], lone[0, : len(source)])
