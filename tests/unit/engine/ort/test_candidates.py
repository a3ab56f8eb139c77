"""The choice of candidates against NumPy: exactly the best, log-probabilities as defined, the bits of a lone row."""

import numpy as np
import pytest

from beamline_server.engine.ort.candidates import Candidates, empty, find_best, log_probabilities, room
from beamline_server.engine.table import FloatArray

VOCABULARIES = [1, 2, 15, 16, 63, 64, 65, 128, 500, 6000, 6007]


def chosen(logits: FloatArray, count: int) -> Candidates:
    best = empty(len(logits), count)
    find_best(logits, room(logits.shape[1]), best)
    return best


def every(logits: FloatArray) -> FloatArray:
    result = np.empty_like(logits)
    log_probabilities(logits, room(logits.shape[1]), result)
    return result


def some(vocabulary: int, *, rows: int = 7, scale: float = 4.0, seed: int = 0) -> FloatArray:
    return (scale * np.random.default_rng(seed).standard_normal((rows, vocabulary))).astype(np.float32)


def expected(logits: FloatArray) -> np.ndarray:
    """Log-softmax as it is defined, in double precision."""
    above = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = above - np.log(np.exp(above).sum(axis=1, keepdims=True))
    return result


def best_tokens(logits: FloatArray, count: int) -> np.ndarray:
    """The largest, of equal ones the lower token first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :count]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("count", [1, 2, 9, 70])
@pytest.mark.parametrize("scale", [0.1, 4.0, 300.0])
def test_candidates_are_the_best_tokens_with_their_log_probabilities(vocabulary: int, count: int, scale: float) -> None:
    logits, count = some(vocabulary, scale=scale), min(count, vocabulary)
    found, logprob = chosen(logits, count), every(logits)
    assert logprob == pytest.approx(expected(logits), rel=1e-6, abs=2e-6)
    assert np.array_equal(found.token, best_tokens(logits, count))
    assert np.array_equal(found.logprob, np.take_along_axis(logprob, found.token, axis=1))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("values", [1, 2, 5])
def test_of_equal_tokens_the_lower_one_comes_first(vocabulary: int, values: int) -> None:
    logits = np.random.default_rng(1).integers(0, values, (20, vocabulary)).astype(np.float32)
    for count in (1, 6, 40):
        found = chosen(logits, min(count, vocabulary))
        assert np.array_equal(found.token, best_tokens(logits, count))


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_that_tokens_come_in_does_not_matter(order: int) -> None:
    """Rising scores replace the worst candidate at every token, falling ones never."""
    logits = np.linspace(-5, 5, 1000, dtype=np.float32)[None, ::order].copy()
    assert np.array_equal(chosen(logits, 12).token, best_tokens(logits, 12))


@pytest.mark.parametrize("vocabulary", [65, 6007])
def test_a_row_has_the_same_bits_alone_and_among_any_others(vocabulary: int) -> None:
    logits = some(vocabulary)
    together = chosen(logits, 9)
    for n in range(len(logits)):
        alone, fewer = chosen(logits[n : n + 1].copy(), 9), chosen(logits[n : n + 1].copy(), 3)
        assert np.array_equal(alone.logprob[0], together.logprob[n])
        assert np.array_equal(alone.token[0], together.token[n])
        assert np.array_equal(fewer.logprob[0], together.logprob[n, :3])


@pytest.mark.parametrize("vocabulary", [3, 64, 130])
def test_tokens_that_were_taken_out_are_left_out(vocabulary: int) -> None:
    logits = some(vocabulary)
    logits[:, 1:] = -np.inf
    found = chosen(logits, 2)
    assert found.logprob.tolist() == [[0.0, -np.inf]] * len(logits)
    assert found.token[:, 0].tolist() == [0] * len(logits)
    assert every(logits)[:, 1:].max() == -np.inf


@pytest.mark.parametrize("vocabulary", [3, 64, 130])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_a_row_with_a_broken_number_has_no_log_probabilities(vocabulary: int, broken: float, place: int) -> None:
    logits = some(vocabulary)
    logits[2, place] = broken
    logits[4] = -np.inf
    found, logprob = chosen(logits, 3), every(logits)
    for n in (2, 4):
        assert not np.isfinite(found.logprob[n]).any()
        assert np.isnan(logprob[n]).all()
    whole = [0, 1, 3, 5, 6]
    assert np.isfinite(found.logprob[whole]).all()
    assert np.array_equal(chosen(logits[whole], 3).logprob, found.logprob[whole])
