"""Rows move between buffers and within one, all of them at once."""

import numpy as np
import pytest
from numpy.typing import NDArray

from beamline_server.engine.ort.cuda.row_mover import RowMover, flat_rows

TYPES: list[type[np.generic]] = [np.float32, np.float16]


def mover(width: int, dtype: type[np.generic]) -> RowMover:
    return RowMover(["CPUExecutionProvider"], device="cpu", width=width, dtype=dtype)


def place(rows: NDArray[np.generic]) -> tuple[int, int]:
    return rows.ctypes.data, len(rows)


def numbered(rows: int, width: int, dtype: type[np.generic]) -> NDArray[np.generic]:
    return (np.arange(rows)[:, None] + np.arange(width) / 64).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [32, 12, 7])
def test_rows_go_to_another_buffer(width: int, dtype: type[np.generic]) -> None:
    source, target = numbered(9, width, dtype), np.zeros((5, width), dtype)

    mover(width, dtype).move(place(source), place(target), np.array([8, 0, 8]), np.array([1, 4, 2]))

    assert np.array_equal(target[[1, 4, 2]], source[[8, 0, 8]])
    assert not target[[0, 3]].any()


def test_rows_within_a_buffer_are_all_taken_before_the_first_is_put() -> None:
    rows = numbered(6, 16, np.float32)
    before = rows.copy()

    mover(16, np.float32).move(place(rows), place(rows), np.array([0, 1, 2, 3]), np.array([1, 2, 3, 0]))

    assert np.array_equal(rows, before[[3, 0, 1, 2, 4, 5]])


def test_no_rows_are_no_run() -> None:
    nothing = np.zeros(0, np.int64)
    mover(16, np.float32).move((0, 0), (0, 0), nothing, nothing)


def test_rows_of_batch_indices_are_counted_in_every_tensor() -> None:
    rows = flat_rows(2, 100, np.array([10, 40]), np.array([3, 1]))
    assert rows.tolist() == [10, 11, 12, 40, 110, 111, 112, 140]
    assert flat_rows(2, 100, np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
