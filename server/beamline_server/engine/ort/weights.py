"""The weights of a bundle in memory, as long as sessions need them: read once, in order, session by session.

onnxruntime copies what it is given, and lays out most of it anew for its kernels. So the part of the file that a graph
takes is read just before its session is made and dropped right after it. What several graphs take - an embedding that
is looked up on both sides - stays, and their sessions read it where it is.
"""

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_server.allocator import give_back_freed
from beamline_server.bundle import Bundle, VerifiedStream
from beamline_server.graph_file import GraphFile, StoredTensor, read_graph
from beamline_server.manifest import WEIGHTS

_ELEMENTS = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16}
"""Element types that sessions may share, by ONNX's numbers."""
_PAGE = mmap.PAGESIZE


class Weights:
    """Memory as large as the file of weights, of which only what is needed is there.

    Args:
        stream: The file.
        size: Its bytes.
        graphs: What says of itself which weights it takes, in the order in which sessions are made.

    Attributes:
        content: The memory; sessions read shared weights in it.
    """

    def __init__(self, stream: VerifiedStream, size: int, graphs: Mapping[str, GraphFile]) -> None:
        self.content = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._stream = stream
        self._read = 0
        self._graphs = graphs
        self._uses = _uses(graphs)

    def read_for(self, graph: str) -> dict[str, NDArray[Any]]:
        """Have in `content` what a graph takes; returns what it shares with others, by name, as arrays in `content`."""
        end = self._graphs[graph].ends_in(WEIGHTS)
        if end > self._read:
            with memoryview(self.content) as view, view[self._read : end] as part:
                self._stream.fill(part)
            self._read = end
        return shared_arrays(self._graphs, graph, self.content)

    def drop(self, graph: str) -> None:
        """Give back the memory of what no other graph takes; the graph's session has been made."""
        for tensor in _external(self._graphs[graph]).values():
            begin = -(-tensor.offset // _PAGE) * _PAGE
            end = (tensor.offset + tensor.length) // _PAGE * _PAGE
            if not _is_shared(tensor, self._uses) and begin < end:
                self.content.madvise(mmap.MADV_DONTNEED, begin, end - begin)
        give_back_freed()


def shared_arrays(
    graphs: Mapping[str, GraphFile], graph: str, content: mmap.mmap | NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    """What a graph takes that others of these graphs take, too, by name, as arrays in the content of the file."""
    uses = _uses(graphs)
    return {name: _array(t, content) for name, t in _external(graphs[graph]).items() if _is_shared(t, uses)}


def _array(tensor: StoredTensor, content: mmap.mmap | NDArray[np.uint8]) -> NDArray[Any]:
    dtype = np.dtype(_ELEMENTS[tensor.element])
    return np.frombuffer(content, dtype, tensor.length // dtype.itemsize, tensor.offset).reshape(tensor.dims)


def _uses(graphs: Mapping[str, GraphFile]) -> Counter[int]:
    """How many graphs take the weight at an offset."""
    return Counter(tensor.offset for graph in graphs.values() for tensor in _external(graph).values())


def _is_shared(tensor: StoredTensor, uses: Counter[int]) -> bool:
    return uses[tensor.offset] > 1 and tensor.element in _ELEMENTS


def _external(graph: GraphFile) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in graph.weights.items() if tensor.location == WEIGHTS}


@contextmanager
def weights_in_turn(bundle: Bundle, graphs: Mapping[str, bytes]) -> Iterator[Weights]:
    """The weights of a bundle, for sessions of these graphs (name -> content) that are made in their order.

    Raises:
        BundleError: at the end, the file was not what the manifest lists; what was made of it must not be used.
    """
    files = {name: read_graph(content) for name, content in graphs.items()}
    with bundle.streamed(WEIGHTS) as stream:
        yield Weights(stream, bundle.manifest.files[WEIGHTS].bytes, files)
