"""The backend for the CPU: keys and values stay where they are written, and attention reads them there.

The decoder step is a row of graphs, cut at the attentions. Between two of them a compiled loop writes new keys and
values into their slots and attends over the slots that each row descends from, wherever these are: there are no
rectangles, no padding, no masks and no moves. A last loop takes the candidates from the scores of all tokens. All of a
step is one call of compiled code, which calls onnxruntime.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from beamline_server.bundle import Bundle
from beamline_server.engine.admission import ENCODE_TOGETHER, Capacity
from beamline_server.engine.backend import NOT_ENCODED, Cache, Encoded, StepResult
from beamline_server.engine.ort.attention import TOGETHER
from beamline_server.engine.ort.c_api import Binding, NativeSession
from beamline_server.engine.ort.pages import PagedMemory, lacking, whole_pages, widened
from beamline_server.engine.ort.pieces import (
    Lists,
    Note,
    Pieces,
    Sizes,
    beyond,
    pack_rows,
    padded,
    take_in,
    tell,
    without_bias,
)
from beamline_server.engine.ort.settings import ENCODER_INPUTS, settings
from beamline_server.engine.ort.weights import Weights, shared_arrays, weights_in_turn
from beamline_server.engine.pack import LEAST_QUERIES, EncoderInputs, Extent, extent, flat, pack_encoder
from beamline_server.engine.request import MAX_BEAMS
from beamline_server.engine.table import FloatArray, IntArray, Table, table_bytes
from beamline_server.graph_file import read_graph
from beamline_server.graphs import graph_files
from beamline_server.manifest import RELATIVE_BIAS, WEIGHTS, Dimensions

_FLOAT = 4
_ROW_WIDTHS = 24
"""Numbers that a layer computes for a row, in widths of the model: a feed-forward part that is four times as wide, and
what stands around it, twice."""
_SCORES = 3
"""Copies of the scores of the encoder's attention."""
_BIASES = 2
"""Copies of what relative positions add to them."""
_GRANULE = 8
"""Source positions of an encoder call are a multiple of this: few distinct shapes."""


ROWS_MULTIPLE = {"int4": 2}
"""By precisions, of what the rows of a graph's run are a multiple, if not of one: a lone row of a product with weights
of 4 bits has other last bits than the same row beside others, and on several threads, which share the rows of a product
in blocks of 128, so has the last of 129."""


class CpuBackend:
    """Runs on the CPU. One set of sessions serves all workers, so weights are in memory once.

    Args:
        bundle: fp32, int8 or int4.
        threads: To compute a node on.
        note: Is told, after every run, what graphs give beyond their contract.
        mapped: Whether the file of weights is mapped, which takes least memory; it must not change meanwhile.
    """

    device = "cpu"
    encode_tokens = 256

    def __init__(self, bundle: Bundle, *, threads: int, note: Note | None = None, mapped: bool = False) -> None:
        dimensions = bundle.manifest.dimensions
        self.layers, self.width = dimensions.decoder_layers, dimensions.key_value
        self.has_encoder = not dimensions.decoder_only
        self._sizes = Sizes(dimensions.graph_sizes, dimensions.decoder_heads, _relative_bias(bundle))
        self._note = note
        self._rows_multiple = ROWS_MULTIPLE.get(bundle.manifest.precision, 1)
        graphs = {name: bundle.read(name) for name in graph_files("int8", dimensions.graph_sizes)}
        if mapped:
            sessions = list(_mapped(bundle, graphs, threads))
        else:
            with weights_in_turn(bundle, graphs) as weights:
                sessions = [_opened(name, graphs[name], weights, threads) for name in graphs]
        self._encoder = sessions.pop(0) if self.has_encoder else None
        self._decoder = sessions

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """As `Backend.encode`."""
        if self._encoder is None:
            return NOT_ENCODED
        ids, lengths = flat(sources)
        width = max(-(-int(lengths.max()) // _GRANULE) * _GRANULE, LEAST_QUERIES)
        rows = padded(len(ids), self._rows_multiple)
        inputs = _encoder_inputs(rows, len(lengths), width)
        pack_encoder(ids, lengths, inputs)
        cross = np.empty((self.layers, 2, len(lengths), width, self.width), np.float32)
        outputs = {f"cross_{kind}_{i}": cross[i, k] for i in range(self.layers) for k, kind in enumerate("kv")}
        extra = beyond(self._note, self._encoder, outputs, rows)
        Binding(self._encoder, dict(zip(ENCODER_INPUTS, inputs, strict=True)), outputs | extra).run()
        tell(self._note, extra, len(ids))
        return Encoded(cross, inputs.pad_index.size - len(ids))

    def new_cache(self) -> Cache:
        """As `Backend.new_cache`."""
        return CpuCache(self.layers, self.width, self.new_pieces(), has_encoder=self.has_encoder)

    def new_pieces(self) -> Pieces:
        """The decoder, for one worker."""
        return Pieces(self._decoder, self._sizes, note=self._note, rows_multiple=self._rows_multiple)


def _opened(name: str, graph: bytes, weights: Weights, threads: int) -> NativeSession:
    """A session, which is made while of the weights only those are in memory that it, or a later one, takes."""
    shared = weights.read_for(name)
    content = (WEIGHTS, weights.content)
    session = NativeSession(graph, content, threads=threads, settings=settings(threads), shared=shared)
    weights.drop(name)
    return session


def _mapped(bundle: Bundle, graphs: Mapping[str, bytes], threads: int) -> Iterator[NativeSession]:
    """Sessions that map the file of weights."""
    files = {name: read_graph(content) for name, content in graphs.items()}
    content = np.memmap(bundle.file(WEIGHTS), np.uint8, "r")
    for name in graphs:
        shared = shared_arrays(files, name, content)
        yield NativeSession(bundle.file(name), None, threads=threads, settings=settings(threads), shared=shared)


def _relative_bias(bundle: Bundle) -> FloatArray:
    """What self-attention adds to scores, as `Buffers.bias`."""
    dimensions = bundle.manifest.dimensions
    relative = dimensions.relative_positions
    if relative is None:
        return without_bias()
    numbers = np.frombuffer(bundle.read(RELATIVE_BIAS), "<f4").astype(np.float32)
    return numbers.reshape(relative.layers, dimensions.decoder_heads, relative.distances)


def most_bytes_of_a_worker(sizes: Dimensions, capacity: Capacity) -> int:
    """The most memory that a worker takes beside the weights: keys and values, what steps and encoder calls compute in.

    What grows is copied, so that it is there twice for a moment.
    """
    wide = max(sizes.d_model, sizes.attention)
    relative = sizes.relative_positions is not None
    slot = (2 * sizes.decoder_layers * sizes.key_value + 1) * _FLOAT
    whole = capacity.whole
    own = min(whole.slots, whole.rows * whole_pages(sizes.max_target_tokens))
    cross = 0 if sizes.decoder_only else min(whole.slots, whole.rows * whole_pages(sizes.max_source_tokens))
    widest = max(MAX_BEAMS * (sizes.max_target_tokens + 1), sizes.max_source_tokens)
    row = (3 if relative else 2) * widest + _ROW_WIDTHS * wide + sizes.target_vocabulary
    tokens = max(CpuBackend.encode_tokens, sizes.max_source_tokens)
    scores = (_SCORES + _BIASES * relative) * sizes.decoder_heads * sizes.max_source_tokens**2
    encoder = (tokens * _ROW_WIDTHS * wide + scores) * _FLOAT + (ENCODE_TOGETHER + 1) * tokens * slot
    encoder *= not sizes.decoder_only
    table = table_bytes(whole.rows, slots=widest, steps=sizes.max_target_tokens)
    pages = (own + cross) * slot + max(own, cross) * slot // 2
    return pages + 2 * whole.rows * row * _FLOAT + encoder + 2 * table


def _encoder_inputs(rows: int, sources: int, width: int) -> EncoderInputs:
    ids, positions, unpad_index = (np.empty(rows, np.int64) for _ in range(3))
    return EncoderInputs(ids, positions, np.empty((sources, width), np.int64), unpad_index, np.empty(sources, np.int64))


class CpuCache:
    """The cache of a worker, and the one bucket that all of its sequences run in.

    Args:
        layers: Of the decoder.
        width: Of its keys and values.
        pieces: Computes.
        has_encoder: Whether sequences have a source, whose keys and values are kept beside their own.
    """

    def __init__(self, layers: int, width: int, pieces: Pieces, *, has_encoder: bool = True) -> None:
        self._pieces = pieces
        self._own, self._cross = PagedMemory(layers, width), PagedMemory(layers, width)
        self._has_encoder = has_encoder
        self._sources = Lists(np.zeros((0, TOGETHER), np.int32), np.zeros(0, np.int32))
        self._present: dict[int, None] = {}
        self._all: IntArray = np.zeros(0, np.int64)
        self._newcomers: dict[int, tuple[Encoded, int]] = {}
        self._changed = False
        self.members: IntArray = np.zeros(0, np.int64)
        self.needed = Extent(0, 0, 0, 0, 0, 0)

    def enter(self, index: int, encoded: Encoded, number: int) -> None:
        """As `Cache.enter`."""
        self._present[index] = None
        self._newcomers[index] = (encoded, number)
        self._changed = True

    def leave(self, index: int) -> None:
        """As `Cache.leave`."""
        del self._present[index]
        self._newcomers.pop(index, None)
        for memory in (self._own, self._cross):
            memory.take_back(index)
            if not self._present:
                memory.clear()
        self._changed = True

    def place(self, table: Table, going: Sequence[int] | None = None) -> Sequence["CpuCache"]:
        """As `Cache.place`."""
        if self._changed:
            self._all = np.fromiter(self._present, np.int64, len(self._present))
            for index, (encoded, number) in self._newcomers.items():
                self._take_in(index, int(table.sequences[index].source_length), encoded, number)
            self._newcomers.clear()
            self._changed = False
        self.members = self._all if going is None else np.array(going, np.int64)
        self.needed = extent(table, self.members)
        for index in lacking(table, self.members, self._own.pages.held).tolist():
            self._own.give(index, int(table.sequences[index].slots_end))
        return [self] if len(self.members) else []

    def _take_in(self, index: int, length: int, encoded: Encoded, number: int) -> None:
        """Copy the keys and values of a newcomer's source, and give it a first page for its own."""
        self._own.give(index, 1)
        if not self._has_encoder:
            return
        self._cross.give(index, length)
        places, lengths = self._sources
        if index >= len(lengths) or length + TOGETHER > places.shape[1]:
            self._sources = Lists(widened(places, index + 1, length + TOGETHER), widened(lengths, index + 1))
        take_in(self._cross.pages, self._sources, index, length, encoded.tensors, number)

    def run(self, table: Table, candidates: int, *, logprobs: bool = False) -> StepResult:
        """As `Bucket.run`."""
        pieces = self._pieces
        pieces.reserve(self.needed)
        pack_rows(table, self.members, self._own.pages, pieces.buffers)
        own, cross = self._own.pages, self._cross.pages
        return pieces.run(self.needed.rows, candidates, own, cross, self._sources, logprobs=logprobs)
