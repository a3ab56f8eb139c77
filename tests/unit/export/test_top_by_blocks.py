"""The candidates of a step: selecting by blocks gives what selecting from the whole row gives."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from beamline_export.build_graphs import block_size, top_by_blocks
from beamline_export.graph_writer import GraphWriter, WeightsFile
from beamline_export.graphs import GraphSpec, TensorSpec


def select(
    folder: Path, logprob: NDArray[np.float32], block: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    with WeightsFile(folder / "weights.bin") as weights:
        g = GraphWriter(weights)
        for value, name in zip(
            top_by_blocks(g, "x", logprob.shape[1], block), ("top_logprob", "top_token"), strict=True
        ):
            g.output(value, name)
    inputs = {"x": TensorSpec("float32", ("N", "V")), "candidates": TensorSpec("int64", (1,))}
    outputs = {"top_logprob": TensorSpec("float32", ("N", "C")), "top_token": TensorSpec("int64", ("N", "C"))}
    model = g.model("test", GraphSpec(inputs, outputs)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    best, token = session.run(list(outputs), {"x": logprob, "candidates": np.array([count], np.int64)})
    return best, token


@pytest.mark.parametrize("count", [1, 2, 10, 13, 34, 120])
@pytest.mark.parametrize("block", [8, 30, 60])
def test_the_best_of_all_are_the_best_of_the_best_blocks(block: int, count: int, tmp_path: Path) -> None:
    """Also for more candidates than there are blocks, and with tokens that were taken out of the vocabulary."""
    x = np.random.default_rng(count).standard_normal((7, 120)).astype(np.float32)
    x[:, 17] = -np.inf
    value, token = select(tmp_path, x, block, count)
    order = np.argsort(-x, axis=1, kind="stable")[:, :count]
    assert (token == order).all()
    assert (value == np.take_along_axis(x, order, 1)).all()


def test_of_equal_numbers_the_first_are_the_same_for_any_count(tmp_path: Path) -> None:
    """How many candidates a step asks for depends on the widest search in it; what a sentence is told must not."""
    x = np.random.default_rng(0).integers(0, 4, (50, 120)).astype(np.float32)
    many_value, many_token = select(tmp_path, x, 10, 60)
    for count in range(1, 60, 7):
        value, token = select(tmp_path, x, 10, count)
        assert (value == many_value[:, :count]).all()
        assert (token == many_token[:, :count]).all()


@pytest.mark.parametrize("vocabulary", [6000, 16000, 32000, 50265, 58000, 58101, 65001])
def test_usual_vocabularies_have_a_block_size(vocabulary: int) -> None:
    block = block_size(vocabulary)
    assert block is not None
    assert vocabulary % block == 0


def test_a_prime_vocabulary_has_none() -> None:
    assert block_size(58109) is None
