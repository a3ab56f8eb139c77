"""Keys and values of a bucket as on a device: nobody's answer changes when others come and go."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from beamline_server.bundle import Bundle
from beamline_server.engine.backend import StepResult
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.ort.cuda.buckets import FromBatch, Memory
from beamline_server.engine.table import FloatArray
from doubles.fed import FedSequences, Tokens, logprobs_alone, newcomers

SOURCES: list[Tokens] = [(5, 6, 7, 1), (8, 1), (9, 10, 11, 12, 13, 1), (6, 6, 1)]
TARGETS: list[Tokens] = [(2, *range(10 * number + 3, 10 * number + 16)) for number in range(1, 5)]


@pytest.fixture(scope="module", params=["absolute", "relative"])
def bundle(
    request: pytest.FixtureRequest, tiny: Callable[[str], Bundle], tiny_relative: Callable[[str], Bundle]
) -> Bundle:
    """Of a model with positions of each kind."""
    return {"absolute": tiny, "relative": tiny_relative}[request.param]("fp32")


@pytest.fixture
def backend(bundle: Bundle) -> CudaBackend:
    """The one for GPUs, run on the CPU."""
    return CudaBackend(bundle, device="cpu")


@pytest.fixture(scope="module")
def alone(bundle: Bundle) -> list[FloatArray]:
    """Log-probabilities after every token of each target, fed alone, (T, V)."""
    backend = CudaBackend(bundle, device="cpu")
    return [logprobs_alone(backend, source, target) for source, target in zip(SOURCES, TARGETS, strict=True)]


def arranged(memory: Memory, origins: Sequence[object], *, slots: int = 16, source_width: int = 8) -> Memory:
    memory.arrange(origins, slots=slots, source_width=source_width)  # type: ignore[arg-type]
    return memory


def assert_as_alone(found: StepResult, alone: Sequence[FloatArray], members: Sequence[int], position: int) -> None:
    """The same bits as alone: of the best candidates, and of all if they were asked for."""
    expected = np.stack([alone[number][position] for number in members])
    best = np.argsort(-expected, axis=1, kind="stable")[:, : found.top_token.shape[1]]
    assert np.array_equal(found.top_token, best)
    assert np.array_equal(found.top_logprob, np.take_along_axis(expected, best, axis=1))
    assert found.logprob is None or np.array_equal(found.logprob, expected)


def test_what_runs_together_gets_what_it_would_get_alone(backend: CudaBackend, alone: list[FloatArray]) -> None:
    fed, memory = FedSequences(SOURCES, TARGETS), arranged(backend.new_memory(), newcomers(backend, SOURCES))
    for position in range(len(TARGETS[0])):
        assert_as_alone(fed.run(memory, range(4)), alone, range(4), position)
        fed.feed(range(4))


def test_all_logprobs_are_there_in_the_steps_that_ask_for_them(backend: CudaBackend, alone: list[FloatArray]) -> None:
    """Asked for in one step and not in the next, with the same rows and with other ones."""
    fed, memory = FedSequences(SOURCES, TARGETS), arranged(backend.new_memory(), newcomers(backend, SOURCES))
    for position, (logprobs, candidates) in enumerate([(False, 3), (True, 3), (True, 5), (False, 5), (True, 1)]):
        found = fed.run(memory, range(4), candidates=candidates, logprobs=logprobs)
        assert (found.logprob is not None) == logprobs
        assert found.top_token.shape == (4, candidates)
        assert_as_alone(found, alone, range(4), position)
        fed.feed(range(4))


def test_candidates_are_as_many_as_are_asked_for_up_to_the_vocabulary(
    backend: CudaBackend, alone: list[FloatArray]
) -> None:
    fed, memory = (
        FedSequences(SOURCES[:1], TARGETS[:1]),
        arranged(backend.new_memory(), newcomers(backend, SOURCES[:1])),
    )
    vocabulary = alone[0].shape[1]
    for candidates in (1, 9, vocabulary, 2):
        assert_as_alone(fed.run(memory, [0], candidates=candidates), alone, [0], 0)


def test_a_sequence_keeps_its_past_when_another_leaves(backend: CudaBackend, alone: list[FloatArray]) -> None:
    """The last one takes the place of the second, as buckets close gaps."""
    fed, memory = FedSequences(SOURCES, TARGETS), arranged(backend.new_memory(), newcomers(backend, SOURCES))
    for _ in range(2):
        fed.run(memory, range(4))
        fed.feed(range(4))
    members = [0, 3, 2]
    arranged(memory, [FromBatch(0), FromBatch(3), FromBatch(2)])
    assert_as_alone(fed.run(memory, members), alone, members, 2)


@pytest.mark.parametrize("slots", [32, 200])
@pytest.mark.parametrize("source_width", [8, 48])
def test_pasts_survive_growth_and_shrinking(
    backend: CudaBackend, alone: list[FloatArray], slots: int, source_width: int
) -> None:
    fed, memory = FedSequences(SOURCES, TARGETS), arranged(backend.new_memory(), newcomers(backend, SOURCES[:1]))
    fed.run(memory, [0])
    fed.feed([0])
    arranged(memory, [FromBatch(0), *newcomers(backend, SOURCES[1:])], slots=slots, source_width=source_width)
    assert (memory.slots, memory.source_width) == (slots, source_width)
    found = fed.run(memory, range(4), candidates=2)
    assert_as_alone(StepResult(found.top_logprob[:1], found.top_token[:1]), alone, [0], 1)
    assert_as_alone(StepResult(found.top_logprob[1:], found.top_token[1:]), alone, [1, 2, 3], 0)
    fed.feed(range(4))
    arranged(memory, [FromBatch(0), FromBatch(3)])
    found = fed.run(memory, [0, 3])
    assert_as_alone(StepResult(found.top_logprob[:1], found.top_token[:1]), alone, [0], 2)
    assert_as_alone(StepResult(found.top_logprob[1:], found.top_token[1:]), alone, [3], 1)


def test_a_sequence_takes_its_past_to_another_bucket(backend: CudaBackend, alone: list[FloatArray]) -> None:
    """From the narrower into the wider one, which has sequences of its own."""
    fed = FedSequences(SOURCES, TARGETS)
    narrow = arranged(backend.new_memory(), newcomers(backend, SOURCES[:2]))
    wide = arranged(backend.new_memory(), newcomers(backend, SOURCES[2:]), slots=64, source_width=64)
    for memory, members in ((narrow, [0, 1]), (wide, [2, 3])):
        fed.run(memory, members)
        fed.feed(members)
    arranged(wide, [FromBatch(0), FromBatch(1), FromBatch(1, narrow)], slots=64, source_width=64)
    arranged(narrow, [FromBatch(0)])
    assert_as_alone(fed.run(wide, [2, 3, 1]), alone, [2, 3, 1], 1)
    assert_as_alone(fed.run(narrow, [0]), alone, [0], 1)


def test_a_part_of_a_prefix_is_what_its_tokens_are_one_by_one(backend: CudaBackend, alone: list[FloatArray]) -> None:
    """Several rows of a sequence beside one of another; other kernels, so other last bits."""
    targets = [TARGETS[0][:5], TARGETS[1][:1], TARGETS[2][:3]]
    fed = FedSequences(SOURCES[:3], targets, part=4)
    memory = arranged(backend.new_memory(), newcomers(backend, SOURCES[:3]))
    found = fed.run(memory, range(3), logprobs=True)
    expected = np.concatenate([alone[0][:4], alone[1][:1], alone[2][:3]])
    assert found.logprob is not None
    assert found.logprob == pytest.approx(expected, abs=2e-5)
    fed.feed([0])
    arranged(memory, [FromBatch(0)])
    assert fed.run(memory, [0], logprobs=True).logprob == pytest.approx(alone[0][4:5], abs=2e-5)


def test_a_bucket_has_room_for_what_is_encoded_apart(backend: CudaBackend, alone: list[FloatArray]) -> None:
    """Two encoder calls of the same shape before either is used."""
    fed, memory = FedSequences(SOURCES, TARGETS), backend.new_memory()
    first, second = newcomers(backend, SOURCES[:1]), newcomers(backend, SOURCES[3:])
    arranged(memory, [*first, *second])
    assert_as_alone(fed.run(memory, [0, 3]), alone, [0, 3], 0)


def test_slots_that_are_taken_again_have_new_positions(backend: CudaBackend, alone: list[FloatArray]) -> None:
    """One sequence after another in the same slots, each of which may be at another position: these in turn."""
    memory = arranged(backend.new_memory(), newcomers(backend, SOURCES[:1]))
    longest = len(TARGETS[0])
    for order in (range(longest), range(longest)[::-1], [*range(1, longest, 2), *range(0, longest, 2)]):
        fed = FedSequences(SOURCES[:1], TARGETS[:1])
        sequence, ancestors = fed.arrays.sequences[0], fed.arrays.ancestors
        ancestors[0] = False
        for position, slot in enumerate(order):
            sequence.slot[0], sequence.slots_end, sequence.position[0] = slot, longest, position
            sequence.token[0], ancestors[0, 0, slot] = TARGETS[0][position], True
            found = fed.run(memory, [0], logprobs=True)
            assert found.logprob == pytest.approx(alone[0][position : position + 1], abs=2e-5)
