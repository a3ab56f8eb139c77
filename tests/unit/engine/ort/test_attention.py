"""Attention over lists of slots against NumPy in double precision, and a row's bits wherever it stands."""

from typing import NamedTuple

import numpy as np
import pytest

from beamline_server.engine.ort.attention import TOGETHER, Bias, attend, no_bias, room
from beamline_server.engine.table import FloatArray

SLOTS = 300
HEADS = [(4, 64), (8, 32), (2, 16), (1, 128), (2, 80), (2, 48), (3, 8), (3, 5)]
"""Heads and their sizes: of whole blocks, of parts of one, and of no whole vector."""
LENGTHS = [1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 64, 130]


class Case(NamedTuple):
    """Rows that attend to lists of slots."""

    query: FloatArray
    keys: FloatArray
    values: FloatArray
    lists: list[np.ndarray]
    list_of: np.ndarray
    heads: int


def case(heads: int, size: int, lengths: list[int], *, scale: float = 1.0, seed: int = 0, sharing: int = 1) -> Case:
    """A row for each length, and one more for the first list, whose queries are the first part of wider rows.

    So many heads of queries share each one of keys and values.
    """
    rng, width = np.random.default_rng(seed), heads * size
    query = (scale * rng.standard_normal((len(lengths) + 1, 3 * width))).astype(np.float32)
    keys, values = (rng.standard_normal((SLOTS, width // sharing)).astype(np.float32) for _ in range(2))
    lists = [rng.permutation(SLOTS)[:length] for length in lengths]
    return Case(query, keys, values, lists, np.array([*range(len(lengths)), 0], np.int32), heads)


def attended(of: Case, rows: list[int] | None = None, bias: Bias | None = None) -> FloatArray:
    """What the loops give for some of the rows, standing in this order; for all of them if None is given."""
    rows = list(range(len(of.list_of))) if rows is None else rows
    longest = max(map(len, of.lists))
    places = np.zeros((len(of.lists), longest + TOGETHER), np.int32)
    for number, slots in enumerate(of.lists):
        places[number, : len(slots)] = slots
        places[number, len(slots) : len(slots) + TOGETHER] = slots[0]
    lengths = np.array([len(slots) for slots in of.lists], np.int32)
    out = np.full((len(rows), of.query.shape[1] // 3), np.nan, np.float32)
    query, list_of = np.ascontiguousarray(of.query[rows]), of.list_of[rows]
    bias = no_bias() if bias is None else bias
    attend(query, of.keys, of.values, places, lengths, list_of, of.heads, *room(of.heads, longest), out, bias)
    return out


def expected(of: Case, bias: Bias | None = None) -> np.ndarray:
    """Softmax attention as it is defined, head by head, in double precision."""
    width = of.query.shape[1] // 3
    sharing, rows = width // of.keys.shape[1], []
    for query, number in zip(of.query[:, :width].astype(np.float64), of.list_of, strict=True):
        keys, values = (a[of.lists[number]].astype(np.float64) for a in (of.keys, of.values))
        parts = []
        for h, head in enumerate(np.split(np.arange(width), of.heads)):
            shared = np.arange(len(head)) + h // sharing * len(head)
            scores = keys[:, shared] @ query[head] / np.sqrt(len(head))
            if bias is not None:
                scores += bias.table[h, bias.distance[number, : len(scores)]]
            weights = np.exp(scores - scores.max())
            parts.append(weights / weights.sum() @ values[:, shared])
        rows.append(np.concatenate(parts))
    return np.stack(rows)


@pytest.mark.parametrize(("heads", "size"), HEADS)
def test_it_is_attention_as_it_is_defined(heads: int, size: int) -> None:
    of = case(heads, size, LENGTHS)
    assert attended(of) == pytest.approx(expected(of), abs=2e-6)


@pytest.mark.parametrize(("heads", "size", "sharing"), [(4, 64, 2), (8, 32, 8), (6, 16, 3), (4, 80, 2), (6, 5, 2)])
def test_heads_of_queries_share_those_of_keys_and_values(heads: int, size: int, sharing: int) -> None:
    of = case(heads, size, LENGTHS, sharing=sharing)
    together = attended(of)
    assert together == pytest.approx(expected(of), abs=2e-6)
    for row in range(len(of.list_of)):
        assert np.array_equal(attended(of, [row])[0], together[row])


@pytest.mark.parametrize(("heads", "size"), HEADS)
def test_what_distances_say_is_added_to_scores(heads: int, size: int) -> None:
    of, rng = case(heads, size, LENGTHS), np.random.default_rng(5)
    table = (3 * rng.standard_normal((heads, 9))).astype(np.float32)
    bias = Bias(table, rng.integers(0, 9, (len(LENGTHS), max(LENGTHS) + TOGETHER)).astype(np.int32))
    found = attended(of, bias=bias)
    assert found == pytest.approx(expected(of, bias), abs=2e-6)
    assert not np.allclose(found, attended(of), atol=1e-2)


@pytest.mark.parametrize(("heads", "size"), HEADS)
@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_scores_may_be_all_the_same_or_far_apart(heads: int, size: int, scale: float) -> None:
    """Weights below what the exponential can tell from zero count as nothing."""
    of = case(heads, size, [1, 7, 40], scale=scale, seed=3)
    assert attended(of) == pytest.approx(expected(of), abs=1e-5 if scale < 1e3 else 2e-2)


@pytest.mark.parametrize(("heads", "size"), HEADS)
def test_a_row_has_the_same_bits_alone_and_among_any_others(heads: int, size: int) -> None:
    of = case(heads, size, LENGTHS)
    together = attended(of)
    for row in range(len(of.list_of)):
        assert np.array_equal(attended(of, [row])[0], together[row])
    backwards = list(reversed(range(len(of.list_of))))
    assert np.array_equal(attended(of, backwards)[::-1], together)


@pytest.mark.parametrize(("heads", "size"), HEADS)
def test_where_slots_are_does_not_matter_but_for_their_order(heads: int, size: int) -> None:
    of = case(heads, size, [29])
    moved = np.random.default_rng(1).permutation(SLOTS)
    keys, values = np.empty_like(of.keys), np.empty_like(of.values)
    keys[moved], values[moved] = of.keys, of.values
    elsewhere = of._replace(keys=keys, values=values, lists=[moved[slots] for slots in of.lists])
    assert np.array_equal(attended(of), attended(elsewhere))


@pytest.mark.parametrize(("heads", "size"), HEADS)
def test_nothing_but_the_listed_slots_is_looked_at(heads: int, size: int) -> None:
    of = case(heads, size, [5, 18])
    unlisted = np.setdiff1d(np.arange(SLOTS), np.concatenate(of.lists))
    keys, values = of.keys.copy(), of.values.copy()
    keys[unlisted] = values[unlisted] = np.nan
    assert np.array_equal(attended(of), attended(of._replace(keys=keys, values=values)))


@pytest.mark.parametrize(("heads", "size"), HEADS)
@pytest.mark.parametrize("which", ["query", "keys", "values"])
def test_what_is_no_number_does_not_become_one(which: str, heads: int, size: int) -> None:
    of = case(heads, size, [3, 18])
    spoilt = getattr(of, which).copy()
    spoilt[of.lists[1][7] if which != "query" else 1, 0] = np.nan
    found = attended(of._replace(**{which: spoilt}))
    assert np.isnan(found[1, 0])
    assert not np.isnan(found[0]).any()
