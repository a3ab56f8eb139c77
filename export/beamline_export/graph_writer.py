"""Writes ONNX graphs node by node, with every weight stored once in a file that all graphs share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from beamline_server.graphs import GraphSpec, TensorSpec

OPSET = 24
CONTRIB = "com.microsoft"
_ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
# Smaller tensors stay inside the graph file: a node's constant is easier to read there, and costs nothing.
_EXTERNAL_FROM_BYTES = 1024
_ALIGNMENT = 64
_FP32 = 4


Make = Callable[[], NDArray[Any]]


class WeightsFile:
    """The file of all weights. A name is stored once, however many graphs ask for it.

    A context manager: the file is complete when it ends.

    Args:
        path: The file.
        advance: Is told of each weight that is written, by its bytes in fp32.
    """

    def __init__(self, path: Path, advance: Callable[[int], object] = lambda _: None) -> None:
        self._path = path
        self._advance = advance
        self._stream: BinaryIO | None = None
        self._written: dict[str, TensorProto] = {}

    def __enter__(self) -> "WeightsFile":
        self._stream = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def store(self, name: str, make: Make) -> TensorProto:
        """The initializer of this name. Its array is made at the first use, and not kept."""
        if name not in self._written:
            array = make()
            self._written[name] = self._write(array)
            self._written[name].name = name
            self._advance(_FP32 * array.size)
        return self._written[name]

    def _write(self, array: NDArray[Any]) -> TensorProto:
        if self._stream is None:
            raise ValueError("WeightsFile is a context manager; store inside it")
        if array.nbytes < _EXTERNAL_FROM_BYTES:
            return numpy_helper.from_array(array)
        self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
        offset = self._stream.tell()
        self._stream.write(np.ascontiguousarray(array).data)
        tensor = TensorProto(data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._path.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class GraphWriter:
    """Collects nodes and initializers of one graph; values are known by their names."""

    def __init__(self, weights: WeightsFile) -> None:
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._made: dict[str, tuple[str, ...]] = {}
        self._outputs: dict[str, str] = {}
        self._added: dict[str, TensorSpec] = {}

    def op(self, kind: str, inputs: Sequence[str], *, outputs: int = 1, **attributes: Any) -> list[str]:
        """Append a node; returns the names of its outputs."""
        stem = f"{kind.rpartition(':')[2]}_{len(self._nodes)}"
        names = [stem] if outputs == 1 else [f"{stem}_{i}" for i in range(outputs)]
        self._append(kind, inputs, names, attributes)
        return names

    def one(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns its name."""
        return self.op(kind, inputs, **attributes)[0]

    def output(self, value: str, name: str) -> None:
        """Make what a node gives the graph output of this name."""
        self._outputs[value] = name

    def add_output(self, value: str, name: str, tensor: TensorSpec) -> None:
        """As `output`, beyond the contract."""
        self.output(value, name)
        self._added[name] = tensor

    def once(self, key: str, make: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """Names of values that this graph computes once, at the first use."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def weight(self, name: str, make: Make) -> str:
        """An initializer; asking again for the same name, in any graph of the bundle, gives the same one."""
        if name not in self._initializers:
            self._initializers[name] = self._weights.store(name, make)
        return name

    def constant(self, value: Any, dtype: type[np.generic]) -> str:
        """A small constant, named by its value."""
        array = np.asarray(value, dtype)
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.ravel()))}"
        return self.weight(name, lambda: array)

    def model(self, name: str, spec: GraphSpec) -> onnx.ModelProto:
        """The finished graph with the inputs and outputs of its contract, and what `add_output` added."""
        for node in self._nodes:
            node.input[:] = [self._outputs.get(value, value) for value in node.input]
            node.output[:] = [self._outputs.get(value, value) for value in node.output]
        graph = helper.make_graph(
            self._nodes,
            name,
            [_value_info(key, tensor) for key, tensor in spec.inputs.items()],
            [_value_info(key, tensor) for key, tensor in {**spec.outputs, **self._added}.items()],
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11, producer_name="beamline")

    def _append(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], attributes: dict[str, Any]) -> None:
        contrib, _, plain = kind.rpartition(":")
        name, domain = f"{plain}_{len(self._nodes)}", CONTRIB if contrib else ""
        self._nodes.append(helper.make_node(plain, inputs, outputs, name=name, domain=domain, **attributes))


def _value_info(name: str, tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _ELEMENT[tensor.element_type], list(tensor.axes))
