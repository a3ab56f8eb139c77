"""Encoder calls at fixed addresses: outputs stay as long as somebody may read them, and shapes are used again."""

import gc
from collections.abc import Callable

import numpy as np
import pytest

from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Encoded
from beamline_server.engine.ort.cpu import CpuBackend
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.ort.cuda.buckets import FromEncoder
from beamline_server.engine.ort.cuda.captured_graphs import CAPTURED_FROM_USE
from beamline_server.engine.ort.cuda.fixed_run import KEPT_RUNS
from beamline_server.engine.ort.cuda.memory import EncodedRows

SOURCES = [(5, 6, 7, 1), (8, 1), (9, 10, 11, 12, 13, 1)]


@pytest.fixture
def backend(tiny: Callable[[str], Bundle]) -> CudaBackend:
    return CudaBackend(tiny("fp32"), device="cpu")


def rows_of(encoded: Encoded) -> EncodedRows:
    assert isinstance(encoded.tensors, EncodedRows)
    return encoded.tensors


def test_padding_is_what_the_rectangle_has_beside_its_tokens(
    backend: CudaBackend, tiny: Callable[[str], Bundle]
) -> None:
    """On a device all rows are computed; on the CPU attention alone has a rectangle."""
    rows = rows_of(encoded := backend.encode(SOURCES))
    assert encoded.padded_tokens == rows.tensor_rows - 12
    assert rows.source_length.tolist() == [4, 2, 6]
    assert CpuBackend(tiny("fp32"), threads=1).encode(SOURCES).padded_tokens == 3 * 8 - 12


def test_outputs_that_may_still_be_read_are_not_written_to(backend: CudaBackend) -> None:
    first, second = backend.encode(SOURCES), backend.encode(SOURCES)
    addresses = {rows_of(first).address, rows_of(second).address}
    assert len(addresses) == 2
    del first, second
    gc.collect()
    assert rows_of(backend.encode(SOURCES)).address in addresses


def test_a_shape_that_comes_often_is_given_a_graph(backend: CudaBackend) -> None:
    for _ in range(CAPTURED_FROM_USE):
        backend.encode(SOURCES)
        gc.collect()
    assert len(backend.encoder_graphs) == 1


def test_calls_that_are_held_do_not_pile_up_runs_for_good(backend: CudaBackend) -> None:
    """Of the runs that have no graph, so many stay bound."""
    held = [backend.encode(SOURCES) for _ in range(KEPT_RUNS + 4)]
    assert len({rows_of(encoded).address for encoded in held}) == len(held)
    assert len(backend._encoder._entries) == KEPT_RUNS


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_source_is_encoded_alike_alone_and_beside_others(tiny: Callable[[str], Bundle], precision: str) -> None:
    """Cross-attention keys and values as they arrive in a memory."""
    backend = CudaBackend(tiny(precision), device="cpu")
    found = []
    for sources in (SOURCES, SOURCES[1:2]):
        memory = backend.new_memory()
        number = len(sources) // 2
        memory.arrange([FromEncoder(backend.encode(sources), number)], slots=8, source_width=8)
        tensors = memory.cross
        content = tensors.buffer.read()[: tensors.tensors * tensors.tensor_rows * tensors.row_bytes]
        cut = content.reshape(tensors.tensors, tensors.tensor_rows, tensors.row_bytes)
        place = int(memory.batch_index[0]) * tensors.length
        found.append(cut[:, place : place + len(SOURCES[1])])
    assert found[0].any()
    assert np.array_equal(found[0], found[1])
