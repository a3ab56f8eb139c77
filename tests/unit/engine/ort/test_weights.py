"""Weights are in memory while a session needs them, and what several sessions take is there once."""

import io

import numpy as np
import pytest

from beamline_server.bundle import VerifiedStream
from beamline_server.engine.ort.weights import Weights
from beamline_server.graph_file import GraphFile, StoredTensor
from beamline_server.graphs import GraphSpec
from beamline_server.manifest import WEIGHTS

PAGES = 5 << 12
CONTENT = np.random.default_rng(0).integers(1, 127, 3 * PAGES, np.int8).tobytes()


def graph(**parts: int) -> GraphFile:
    """A graph that takes int8 matrices, by their names; each is one part of the file."""
    tensors = {
        name: StoredTensor((5, 1 << 12), PAGES, WEIGHTS, number * PAGES, PAGES, 3) for name, number in parts.items()
    }
    return GraphFile(GraphSpec({}, {}), tensors)


GRAPHS = {"encoder": graph(table=0, encoder=1), "first": graph(same_table=0), "last": graph(table=0, last=2)}


@pytest.fixture
def weights() -> Weights:
    stream = VerifiedStream(io.BufferedReader(io.BytesIO(CONTENT)), len(CONTENT))
    return Weights(stream, len(CONTENT), GRAPHS)


def part(weights: Weights, number: int) -> bytes:
    return weights.content[number * PAGES : (number + 1) * PAGES]


def test_what_a_graph_takes_is_there_and_goes_with_its_session(weights: Weights) -> None:
    weights.read_for("encoder")
    assert weights.content[: 2 * PAGES] == CONTENT[: 2 * PAGES]
    assert not any(part(weights, 2)), "nobody has asked for it"
    weights.drop("encoder")
    assert not any(part(weights, 1))
    assert part(weights, 0) == CONTENT[:PAGES], "others take it, too"
    weights.read_for("last")
    assert part(weights, 2) == CONTENT[2 * PAGES :]


def test_what_several_graphs_take_is_one_memory(weights: Weights) -> None:
    shared = [weights.read_for(name) for name in GRAPHS]
    for name in GRAPHS:
        weights.drop(name)
    assert [list(arrays) for arrays in shared] == [["table"], ["same_table"], ["table"]]
    arrays = [array for by_name in shared for array in by_name.values()]
    assert len({array.ctypes.data for array in arrays}) == 1
    assert all(array.tobytes() == CONTENT[:PAGES] and array.shape == (5, 1 << 12) for array in arrays)
