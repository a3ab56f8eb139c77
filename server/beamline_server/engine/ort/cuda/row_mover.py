"""Moves rows between buffers on a device, which the host cannot write to: one run, however many rows and tensors.

A buffer of caches is seen as rows of one position each, (rows, parts, part): all layers, batch indices and positions
one after another. The graph takes rows of one buffer and puts them into rows of another, or of the same one: all rows
are taken before the first is put. It is the same for every model, so it is made here and not exported:

    put_parts[M, parts, 2] = put[M, 1, 2] + part_numbers[1, parts, 2]
    moved = ScatterND(target, put_parts, Gather(source, take))

onnxruntime's CUDA kernel of ScatterND has one thread per index, which copies what the index stands for element by
element: therefore rows are put in small parts, and fp16 graphs of bundles do so as well.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from beamline_server.engine.ort.sessions import session_options
from beamline_server.engine.table import IntArray
from beamline_server.graphs import row_parts

_ELEMENT: dict[type[np.generic], int] = {np.float32: 1, np.float16: 10}
_INT64 = 7
_IR_VERSION, _OPSET = 10, 18


class RowMover:
    """Moves rows of one width and type on one device.

    Args:
        providers: As `onnxruntime.InferenceSession`.
        device: Where the buffers are.
        width: Elements of a row.
        dtype: np.float32 or np.float16.
        threads: For what is left on the host.
    """

    def __init__(
        self,
        providers: Sequence[Any],
        *,
        device: str,
        width: int,
        dtype: type[np.generic],
        threads: int = 1,
    ) -> None:
        graph = _graph(_ELEMENT[dtype])
        options = session_options(threads)
        self._session = ort.InferenceSession(graph, options, providers=list(providers), enable_fallback=0)
        self._device = device
        self._dtype = dtype
        self._row = row_parts(width)
        count, _ = self._row
        parts = np.zeros((1, count, 2), np.int64)
        parts[0, :, 1] = np.arange(count)
        self._parts = parts

    def move(self, source: tuple[int, int], target: tuple[int, int], take: IntArray, put: IntArray) -> None:
        """Copy rows; returns when they are there.

        Args:
            source: Address and number of rows of the buffer that they are taken from.
            target: Of the buffer that they are put into; may be the same one.
            take: Rows of the source, (M,).
            put: Rows of the target, (M,), none twice.
        """
        if not len(take):
            return
        binding = self._session.io_binding()
        into = np.zeros((len(put), 1, 2), np.int64)
        into[:, 0, 0] = put
        for name, array in (("take", take), ("put", into), ("part_numbers", self._parts)):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, (address, rows) in (("source", source), ("target", target)):
            binding.bind_input(name, self._device, 0, self._dtype, (rows, *self._row), address)
        address, rows = target
        binding.bind_output("moved", self._device, 0, self._dtype, (rows, *self._row), address)
        self._session.run_with_iobinding(binding)


def flat_rows(tensors: int, tensor_rows: int, starts: IntArray, lengths: IntArray) -> NDArray[np.int64]:
    """Numbers of the rows at `starts` and the ones after them, in each of several tensors of `tensor_rows` rows.

    Args:
        tensors: T.
        tensor_rows: Rows from the start of a tensor to that of the next.
        starts: First rows, within a tensor, (M,).
        lengths: How many from each on, (M,).

    Returns:
        (T * sum of lengths,), tensor by tensor.
    """
    ends = np.cumsum(lengths)
    within = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
    rows: NDArray[np.int64] = (np.arange(tensors)[:, None] * tensor_rows + within).ravel()
    return rows


def _graph(element: int) -> bytes:
    """The model, in ONNX's wire format: the server does without the onnx package."""
    rows = ("rows", "parts", "part")
    inputs = [
        _value("source", element, ("source_rows", *rows[1:])),
        _value("target", element, ("target_rows", *rows[1:])),
        _value("take", _INT64, ("moves",)),
        _value("put", _INT64, ("moves", 1, 2)),
        _value("part_numbers", _INT64, (1, "parts", 2)),
    ]
    nodes = [
        _node("Gather", ("source", "take"), "taken"),
        _node("Add", ("put", "part_numbers"), "put_parts"),
        _node("ScatterND", ("target", "put_parts", "taken"), "moved"),
    ]
    output = _value("moved", element, ("target_rows", *rows[1:]))
    graph = [_bytes(1, node) for node in nodes] + [_bytes(2, b"row_mover")]
    graph += [_bytes(11, value) for value in inputs] + [_bytes(12, output)]
    opset = _bytes(1, b"") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _bytes(8, opset) + _bytes(7, b"".join(graph))


def _node(kind: str, inputs: Sequence[str], output: str) -> bytes:
    """A NodeProto."""
    names = [_bytes(1, name.encode()) for name in inputs]
    return b"".join(names) + _bytes(2, output.encode()) + _bytes(3, output.encode()) + _bytes(4, kind.encode())


def _value(name: str, element: int, axes: Sequence[int | str]) -> bytes:
    """A ValueInfoProto of a tensor."""
    dims = [_number(1, axis) if isinstance(axis, int) else _bytes(2, axis.encode()) for axis in axes]
    shape = b"".join(_bytes(1, dim) for dim in dims)
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _number(1, element) + _bytes(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
