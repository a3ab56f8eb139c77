"""How fast onnxruntime multiplies matrices here on one thread, and how many operations a decoder step needs."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

MEASURED_S = 0.15
"""For each shape."""
LEAST_RUNS = 4
MICROSOFT = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Product:
    """A product of a step: (rows, depth) by (depth, width), so many times."""

    depth: int
    width: int
    times: int

    def operations(self, rows: int) -> float:
        """Multiplications and additions."""
        return 2.0 * rows * self.depth * self.width * self.times


def products(spec: Mapping[str, Any]) -> list[Product]:
    """Those of one decoder step with caches, of a manifest's `spec`; attention itself is none of them."""
    wide, layers, inner = spec["d_model"], spec["decoder_layers"], spec["decoder_ffn"]
    return [
        Product(wide, 3 * wide, layers),  # query, key, value
        Product(wide, wide, 3 * layers),  # output of both attentions, query of the second
        Product(wide, inner, layers),
        Product(inner, wide, layers),
        Product(wide, spec["target_vocabulary"], 1),
    ]


def step_operations(spec: Mapping[str, Any], rows: int) -> float:
    """Operations of all products of a decoder step with so many rows."""
    return sum(product.operations(rows) for product in products(spec))


def best_rate(spec: Mapping[str, Any], precision: str, rows: int) -> float:
    """The best rate over the shapes of a step, in operations per second: int8 or fp32, one thread."""
    return max(2.0 * rows * p.depth * p.width / fastest_s(precision, rows, p.depth, p.width) for p in products(spec))


def fastest_s(precision: str, rows: int, depth: int, width: int) -> float:
    """The shortest of many runs of one product, in seconds."""
    session, feeds = _session(precision, rows, depth, width)
    binding, output = session.io_binding(), np.zeros((rows, width), np.float32)
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("y", "cpu", 0, np.float32, output.shape, output.ctypes.data)
    return min(_timed_runs(session, binding))


def _timed_runs(session: onnxruntime.InferenceSession, binding: Any) -> Iterator[float]:
    ends, runs = time.perf_counter() + MEASURED_S, 0
    while runs < LEAST_RUNS or time.perf_counter() < ends:
        began = time.perf_counter()
        session.run_with_iobinding(binding)
        yield time.perf_counter() - began
        runs += 1


def _session(
    precision: str, rows: int, depth: int, width: int
) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((depth, width)).astype(np.float32)
    x = rng.standard_normal((rows, depth)).astype(np.float32)
    if precision == "int8":
        feeds: dict[str, np.ndarray[Any, Any]] = {"x": np.clip(np.rint(x * 40) + 128, 0, 255).astype(np.uint8)}
        constants = {
            "w": np.clip(np.rint(weight * 40), -127, 127).astype(np.int8),
            "x_scale": np.array(0.025, np.float32),
            "w_scale": np.full(width, 0.025, np.float32),
            "zero": np.array(128, np.uint8),
        }
        node = helper.make_node("MatMulIntegerToFloat", ["x", *constants], ["y"], domain=MICROSOFT)
        kind = TensorProto.UINT8
    else:
        feeds, constants = {"x": x}, {"w": weight, "bias": np.zeros(width, np.float32)}
        node = helper.make_node("Gemm", ["x", "w", "bias"], ["y"])
        kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kind, [rows, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, width])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]), feeds
