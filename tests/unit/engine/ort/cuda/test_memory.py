"""Caches on a device: who sits where, and that addresses stay."""

from pathlib import Path

import numpy as np
import pytest
from beamline_server.engine.batch import encoder_batch, layout, step_batch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from beamline_server.bundle import Bundle, load_bundle
from beamline_server.engine.backend import Backend, Cache, FromCache, FromEncoder, FromSeat, Origin, StepBatch
from beamline_server.engine.ort.cpu import CpuBackend
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.ort.cuda.memory import CudaMemory, keep_seats

BUNDLE = Path(__file__).parents[3] / "golden" / "format1-fp32"
SOURCES = [(5, 6, 7, 1), (8, 1), (9, 10, 11, 12, 13, 1), (6, 6, 1)]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(BUNDLE)


@pytest.fixture
def runner(bundle: Bundle) -> CudaBackend:
    return CudaBackend(bundle, device="cpu")


@given(st.lists(st.integers(0, 12), max_size=12, unique_by=lambda seat: seat or object()), st.integers(13, 20))
def test_sentences_keep_the_seats_that_exist(wanted: list[int], seats: int) -> None:
    kept = keep_seats(wanted, seats)
    assert len(set(kept.tolist())) == len(wanted)
    assert all(1 <= seat < seats for seat in kept)
    assert all(now == before for before, now in zip(wanted, kept.tolist(), strict=True) if before)


def test_who_sits_too_far_back_moves_to_the_front() -> None:
    assert keep_seats([9, 2, 0, 7], 5).tolist() == [1, 2, 3, 4]


def arranged(runner: Backend, origins: list[Origin], cache: Cache | None = None, slots: int = 16) -> CudaMemory:
    result = cache or runner.new_cache()
    result.arrange(origins, slots=slots, source_width=16)
    assert isinstance(result, CudaMemory)
    return result


def newcomers(runner: Backend, sources: list[tuple[int, ...]]) -> list[Origin]:
    encoded = runner.encode(encoder_batch(sources, source_width=16))
    return [FromEncoder(encoded, i) for i in range(len(sources))]


def step(sentences: list[int], position: int, slots: int = 16) -> StepBatch:
    """The position-th step of sentences, one beam each, in the order of these numbers of their sources."""
    count = len(sentences)
    ancestors = np.zeros((count, 1, 2, slots), np.bool_)
    ancestors[..., : position + 1] = True
    return step_batch(
        layout(np.ones((count, 1), np.bool_)),
        token=np.array([[4 + number + position] for number in sentences]),
        step=np.full(count, position),
        slot=np.full((count, 1), position),
        ancestors=ancestors,
        source_length=np.array([len(SOURCES[number]) for number in sentences]),
        candidates=3,
    )


def alone(bundle: Bundle, number: int, steps: int) -> NDArray[np.float32]:
    """What the host's runner computes for one source, (steps, 3)."""
    runner = CpuBackend(bundle, threads=1)
    cache = runner.new_cache()
    cache.arrange(newcomers(runner, [SOURCES[number]]), slots=16, source_width=16)
    return np.concatenate([runner.step(cache, step([number], position))[0].copy() for position in range(steps)])


def test_addresses_stay_while_sentences_come_and_go(runner: CudaBackend) -> None:
    cache = arranged(runner, newcomers(runner, SOURCES))
    runner.step(cache, step([0, 1, 2, 3], 0))
    own, cross = cache.own.addresses(), cache.cross.addresses()
    run = cache.run_for(step([0, 1, 2, 3], 1))

    arranged(runner, [FromSeat(0), FromSeat(3), FromSeat(2)], cache)
    arranged(runner, [FromSeat(0), *newcomers(runner, SOURCES[:2]), FromSeat(2)], cache)

    assert (cache.own.addresses(), cache.cross.addresses()) == (own, cross)
    assert cache.run_for(step([0, 1, 2, 3], 1)) is run


def test_a_sentence_keeps_its_seat_and_its_past(bundle: Bundle, runner: CudaBackend) -> None:
    cache = arranged(runner, newcomers(runner, SOURCES))
    for position in range(2):
        runner.step(cache, step([0, 1, 2, 3], position))
    seat = int(cache.seat[3])

    # The engine closes the gap: the last one takes the seat of the second.
    arranged(runner, [FromSeat(0), FromSeat(3), FromSeat(2)], cache)

    assert cache.seat[1] == seat
    found, _ = runner.step(cache, step([0, 3, 2], 2))
    expected = [alone(bundle, number, 3)[2] for number in (0, 3, 2)]
    assert np.array_equal(found, expected)


def test_pasts_survive_longer_seats_more_seats_and_another_lane(bundle: Bundle, runner: CudaBackend) -> None:
    cache = arranged(runner, newcomers(runner, SOURCES[:1]))
    runner.step(cache, step([0], 0))
    arranged(runner, [FromSeat(0), *newcomers(runner, SOURCES[1:])], cache, slots=200)
    other = arranged(runner, [FromCache(cache, 0), *newcomers(runner, SOURCES[:1])])

    found, _ = runner.step(other, step([0, 0], 1))
    assert np.array_equal(found[0], alone(bundle, 0, 2)[1])

    arranged(runner, [FromSeat(0)], cache, slots=16)
    found, _ = runner.step(cache, step([0], 1))
    assert np.array_equal(found[0], alone(bundle, 0, 2)[1])


def test_what_was_encoded_stays_until_it_is_seated(bundle: Bundle, runner: CudaBackend) -> None:
    """Two encoder calls of the same shape before either is used."""
    first, second = newcomers(runner, SOURCES[:1]), newcomers(runner, SOURCES[3:])
    cache = arranged(runner, [*first, *second])

    found, _ = runner.step(cache, step([0, 3], 0))

    assert np.array_equal(found, [alone(bundle, number, 1)[0] for number in (0, 3)])


def test_shapes_that_come_often_are_given_graphs(runner: CudaBackend) -> None:
    cache = arranged(runner, newcomers(runner, SOURCES[:2]))
    for position in range(8):
        runner.step(cache, step([0, 1], position))
    assert len(runner.step_graphs) == 1
    assert cache.run_for(step([0, 1], 8)).graph == 1


def test_a_new_lane_is_as_large_as_the_largest_was(runner: CudaBackend) -> None:
    first = arranged(runner, newcomers(runner, SOURCES))
    second = arranged(runner, newcomers(runner, SOURCES[:1]))
    assert second.own.tensor_rows == first.own.tensor_rows
