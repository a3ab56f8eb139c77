"""Caches on a device: where each sequence stands, and that addresses stay."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.bundle import Bundle
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.ort.cuda.buckets import FromBatch, Origin
from beamline_server.engine.ort.cuda.captured_graphs import CAPTURED_FROM_USE
from beamline_server.engine.ort.cuda.fixed_run import KEPT_RUNS, FixedRun
from beamline_server.engine.ort.cuda.memory import CudaMemory, keep_places
from beamline_server.engine.pack import extent
from doubles.fed import FedSequences, Tokens, newcomers

SOURCES: list[Tokens] = [(5, 6, 7, 1), (8, 1), (9, 10, 11, 12, 13, 1), (6, 6, 1)]
TARGETS: list[Tokens] = [(2, *range(10 * number + 3, 10 * number + 25)) for number in range(1, 5)]


@pytest.fixture
def backend(tiny: Callable[[str], Bundle]) -> CudaBackend:
    return CudaBackend(tiny("fp32"), device="cpu")


def arranged(memory: CudaMemory, origins: Sequence[Origin], slots: int = 16) -> CudaMemory:
    memory.arrange(origins, slots=slots, source_width=16)
    return memory


def run_for(memory: CudaMemory, fed: FedSequences, members: Sequence[int], *, logprobs: bool = False) -> FixedRun:
    needed = extent(fed.arrays, np.array(members, np.int64))
    return memory.run_for(needed, 3, logprobs=logprobs)


@given(st.lists(st.integers(0, 12), max_size=12, unique_by=lambda place: place or object()), st.integers(13, 20))
def test_sequences_keep_the_places_that_exist(wanted: list[int], batch: int) -> None:
    kept = keep_places(wanted, batch)
    assert len(set(kept.tolist())) == len(wanted)
    assert all(1 <= place < batch for place in kept)
    assert all(now == before for before, now in zip(wanted, kept.tolist(), strict=True) if before)


def test_who_stands_too_far_back_moves_to_the_front() -> None:
    assert keep_places([9, 2, 0, 7], 5).tolist() == [1, 2, 3, 4]


def test_addresses_stay_while_sequences_come_and_go(backend: CudaBackend) -> None:
    fed, memory = FedSequences(SOURCES, TARGETS), arranged(backend.new_memory(), newcomers(backend, SOURCES))
    fed.run(memory, range(4))
    own, cross = memory.own.addresses(), memory.cross.addresses()
    run = run_for(memory, fed, range(4))

    arranged(memory, [FromBatch(0), FromBatch(3), FromBatch(2)])
    arranged(memory, [FromBatch(0), *newcomers(backend, SOURCES[:2]), FromBatch(2)])

    assert (memory.own.addresses(), memory.cross.addresses()) == (own, cross)
    assert run_for(memory, fed, range(4)) is run


def test_a_sequence_keeps_its_batch_index_where_a_bucket_closes_a_gap(backend: CudaBackend) -> None:
    """Nothing is moved before the batch is smaller than where it stands."""
    memory = arranged(backend.new_memory(), newcomers(backend, SOURCES))
    before = int(memory.batch_index[3])
    arranged(memory, [FromBatch(0), FromBatch(3), FromBatch(2)])
    assert memory.batch_index[1] == before
    arranged(memory, [FromBatch(1)])
    assert memory.batch_index.tolist() == [1]


def test_what_was_bound_is_forgotten_when_the_memory_grows(backend: CudaBackend) -> None:
    fed, memory = FedSequences(SOURCES, TARGETS), arranged(backend.new_memory(), newcomers(backend, SOURCES[:1]))
    run = run_for(memory, fed, [0])
    arranged(memory, [FromBatch(0)], slots=1024)
    arranged(memory, [FromBatch(0)])
    assert run_for(memory, fed, [0]) is not run


def test_shapes_that_come_often_are_given_graphs(backend: CudaBackend) -> None:
    """One with all log-probabilities is another shape than one without."""
    fed, memory = FedSequences(SOURCES, TARGETS), arranged(backend.new_memory(), newcomers(backend, SOURCES[:2]))
    for logprobs, graph in ((False, 1), (True, 2)):
        for _ in range(CAPTURED_FROM_USE):
            fed.run(memory, [0, 1], logprobs=logprobs)
            fed.feed([0, 1])
        assert run_for(memory, fed, [0, 1], logprobs=logprobs).graph == graph
    assert len(backend.step_graphs) == 2


def test_as_many_runs_as_may_stay_bound_are_kept(tiny: Callable[[str], Bundle]) -> None:
    """Without graphs, the shape that was used least recently goes."""
    backend = CudaBackend(tiny("fp32"), device="cpu", graphs=False)
    fed, memory = FedSequences(SOURCES, TARGETS), arranged(backend.new_memory(), newcomers(backend, SOURCES[:1]))
    needed = extent(fed.arrays, np.array([0]))
    first, second = (memory.run_for(needed._replace(rows=rows), 3, logprobs=False) for rows in (1, 5))
    for number in range(KEPT_RUNS - 1):
        assert memory.run_for(needed, 3, logprobs=False) is first
        memory.run_for(needed._replace(rows=4 << number + 2), 3, logprobs=False)
    assert memory.run_for(needed, 3, logprobs=False) is first
    assert memory.run_for(needed._replace(rows=5), 3, logprobs=False) is not second
    assert len(backend.step_graphs) == 0


def test_a_new_bucket_is_as_large_as_the_largest_was(backend: CudaBackend) -> None:
    first = arranged(backend.new_memory(), newcomers(backend, SOURCES))
    second = arranged(backend.new_memory(), newcomers(backend, SOURCES[:1]))
    assert second.own.tensor_rows == first.own.tensor_rows


def test_half_precision_computes_what_single_precision_does(
    backend: CudaBackend, tiny: Callable[[str], Bundle]
) -> None:
    """Its mask is added, and written as bits."""
    half = CudaBackend(tiny("fp16"), device="cpu")
    found = []
    for each in (backend, half):
        fed, memory = FedSequences(SOURCES, TARGETS), arranged(each.new_memory(), newcomers(each, SOURCES))
        for _ in range(3):
            found.append(fed.run(memory, range(4), logprobs=True).logprob)
            fed.feed(range(4))
        arranged(memory, [FromBatch(3), FromBatch(1)], slots=64)
        found.append(fed.run(memory, [3, 1], logprobs=True).logprob)
    for single, half_as_wide in zip(found[:4], found[4:], strict=True):
        assert single is not None
        assert half_as_wide == pytest.approx(single, abs=3e-2)
