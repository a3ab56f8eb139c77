"""onnxruntime through its C interface: the same results as through Python's, its errors in its words."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from beamline_server.engine.ort.c_api import Binding, NativeError, NativeSession
from beamline_server.engine.ort.settings import settings

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def model() -> bytes:
    """y = x @ w, rows of a table by their numbers; w is in a file of its own."""
    weight = numpy_helper.from_array(WEIGHTS, "w")
    set_external_data(weight, "weights.bin", offset=0, length=WEIGHTS.nbytes)
    weight.ClearField("raw_data")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Gather", ["y", "number"], ["row"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
            helper.make_tensor_value_info("number", TensorProto.INT64, ["M"]),
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [axis, 3])
            for name, axis in (("y", "N"), ("row", "M"))
        ],
        [weight],
    )
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    ).SerializeToString()
    return made


def opened(*, threads: int = 1) -> NativeSession:
    return NativeSession(model(), ("weights.bin", WEIGHTS.tobytes()), threads=threads, settings=settings(threads))


def arrays(rows: int = 5, numbers: tuple[int, ...] = (2, 0)) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs, and room for outputs."""
    x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
    outputs = {"y": np.zeros((rows, 3), np.float32), "row": np.zeros((len(numbers), 3), np.float32)}
    return {"x": x, "number": np.array(numbers)}, outputs


@pytest.mark.parametrize("threads", [1, 2])
def test_it_computes_what_the_python_interface_does(threads: int) -> None:
    options = onnxruntime.SessionOptions()
    content = WEIGHTS.tobytes()
    options.add_external_initializers_from_files_in_memory(["weights.bin"], [content], [len(content)])
    plain = onnxruntime.InferenceSession(model(), options, providers=["CPUExecutionProvider"])
    session = opened(threads=threads)
    for rows in (1, 5, 64):
        inputs, outputs = arrays(rows, numbers=(0,))
        Binding(session, inputs, outputs).run()
        for found, wanted in zip(outputs.values(), plain.run(None, inputs), strict=True):
            assert np.array_equal(found, wanted)


def test_a_shared_weight_is_read_where_it_is() -> None:
    """What the file has in its place does not count."""
    absent = bytes(WEIGHTS.nbytes)
    session = NativeSession(
        model(), ("weights.bin", absent), threads=1, settings=settings(1), shared={"w": WEIGHTS.copy()}
    )
    inputs, outputs = arrays()
    Binding(session, inputs, outputs).run()
    assert outputs["y"] == pytest.approx(inputs["x"] @ WEIGHTS)


def test_what_is_bound_is_read_and_written_at_every_run() -> None:
    inputs, outputs = arrays()
    binding = Binding(opened(), inputs, outputs)
    binding.run()
    first = outputs["y"].copy()
    inputs["x"] *= 2
    binding.run()
    assert outputs["y"] == pytest.approx(2 * first)


def test_outputs_that_nobody_binds_are_computed_for_nobody() -> None:
    inputs, outputs = arrays()
    Binding(opened(), inputs, {"row": outputs["row"]}).run()
    assert not outputs["y"].any()
    assert outputs["row"] == pytest.approx(inputs["x"][[2, 0]] @ WEIGHTS)


def test_outputs_have_their_names() -> None:
    assert opened().outputs == ["y", "row"]


def test_what_fails_is_told_in_onnxruntimes_words_and_nothing_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    session = opened()
    inputs, outputs = arrays(numbers=(2, 7))
    binding = Binding(session, inputs, outputs)
    with pytest.raises(NativeError, match="out of data bounds"):
        binding.run()
    inputs["number"][1] = 1
    binding.run()
    assert outputs["row"] == pytest.approx(inputs["x"][[2, 1]] @ WEIGHTS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("graph", [b"", b"no model", model()[:-20]])
def test_what_is_no_model_is_refused(graph: bytes) -> None:
    with pytest.raises(NativeError):
        NativeSession(graph, ("weights.bin", WEIGHTS.tobytes()), threads=1, settings={})


def test_weights_that_are_cut_short_are_refused() -> None:
    with pytest.raises(NativeError):
        NativeSession(model(), ("weights.bin", WEIGHTS.tobytes()[:20]), threads=1, settings=settings(1))


def test_a_name_that_the_graph_does_not_have_is_refused() -> None:
    inputs, outputs = arrays()
    with pytest.raises(NativeError, match="z"):
        Binding(opened(), {**inputs, "z": inputs["x"]}, outputs)


def test_only_whole_arrays_can_be_bound() -> None:
    inputs, outputs = arrays()
    with pytest.raises(AssertionError, match="whole arrays"):
        Binding(opened(), {**inputs, "x": inputs["x"][:, ::-1]}, outputs)
