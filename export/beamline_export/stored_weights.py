"""Whether what the graphs of a bundle multiply by stands for the weights it was made of, product by product.

What rounding does to the answers of a model depends on the model, and with weights of 4 bits it can hide a layer whose
scale is wrong. What it does to one weight does not: it is within a bound, and a wrong scale is far beyond.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from beamline_export.blocks import Blocks
from beamline_export.spec import Array, ExportError

MOST_ERROR = 0.25
"""Of a weight as it is stored, relative to its size. By rounding alone it is below 0.13 with 4 bits, and 0.01 is usual
with 8; a scale that is wrong by a factor of two makes it 0.5 or 1."""
_PROBES = 4
_INT8, _INT4 = "MatMulIntegerToFloat", "MatMulNBits"


def probe(weight: Array) -> Array:
    """What a weight (out, in) makes of some random rows, (out, rows): tells it from another without keeping it."""
    rows = np.random.default_rng(weight.shape[1]).standard_normal((weight.shape[1], _PROBES))
    made: Array = weight @ rows.astype(np.float32)
    return made


def check_stored_weights(graphs: Mapping[str, onnx.ModelProto], file: Path, expected: Mapping[str, Array]) -> float:
    """Compare the weights of all quantized products, as they are in the file and as the graphs refer to them.

    Args:
        graphs: The graphs of a bundle.
        file: Its file of weights.
        expected: What `probe` makes of each weight, by its name.

    Returns:
        The largest error of a weight, relative to its size.

    Raises:
        ExportError: a weight is not what it was made of.
    """
    errors: dict[str, float] = {}
    for graph in graphs.values():
        stored = _Stored(graph.graph, file)
        for node in graph.graph.node:
            if node.op_type in (_INT8, _INT4):
                name, weight = stored.weight(node)
                wanted, found = expected[name], probe(weight)
                size = float(np.linalg.norm(wanted))
                error = float(np.linalg.norm(found - wanted))
                errors[name] = float(np.maximum(errors.get(name, 0.0), error / size if size else error))
    # Not within the bound, either, is what is no number.
    if wrong := [name for name, error in errors.items() if not error <= MOST_ERROR]:
        worst = ", ".join(f"{name} by {errors[name]:.2g}" for name in wrong[:3])
        raise ExportError(
            f"{len(wrong)} weights are not stored as they are ({worst} of their size; allowed: {MOST_ERROR:g}); "
            "keep them with --keep-fp32, or export it as fp32"
        )
    return max(errors.values(), default=0.0)


class _Stored:
    """The weights of a graph as they are in the file."""

    def __init__(self, graph: onnx.GraphProto, file: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {output: node for node in graph.node for output in node.output}
        self._file = file

    def weight(self, node: NodeProto) -> tuple[str, Array]:
        """What a product multiplies by, (out, in), and its name."""
        name = node.input[1]
        if node.op_type == _INT4:
            steps, scales, zeros = (self._array(value) for value in node.input[1:4])
            (inputs,) = (attribute.i for attribute in node.attribute if attribute.name == "K")
            return name, Blocks(steps, scales, zeros).weight(inputs)
        transposed = name not in self._tensors
        if transposed:
            name = self._makers[name].input[0]
        columns = self._array(name) if transposed else self._array(name).T
        weight: Array = columns.astype(np.float32) * self._array(node.input[3])[:, None]
        return name, weight

    def _array(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(tensor))
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        array: NDArray[Any] = np.memmap(self._file, dtype, "r", int(place["offset"]), tuple(tensor.dims))
        return array
