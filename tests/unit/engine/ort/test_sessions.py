"""How sessions run: their threads are quick while steps follow each other, and then leave the cores to others."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from beamline_server.engine.ort.sessions import session_options
from beamline_server.engine.ort.settings import SPIN_US
from beamline_server.engine.processor import sums_int8_exactly


def spins(threads: int) -> str:
    return str(session_options(threads).get_session_config_entry("session.intra_op.allow_spinning"))


def test_a_single_thread_waits_for_nobody() -> None:
    assert spins(1) == "0"


@pytest.mark.parametrize("threads", [2, 8])
def test_several_threads_stay_awake_while_steps_follow_each_other_and_no_longer(threads: int) -> None:
    options = session_options(threads)
    assert options.intra_op_num_threads == threads
    assert spins(threads) == "1"
    # Without a bound, onnxruntime's threads keep the cores busy for much longer than a step takes.
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == str(SPIN_US)
    assert 0 < SPIN_US <= 1000


def test_what_fails_is_raised_and_onnxruntime_writes_no_lines_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """They would stand as plain text among the JSON of the server's log."""
    values = [("table", TensorProto.FLOAT, ["rows"]), ("number", TensorProto.INT64, ["n"])]
    inputs = [helper.make_tensor_value_info(*value) for value in values]
    output = helper.make_tensor_value_info("row", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Gather", ["table", "number"], ["row"])], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1), enable_fallback=0)

    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {"table": np.ones(2, np.float32), "number": np.array([7])})

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "exact"),
    [("fpu avx2 avx512f", False), ("fpu avx2 avx_vnni", True), ("avx512f avx512_vnni\nbugs", True), ("", False)],
)
def test_without_vnni_sums_of_signed_bytes_saturate(flags: str, exact: bool) -> None:
    assert sums_int8_exactly(f"processor : 0\nflags\t\t: {flags}\n") is exact


def test_products_of_bytes_are_summed_exactly_on_this_processor() -> None:
    """Neighbouring products at their largest: 16 bits do not hold their sum."""
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, ["rows", 64])]
    output = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    weights = helper.make_tensor("w", TensorProto.INT8, [64, 32], np.full(64 * 32, 127, np.int8).tobytes(), raw=True)
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "w"], ["y"])], "g", inputs, [output], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1), enable_fallback=0)

    (sums,) = session.run(None, {"a": np.full((3, 64), 255, np.uint8)})

    assert (sums == 64 * 255 * 127).all()
