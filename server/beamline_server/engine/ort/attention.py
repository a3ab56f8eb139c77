"""Attention of packed rows over keys and values that lie anywhere in memory: compiled, a row at a time.

Each row attends to the rows of a list, whose numbers say where keys and values are; so sequences of any length stand
side by side without padding, and a hypothesis attends to its own slots without a mask. Sums go in the order of the
list, in vectors of 16: a row's result depends on nothing but its own query and list. Several heads of queries may share
one of keys and values, each as many neighbours (grouped queries, Ainslie et al. 2023).

Axes: N rows, X lists, M rows of keys and values, W places of a list, D width of queries, B width of keys and values, H
heads of queries.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.compiled import compiled
from beamline_server.engine.ort.vectors import (
    LANES,
    add,
    exponential,
    larger,
    largest,
    load,
    multiply,
    multiply_add,
    splat,
    store,
    store_totals,
    total,
    zero,
)

Floats = NDArray[np.float32]
Places = NDArray[np.int32]

TOGETHER = 4
"""Lists are read by so many places at a time: behind its end each repeats a place up to a multiple of this."""
_FAR_BELOW = np.float32(-1e30)
Shape = tuple[int, int, int]
"""Heads of queries, numbers of a head, and width of keys and values."""
_BLOCK = 64
"""Numbers of a value that are summed up together, in four vectors."""


class Bias(NamedTuple):
    """What is added to scores by the distance of what is attended to.

    Attributes:
        table: A number for each head and distance, (H, distances); (0, 0) adds nothing.
        distance: The distance of each place of the lists, (X, W).
    """

    table: Floats
    distance: Places


def no_bias() -> Bias:
    """Adds nothing."""
    return Bias(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32))


def room(heads: int, longest: int) -> tuple[Floats, Floats]:
    """Room for the weights of one row over lists of up to `longest` places, and for the inverse of their sums."""
    return np.zeros(heads * _rounded(longest), np.float32), np.zeros(heads, np.float32)


def _rounded(places: int) -> int:
    return -(-places // LANES) * LANES


@compiled
def attend(  # noqa: PLR0913, PLR0917 - what attention is made of
    query: Floats,
    keys: Floats,
    values: Floats,
    lists: Places,
    lengths: Places,
    list_of: Places,
    heads: int,
    weights: Floats,
    inverse: Floats,
    out: Floats,
    bias: Bias,
) -> None:
    """Scaled dot-product attention of some rows.

    Args:
        query: The first D numbers of each row are its query, (N, >= D).
        keys: (M, B).
        values: (M, B).
        lists: Rows of keys and values, (X, W).
        lengths: How many each list has, at least one, (X,).
        list_of: The list of each row, (N,).
        heads: H.
        weights: Room for one row, (H * W rounded up to a multiple of 16,).
        inverse: Room for one row, (H,).
        out: Receives the results, (N, D).
        bias: What is added to scores.
    """
    width = out.shape[1]
    size = width // heads
    shape = (heads, size, keys.shape[1])
    q, k, v, y, stride = query.reshape(-1), keys.reshape(-1), values.reshape(-1), out.reshape(-1), query.shape[1]
    scale = np.float32(1.0) / np.sqrt(np.float32(size))
    for row in range(len(list_of)):
        places, count = lists[list_of[row]], int(lengths[list_of[row]])
        if size % LANES == 0:
            score(q, row * stride, k, places, count, shape, scale, weights)
            if len(bias.table) > 0:
                add_bias(bias.table, bias.distance[list_of[row]], count, weights)
            normalize(weights, count, heads, inverse)
            weigh(v, places, count, shape, weights, inverse, y, row * width)
        else:
            attend_plainly(
                q, row * stride, k, v, places, count, shape, scale, weights, y, row * width, bias, list_of[row]
            )


@compiled
def score(  # noqa: PLR0913, PLR0917 - as `attend`
    q: Floats, at: int, k: Floats, places: Places, count: int, shape: Shape, scale: np.float32, weights: Floats
) -> None:
    """Write the scaled products of a query with the keys of its list, head by head, each (W,)."""
    heads, size, width = shape
    rounded, sharing = (count + LANES - 1) // LANES * LANES, heads * size // width
    for head in range(heads):
        own, first = at + head * size, head // sharing * size
        for t in range(0, count, TOGETHER):
            a = np.int64(places[t]) * width + first
            b = np.int64(places[t + 1]) * width + first
            c = np.int64(places[t + 2]) * width + first
            d = np.int64(places[t + 3]) * width + first
            sum_a, sum_b, sum_c, sum_d = zero(), zero(), zero(), zero()
            for j in range(0, size, LANES):
                part = load(q, own + j)
                sum_a = multiply_add(part, load(k, a + j), sum_a)
                sum_b = multiply_add(part, load(k, b + j), sum_b)
                sum_c = multiply_add(part, load(k, c + j), sum_c)
                sum_d = multiply_add(part, load(k, d + j), sum_d)
            store_totals(weights, head * rounded + t, sum_a, sum_b, sum_c, sum_d, scale)


@compiled
def add_bias(table: Floats, distance: Places, count: int, weights: Floats) -> None:
    """Add to the scores of a list, head by head, what the distances of its places say."""
    rounded = (count + LANES - 1) // LANES * LANES
    for head in range(len(table)):
        for t in range(count):
            weights[head * rounded + t] += table[head, distance[t]]


@compiled
def normalize(weights: Floats, count: int, heads: int, inverse: Floats) -> None:
    """Turn scores into weights, and write the inverse of their sums, per head."""
    rounded = (count + LANES - 1) // LANES * LANES
    for head in range(heads):
        first = head * rounded
        for t in range(count, rounded):
            weights[first + t] = _FAR_BELOW
        most = load(weights, first)
        for t in range(LANES, rounded, LANES):
            most = larger(most, load(weights, first + t))
        below, summed = splat(-largest(most)), zero()
        for t in range(0, rounded, LANES):
            power = exponential(add(load(weights, first + t), below))
            store(weights, first + t, power)
            summed = add(summed, power)
        # What was filled up adds e^-87, which changes no sum from 1 on.
        inverse[head] = np.float32(1.0) / total(summed)


@compiled
def weigh(  # noqa: PLR0913, PLR0917 - as `attend`
    v: Floats,
    places: Places,
    count: int,
    shape: Shape,
    weights: Floats,
    inverse: Floats,
    y: Floats,
    at: int,
) -> None:
    """Write the weighted sums of the values of a list."""
    heads, size, width = shape
    rounded, sharing = (count + LANES - 1) // LANES * LANES, heads * size // width
    for head in range(heads):
        first, j, end = head * rounded, head // sharing * size, head // sharing * size + size
        to = at + head * size - j
        factor = splat(inverse[head])
        while j + _BLOCK <= end:
            a, b, c, d = zero(), zero(), zero(), zero()
            for t in range(count):
                weight, o = splat(weights[first + t]), np.int64(places[t]) * width + j
                a = multiply_add(weight, load(v, o), a)
                b = multiply_add(weight, load(v, o + LANES), b)
                c = multiply_add(weight, load(v, o + 2 * LANES), c)
                d = multiply_add(weight, load(v, o + 3 * LANES), d)
            store(y, to + j, multiply(a, factor))
            store(y, to + j + LANES, multiply(b, factor))
            store(y, to + j + 2 * LANES, multiply(c, factor))
            store(y, to + j + 3 * LANES, multiply(d, factor))
            j += _BLOCK
        while j < end:
            a, b = zero(), zero()
            for t in range(0, count - 1, 2):
                a = multiply_add(splat(weights[first + t]), load(v, np.int64(places[t]) * width + j), a)
                b = multiply_add(splat(weights[first + t + 1]), load(v, np.int64(places[t + 1]) * width + j), b)
            if count % 2:
                a = multiply_add(splat(weights[first + count - 1]), load(v, np.int64(places[count - 1]) * width + j), a)
            store(y, to + j, multiply(add(a, b), factor))
            j += LANES


@compiled
def attend_plainly(  # noqa: PLR0913, PLR0917 - as `attend`
    q: Floats,
    at: int,
    k: Floats,
    v: Floats,
    places: Places,
    count: int,
    shape: Shape,
    scale: np.float32,
    weights: Floats,
    y: Floats,
    to: int,
    bias: Bias,
    list_of_row: int,
) -> None:
    """The same number by number, for heads whose size is no multiple of 16."""
    heads, size, width = shape
    sharing = heads * size // width
    for head in range(heads):
        first, shared = head * size, head // sharing * size
        most, summed = _FAR_BELOW, np.float32(0.0)
        for t in range(count):
            product, o = np.float32(0.0), places[t] * width + shared
            for j in range(size):
                product += q[at + first + j] * k[o + j]
            weights[t] = product * scale
            if len(bias.table) > 0:
                weights[t] += bias.table[head, bias.distance[list_of_row, t]]
            most = max(most, weights[t])
        for t in range(count):
            weights[t] = np.exp(weights[t] - most)
            summed += weights[t]
        y[to + first : to + first + size] = 0.0
        for t in range(count):
            o = places[t] * width + shared
            for j in range(size):
                y[to + first + j] += weights[t] / summed * v[o + j]
