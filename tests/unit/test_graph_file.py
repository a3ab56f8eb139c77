"""A graph's file is read without its graph being loaded, and whatever is in it, it gives a graph or one error."""

import random

import onnx
import pytest
from onnx import TensorProto, helper

from beamline_server.graph_file import read_graph
from beamline_server.graphs import GraphSpec, TensorSpec
from doubles.service import empty_graph, make_manifest

CONTRACT = GraphSpec(
    {"ids": TensorSpec("int64", ("N",)), "mask": TensorSpec("bool", ("S", 1))},
    {"y": TensorSpec("float32", ("N", 8)), "half": TensorSpec("float16", ())},
)
NO_GRAPH = "is no graph that an export writes"
TYPES = {"int64": 7, "bool": 9, "float32": 1, "float16": 10}


def model(*weights: TensorProto, contract: GraphSpec = CONTRACT) -> onnx.ModelProto:
    sides = (
        [helper.make_tensor_value_info(name, TYPES[value.element_type], value.axes) for name, value in side.items()]
        for side in (contract.inputs, contract.outputs)
    )
    node = helper.make_node("Identity", ["a"], ["b"], name="a node is passed over")
    return helper.make_model(helper.make_graph([node], "g", *sides, list(weights)))


def external(
    location: str = "weights.bin", offset: object = 0, length: object = 24, dims: tuple[int, ...] = (2, 3)
) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def problems_of(content: bytes) -> list[str]:
    """What is wrong with a graph as one of the contract, or with the file."""
    try:
        graph = read_graph(content)
    except ValueError as error:
        return [str(error)]
    return list(graph.problems(CONTRACT, {}, "weights.bin"))


def test_inputs_outputs_and_weights_are_read() -> None:
    inline = helper.make_tensor("small", TensorProto.INT64, [2], [-1, 16])
    graph = read_graph(model(inline, external(offset=64)).SerializeToString())
    assert graph.values == CONTRACT
    assert list(graph.problems(CONTRACT, {}, "weights.bin")) == []
    assert (graph.weights["small"].dims, graph.weights["small"].location) == ((2,), None)
    assert (graph.weights["w"].dims, graph.weights["w"].bytes) == ((2, 3), 24)
    assert graph.ends_in("weights.bin") == 64 + 24
    assert graph.ends_in("other.bin") == 0


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (external("../weights.bin"), "its w is in '../weights.bin' instead of weights.bin"),
        (external("/dev/zero"), "its w is in '/dev/zero' instead of weights.bin"),
        (external(""), "its w is in '' instead of weights.bin"),
        (external(offset=-4), "its w has 24 bytes at -4, its shape takes 24"),
        (external(length=2**40), "its w has 1099511627776 bytes at 0, its shape takes 24"),
        (external(length=-24, dims=(-2, 3)), "its w has -24 bytes at 0, its shape takes -24"),
        (external(length=24, dims=(-2, -3)), "its w has 24 bytes at 0, its shape takes 24"),
    ],
)
def test_weights_lie_whole_in_the_one_file(tensor: TensorProto, problem: str) -> None:
    graph = read_graph(model(tensor).SerializeToString())
    assert list(graph.problems(CONTRACT, {}, "weights.bin")) == [problem]


def test_tables_have_a_row_for_each_id() -> None:
    graph = read_graph(model(external()).SerializeToString())
    assert list(graph.problems(CONTRACT, {"w": 2}, "weights.bin")) == []
    for tables in ({"w": 3}, {"other": 2}):
        assert len(list(graph.problems(CONTRACT, tables, "weights.bin"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        external(offset="far"),
        external(dims=(1,) * 9),
        external(dims=(2**62,) * 8),
        TensorProto(name="w", data_type=TensorProto.STRING, dims=(1,)),
        TensorProto(name="w", dims=(1,)),
    ],
)
def test_weights_of_no_kind_that_is_exported(change: TensorProto) -> None:
    assert problems_of(model(change).SerializeToString())


def test_a_graph_that_is_there_twice_is_refused() -> None:
    """Readers of the format would take both for one."""
    content = model().SerializeToString()
    assert (problems_of(content), problems_of(content + content)) == ([], [NO_GRAPH])


def test_damaged_files_give_a_graph_or_one_error() -> None:
    """Cut short or changed anywhere: read to its end, and nothing else is raised."""
    original = empty_graph("encoder.onnx", "fp32", make_manifest().dimensions)
    draw, refused = random.Random(0), 0
    for _ in range(2000):
        content = bytearray(original[: draw.randrange(len(original) + 1)] if draw.random() < 0.3 else original)
        for _ in range(draw.randrange(4)):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        refused += problems_of(bytes(content)) == [NO_GRAPH]
    assert refused > 500
