"""Runs at fixed addresses: inputs go over in one copy, and only what is wanted is bound and comes back."""

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from beamline_server.engine.ort.cuda.fixed_run import DeviceBuffer, FixedRun, concrete
from beamline_server.engine.ort.sessions import session_options

AXES = {"N": 3, "D": 4}


@pytest.fixture
def session() -> ort.InferenceSession:
    """sum = a + b, product = a * b, count = the number of c, which stays on the host."""
    axes = ["N", "D"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in "ab"]
    inputs.append(helper.make_tensor_value_info("c", TensorProto.INT64, [1]))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("sum", "product")]
    outputs.append(helper.make_tensor_value_info("count", TensorProto.INT64, [1]))
    kinds = (("Add", ["a", "b"], "sum"), ("Mul", ["a", "b"], "product"), ("Identity", ["c"], "count"))
    nodes = [helper.make_node(kind, needed, [made]) for kind, needed, made in kinds]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), session_options(1), enable_fallback=0)


def numbers(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((3, 4), np.float32)


def test_what_was_sent_is_computed_and_what_was_computed_received(session: ort.InferenceSession) -> None:
    run = FixedRun(session, "cpu", AXES, host={"c": np.array([7], np.int64)})
    assert run.inputs.keys() == {"a", "b"}
    for seed in (1, 2):
        run.inputs["a"][:], run.inputs["b"][:] = numbers(seed), numbers(seed + 5)
        run.send()
        run.run(ort.RunOptions())
        found = run.receive()
        assert np.array_equal(found["sum"], numbers(seed) + numbers(seed + 5))
        assert np.array_equal(found["product"], numbers(seed) * numbers(seed + 5))
        assert found["count"].tolist() == [7]


def test_what_is_received_is_nobody_elses(session: ort.InferenceSession) -> None:
    """A later run does not change it."""
    run = FixedRun(session, "cpu", AXES)
    run.send()
    run.run(ort.RunOptions())
    found = run.receive()
    run.inputs["a"][:] = 1
    run.send()
    run.run(ort.RunOptions())
    assert not found["sum"].any()
    assert run.receive()["sum"].all()


def test_what_nobody_wants_is_neither_bound_nor_copied(session: ort.InferenceSession) -> None:
    run = FixedRun(session, "cpu", AXES, without=("product", "count"))
    whole = FixedRun(session, "cpu", AXES)
    run.inputs["a"][:] = 2
    run.send()
    run.run(ort.RunOptions())
    found = run.receive()
    assert found.keys() == {"sum"}
    assert (found["sum"] == 2).all()
    assert run.address_of.keys() == {"sum"}
    assert len(run._binding.get_outputs()) == 1
    assert run._received_in.size < whole._received_in.size


def test_a_name_that_the_graph_does_not_have_may_be_unwanted(session: ort.InferenceSession) -> None:
    """Bundles of an earlier day have fewer outputs."""
    run = FixedRun(session, "cpu", AXES, without=("another",))
    run.send()
    run.run(ort.RunOptions())
    assert run.receive().keys() == {"sum", "product", "count"}


def test_what_lies_elsewhere_is_read_and_written_there(session: ort.InferenceSession) -> None:
    """Even in place."""
    memory = DeviceBuffer(3 * 4 * 4, "cpu")
    memory.write(numbers(1).view(np.uint8).ravel())
    run = FixedRun(session, "cpu", AXES, elsewhere={"a": memory.address, "sum": memory.address})
    assert run.inputs.keys() == {"b", "c"}
    run.inputs["b"][:] = numbers(2)
    run.send()
    run.run(ort.RunOptions())
    assert run.receive().keys() == {"product", "count"}
    assert np.array_equal(memory.read().view(np.float32).reshape(3, 4), numbers(1) + numbers(2))


def test_a_buffer_starts_as_zeros_and_gives_copies() -> None:
    buffer = DeviceBuffer(8, "cpu")
    read = buffer.read()
    assert not read.any()
    buffer.write(np.arange(8, dtype=np.uint8))
    assert not read.any()
    assert buffer.read().tolist() == list(range(8))


def test_letters_become_numbers() -> None:
    assert concrete(["N", 7, "D"], AXES) == (3, 7, 4)
