"""What a graph's file says of itself - inputs, outputs, weights - read without loading it, and held to a contract.

onnxruntime tells this of a graph that it has loaded, weights included; here it is known before anything is built. The
format is ONNX's (onnx.proto), of which a few fields are read and all others are passed over.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from beamline_server.graphs import Axis, ElementType, GraphSpec, TensorSpec

_GRAPH = 7
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TENSOR_TYPE, _ELEMENT, _SHAPE, _DIMENSION, _SIZE, _SYMBOL = 1, 1, 2, 1, 1, 2
_DIMS, _DATA_TYPE, _TENSOR_NAME, _EXTERNAL = 1, 2, 8, 13
_KEY, _VALUE = 1, 2
_MOST_DIMS = 8

_ELEMENT_TYPES: dict[int, ElementType] = {1: "float32", 10: "float16", 7: "int64", 9: "bool"}
_ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}
"""Size of an element by ONNX's number of its type, of the types that weights have."""

_Value = int | memoryview
_Fields = dict[int, list[_Value]]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A weight of a graph.

    Attributes:
        dims: Its shape.
        bytes: What its shape and element type come to.
        location: The file that holds it, or None if the graph's own file does.
        offset: Where it begins there.
        length: How many bytes it takes there.
        element: ONNX's number of its element type.
    """

    dims: tuple[int, ...]
    bytes: int
    location: str | None
    offset: int
    length: int
    element: int


@dataclass(frozen=True, slots=True)
class GraphFile:
    """What the file of a graph says."""

    values: GraphSpec
    weights: dict[str, StoredTensor]

    def ends_in(self, file: str) -> int:
        """Where the last of its weights in another file ends there."""
        return max((t.offset + t.length for t in self.weights.values() if t.location == file), default=0)

    def differing(self, contract: GraphSpec) -> Iterator[tuple[str, TensorSpec | None, TensorSpec | None]]:
        """Inputs and outputs that are not what a contract says: the name, what is here, and what it says."""
        sides = ((self.values.inputs, contract.inputs), (self.values.outputs, contract.outputs))
        for found, wanted in sides:
            for name in dict.fromkeys([*wanted, *found]):
                if found.get(name) != wanted.get(name):
                    yield name, found.get(name), wanted.get(name)

    def problems(self, contract: GraphSpec, tables: Mapping[str, int], file: str) -> Iterator[str]:
        """What does not fit to a contract.

        Args:
            contract: Inputs and outputs.
            tables: Rows of what ids and positions are looked up in, by the end of the table's name.
            file: The one file that weights may lie in beside the graph's own.
        """
        for name, found, wanted in self.differing(contract):
            yield f"its {name} is {_in_words(found)}, by the manifest's dimensions {_in_words(wanted)}"
        for end, rows in tables.items():
            counts = {tensor.dims[:1] for name, tensor in self.weights.items() if name.endswith(end)}
            if counts != {(rows,)}:
                told = ", ".join(str(*count) for count in sorted(counts)) or "no"
                yield f"its table of {end.removeprefix('_')} has {told} rows, by the manifest's dimensions {rows}"
        for name, tensor in self.weights.items():
            if tensor.location not in (None, file):
                yield f"its {name} is in {tensor.location!r} instead of {file}"
            elif min(*tensor.dims, tensor.offset, 0) < 0 or tensor.length != tensor.bytes:
                yield f"its {name} has {tensor.length} bytes at {tensor.offset}, its shape takes {tensor.bytes}"


def read_graph(content: bytes) -> GraphFile:
    """What is in the file of a graph.

    Raises:
        ValueError: it is none that an export writes.
    """
    try:
        model = _fields(memoryview(content))
        graph = _fields(_message(model, _GRAPH))
        sides = (dict(map(_tensor_spec, _messages(graph, number))) for number in (_INPUT, _OUTPUT))
        return GraphFile(GraphSpec(*sides), dict(map(_stored_tensor, _messages(graph, _INITIALIZER))))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError("is no graph that an export writes") from error


def _in_words(tensor: TensorSpec | None) -> str:
    return "not there" if tensor is None else f"{tensor.element_type}[{', '.join(map(str, tensor.axes))}]"


def _tensor_spec(value: memoryview) -> tuple[str, TensorSpec]:
    fields = _fields(value)
    name = _text(fields, _VALUE_NAME)
    tensor = _fields(_message(_fields(_message(fields, _VALUE_TYPE)), _TENSOR_TYPE))
    dimensions = _messages(_fields(_message(tensor, _SHAPE)), _DIMENSION)
    return name, TensorSpec(_ELEMENT_TYPES[_number(tensor, _ELEMENT)], tuple(map(_axis, dimensions)))


def _axis(dimension: memoryview) -> Axis:
    fields = _fields(dimension)
    return _number(fields, _SIZE) if _SIZE in fields else _text(fields, _SYMBOL)


def _stored_tensor(tensor: memoryview) -> tuple[str, StoredTensor]:
    fields = _fields(tensor)
    dims = tuple(_numbers(fields, _DIMS))
    if len(dims) > _MOST_DIMS:
        raise ValueError
    entries = map(_fields, _messages(fields, _EXTERNAL))
    external = {_text(entry, _KEY): _text(entry, _VALUE) for entry in entries}
    element = _number(fields, _DATA_TYPE)
    size = prod(dims) * _ELEMENT_BYTES[element]
    offset, length = int(external.get("offset", "0")), int(external.get("length", str(size)))
    return _text(fields, _TENSOR_NAME), StoredTensor(dims, size, external.get("location"), offset, length, element)


def _fields(data: memoryview) -> _Fields:
    """The fields of a message by their numbers, each as often as it occurs.

    Raises:
        IndexError: it ends too early.
        KeyError: it has a field of a kind that the format has not.
    """
    found: _Fields = {}
    at = 0
    while at < len(data):
        began = at
        key, at = _varint(data, at)
        value: _Value
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            length, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at : at + length], at + length
        if not began < at <= len(data):
            raise IndexError
        found.setdefault(key >> 3, []).append(value)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends; of 64 bits, the highest of which is the sign."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return (number & (1 << 64) - 1) - ((number & 1 << 63) << 1), at
    raise IndexError


def _messages(fields: _Fields, number: int) -> Iterator[memoryview]:
    for value in fields.get(number, []):
        if isinstance(value, int):
            raise TypeError
        yield value


def _message(fields: _Fields, number: int) -> memoryview:
    # Occurring twice, a message would be the sum of both, and not what is read here.
    (message,) = list(_messages(fields, number)) or [memoryview(b"")]
    return message


def _numbers(fields: _Fields, number: int) -> Iterator[int]:
    for value in fields.get(number, []):
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            following, at = _varint(value, at)
            yield following


def _number(fields: _Fields, number: int) -> int:
    return list(_numbers(fields, number))[-1]


def _text(fields: _Fields, number: int) -> str:
    return str(_message(fields, number), "utf-8")
