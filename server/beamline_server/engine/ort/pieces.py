"""A decoder step in pieces: graphs that work on rows alone, with attention over slots between them.

Axes: L layers, N rows, D width of the model, A width of queries and of what attention gives, B that of keys and values,
H heads, I indices of the table, X lists, W places of a list, C candidates, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.backend import StepResult
from beamline_server.engine.compiled import compiled, compiled_unlocked, entry_point
from beamline_server.engine.ort import attention, candidates
from beamline_server.engine.ort.attention import TOGETHER, attend
from beamline_server.engine.ort.c_api import Binding, NativeSession, address, check
from beamline_server.engine.ort.candidates import find_best
from beamline_server.engine.ort.pages import PagedMemory, Pages, Places, place
from beamline_server.engine.ort.vectors import call
from beamline_server.engine.pack import Extent
from beamline_server.engine.table import FloatArray, IntArray, Table, example
from beamline_server.graphs import GraphSizes, decoder_piece_graph

_KEPT = 256
"""Bindings that are kept, each for a number of rows: the last used ones."""
Note = Callable[[str, FloatArray], None]
"""Receives what a graph gives beyond its contract: a name, and a number for each row, (N,)."""


class Lists(NamedTuple):
    """Slots that are attended to.

    Attributes:
        places: Where they are among the slots of all pages; behind its end each list repeats its first, (X, W).
        lengths: How many each list has, (X,).
    """

    places: Places
    lengths: Places


class Buffers(NamedTuple):
    """What a step is computed in, for up to so many rows.

    Attributes:
        ids: (N,).
        positions: (N,).
        sequence: The index of each row's sequence, (N,).
        slot: Where its own key and value go, (N,).
        own: The slots that it attends to, a list for each row.
        each: 0, 1, …: the list of each row, (N,).
        bias: What self-attention adds to scores, a table for all layers or for each: (1 or L, H, distances), or
            (1, 0, 0).
        distance: How far each slot of the lists is from the row, at most the last of the table, (N, W).
        unbiased: What cross-attention adds to scores: nothing.
        query_key_value: Of self-attention, (N, A + 2B).
        query: Of cross-attention, (N, A).
        attended: What attention gives, (N, A).
        residual: What graphs hand on, in turn, (2, N, D).
        logits: Scores of all tokens, (N, V).
        weighing: Room for attention.
        choosing: Room for the choice of candidates.
    """

    ids: IntArray
    positions: IntArray
    sequence: Places
    slot: Places
    own: Lists
    each: Places
    bias: FloatArray
    distance: Places
    unbiased: attention.Bias
    query_key_value: FloatArray
    query: FloatArray
    attended: FloatArray
    residual: FloatArray
    logits: FloatArray
    weighing: tuple[FloatArray, FloatArray]
    choosing: candidates.Room


def padded(rows: int, multiple: int) -> int:
    """So many rows, or the next multiple."""
    return -(-rows // multiple) * multiple


def without_bias() -> FloatArray:
    """A table of models whose self-attention adds nothing to scores."""
    return np.zeros((1, 0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the memory of a step is made by.

    Attributes:
        graphs: What the pieces are made by.
        heads: H.
        bias: As in `Buffers`.
    """

    graphs: GraphSizes
    heads: int
    bias: FloatArray = field(default_factory=without_bias)


def buffers(rows: int, slots: int, sizes: Sizes) -> Buffers:
    """Buffers for so many rows, which attend to so many slots of their sequences, or positions of their sources."""
    graphs, places = sizes.graphs, (rows, slots + TOGETHER)
    return Buffers(
        ids=np.zeros(rows, np.int64),
        positions=np.zeros(rows, np.int64),
        sequence=np.zeros(rows, np.int32),
        slot=np.zeros(rows, np.int32),
        own=Lists(np.zeros(places, np.int32), np.zeros(rows, np.int32)),
        each=np.arange(rows, dtype=np.int32),
        bias=sizes.bias,
        distance=np.zeros(places if sizes.bias.size else (0, 0), np.int32),
        unbiased=attention.no_bias(),
        query_key_value=np.zeros((rows, graphs.query_key_value), np.float32),
        query=np.zeros((rows, graphs.query), np.float32),
        attended=np.zeros((rows, graphs.query), np.float32),
        residual=np.zeros((2, rows, graphs.width), np.float32),
        logits=np.zeros((rows, graphs.vocabulary), np.float32),
        weighing=attention.room(sizes.heads, slots),
        choosing=candidates.room(graphs.vocabulary),
    )


@dataclass(frozen=True, slots=True)
class Bound:
    """The pieces, bound for so many rows.

    Attributes:
        bindings: One per piece.
        handles: Their addresses.
        extra: What the pieces give beyond their contract.
    """

    bindings: list[Binding]
    handles: IntArray
    extra: dict[str, FloatArray]


class Pieces:
    """The pieces of a decoder for one worker, with the memory of its steps and what is bound to it.

    Args:
        sessions: Of the pieces, in order; other workers use them, too.
        sizes: Of its memory.
        note: Is told, after every run, what pieces give beyond their contract.
        rows_multiple: Graphs compute a multiple of this many rows; those beyond a step's are of no meaning.
    """

    def __init__(
        self, sessions: Sequence[NativeSession], sizes: Sizes, *, note: Note | None, rows_multiple: int = 1
    ) -> None:
        self._sessions = sessions
        self._handles = np.array([session.handle for session in sessions], np.int64)
        self._heads, self._graphs = sizes.heads, sizes.graphs
        self._note = note
        self._rows_multiple = rows_multiple
        self._run = address("RunWithBinding")
        self._bound: OrderedDict[int, Bound] = OrderedDict()
        self._new_buffers = partial(buffers, sizes=sizes)
        self._rows = self._longest = 0
        self.buffers = self._new_buffers(0, 0)

    def reserve(self, needed: Extent) -> None:
        """Have buffers that are large enough for a step."""
        rows, longest = padded(needed.rows, self._rows_multiple), max(needed.slots, needed.source_length)
        if rows > self._rows or longest > self._longest:
            self._rows, self._longest = max(2 * rows, self._rows), max(2 * longest, self._longest)
            self._bound.clear()
            self.buffers = self._new_buffers(self._rows, self._longest)

    def run(self, rows: int, count: int, own: Pages, cross: Pages, sources: Lists, *, logprobs: bool) -> StepResult:
        """Compute a step from what is in the buffers.

        Args:
            rows: N.
            count: C.
            own: Keys and values of self-attention.
            cross: Those of cross-attention.
            sources: The source positions of each sequence, by its index.
            logprobs: Whether the log-probabilities of all tokens are wanted, too.

        Raises:
            NativeError: a graph fails.
        """
        bound, best = self._bound_for(padded(rows, self._rows_multiple)), candidates.empty(rows, count)
        how = (self._run, self._heads, rows, 2 if self._graphs.encoder else 1)
        check(run_step(how, self._handles, bound.handles, self.buffers, own, cross, sources, best))
        tell(self._note, bound.extra, rows)
        every = None
        if logprobs:
            every = np.empty((rows, self.buffers.logits.shape[1]), np.float32)
            candidates.log_probabilities(self.buffers.logits, self.buffers.choosing, every)
        return StepResult(best.logprob, best.token, every)

    def _bound_for(self, rows: int) -> Bound:
        if rows not in self._bound:
            if len(self._bound) >= _KEPT:
                self._bound.popitem(last=False)
            self._bound[rows] = self._bind(rows)
        self._bound.move_to_end(rows)
        return self._bound[rows]

    def _bind(self, rows: int) -> Bound:
        bindings: list[Binding] = []
        extra: dict[str, FloatArray] = {}
        for i, session in enumerate(self._sessions):
            outputs = self._outputs(i, rows)
            more = beyond(self._note, session, outputs, rows)
            bindings.append(Binding(session, self._inputs(i, rows), outputs | more))
            extra |= more
        return Bound(bindings, np.array([binding.handle for binding in bindings], np.int64), extra)

    def _inputs(self, piece: int, rows: int) -> dict[str, NDArray[Any]]:
        b = self.buffers
        every: dict[str, NDArray[Any]] = {
            "ids": b.ids[:rows],
            "positions": b.positions[:rows],
            "attended": b.attended[:rows],
            "residual_in": b.residual[1 - piece % 2, :rows],
        }
        return {name: every[name] for name in decoder_piece_graph(piece, self._graphs).inputs}

    def _outputs(self, piece: int, rows: int) -> dict[str, NDArray[Any]]:
        b = self.buffers
        every = {
            "residual": b.residual[piece % 2, :rows],
            "query_key_value": b.query_key_value[:rows],
            "query": b.query[:rows],
            "logits": b.logits[:rows],
        }
        return {name: every[name] for name in decoder_piece_graph(piece, self._graphs).outputs}


def beyond(note: Note | None, session: NativeSession, known: Collection[str], rows: int) -> dict[str, FloatArray]:
    """Room for what a graph gives beyond the outputs that are known, if anybody wants to be told."""
    names = () if note is None else session.outputs
    return {name: np.empty(rows, np.float32) for name in names if name not in known}


def tell(note: Note | None, extra: Mapping[str, FloatArray], rows: int) -> None:
    """Hand on what graphs gave beyond their contract, of so many rows."""
    if note is not None:
        for name, numbers in extra.items():
            note(name, numbers[:rows])


@compiled
def pack_rows(table: Table, members: IntArray, own: Pages, into: Buffers) -> None:
    """Write the rows of some sequences, and the slots that each attends to.

    Args:
        table: The running sequences.
        members: Indices of those that are meant.
        own: Keys and values of self-attention; receives where rows stand, if distances count.
        into: Receives the rows.
    """
    row, farthest = 0, into.bias.shape[2] - 1
    for index in members:
        sequence, pages = table.sequences[index], own.pages[index]
        for r in range(sequence.rows):
            count = 0
            for slot in range(sequence.slots_end):
                if table.ancestors[index, r, slot]:
                    into.own.places[row, count] = place(pages, slot)
                    count += 1
            if farthest >= 0:
                # A row comes after those that it descends from: where they stand has been written.
                own.positions[place(pages, sequence.slot[r])] = sequence.position[r]
                for t in range(count):
                    distance = sequence.position[r] - own.positions[into.own.places[row, t]]
                    into.distance[row, t] = min(distance, farthest)
            into.own.lengths[row] = count
            for behind in range(TOGETHER):
                into.own.places[row, count + behind] = into.own.places[row, 0]
            into.ids[row], into.positions[row] = sequence.token[r], sequence.position[r]
            into.sequence[row], into.slot[row] = index, place(pages, sequence.slot[r])
            row += 1


@compiled
def take_in(cross: Pages, sources: Lists, index: int, length: int, encoded: FloatArray, number: int) -> None:
    """Copy the keys and values of a newcomer's source into its pages, and list where they are.

    Args:
        cross: Keys and values of cross-attention.
        sources: The source positions of each sequence, by its index.
        index: Of the newcomer, which has pages for its source.
        length: Of its source.
        encoded: Keys and values of all sources of an encoder call, (L, 2, S, positions, D).
        number: Which of them is its own.
    """
    places = sources.places[index]
    for i in range(length):
        places[i] = place(cross.pages[index], i)
    for behind in range(TOGETHER):
        places[length + behind] = places[0]
    sources.lengths[index] = length
    layers, width = len(cross.keys), cross.keys.shape[2]
    for layer in range(layers):
        for i in range(length):
            for d in range(width):
                cross.keys[layer, places[i], d] = encoded[layer, 0, number, i, d]
            for d in range(width):
                cross.values[layer, places[i], d] = encoded[layer, 1, number, i, d]


@compiled_unlocked
def run_step(  # noqa: PLR0913, PLR0917 - graphs, and what lies between them
    how: tuple[int, int, int, int],
    sessions: IntArray,
    bindings: IntArray,
    buffers: Buffers,
    own: Pages,
    cross: Pages,
    sources: Lists,
    best: candidates.Candidates,
) -> int:
    """Run the pieces, with an attention after each but the last, and choose the candidates.

    Args:
        how: Address of onnxruntime's RunWithBinding; heads of attention; N; attentions of a layer, the second of which
            is cross-attention.
        sessions: Addresses of the sessions, one more than attentions.
        bindings: Addresses of what is bound to them, as many.
        buffers: What is bound, and the slots that rows attend to.
        own: Keys and values of self-attention.
        cross: Those of cross-attention.
        sources: The source positions of each sequence, by its index.
        best: Receives the candidates.

    Returns:
        Address of a status that tells what went wrong, or 0.
    """
    run, heads, rows, attentions = how
    for piece in range(len(sessions)):
        status = call(run, sessions[piece], 0, bindings[piece])
        if status != 0:
            return int(status)
        if piece == len(sessions) - 1:
            break
        layer = piece // attentions
        if piece % attentions == 0:
            write(buffers, own.keys[layer], own.values[layer], rows)
            query, keys, values = buffers.query_key_value, own.keys[layer], own.values[layer]
            lists, list_of = buffers.own, buffers.each[:rows]
            bias = attention.Bias(buffers.bias[min(layer, len(buffers.bias) - 1)], buffers.distance)
        else:
            query, keys, values = buffers.query, cross.keys[layer], cross.values[layer]
            lists, list_of, bias = sources, buffers.sequence[:rows], buffers.unbiased
        weights, inverse = buffers.weighing
        places, lengths = lists
        attend(query, keys, values, places, lengths, list_of, heads, weights, inverse, buffers.attended, bias)
    find_best(buffers.logits, buffers.choosing, best)
    return 0


@compiled
def write(buffers: Buffers, keys: FloatArray, values: FloatArray, rows: int) -> None:
    """Write the keys and values of rows into their slots."""
    width, first = keys.shape[1], buffers.attended.shape[1]
    for row in range(rows):
        slot, new = buffers.slot[row], buffers.query_key_value[row]
        for d in range(width):
            keys[slot, d] = new[first + d]
        for d in range(width):
            values[slot, d] = new[first + width + d]


def _run_example() -> tuple[Any, ...]:
    numbers, into, pages = np.zeros(1, np.int64), _example_buffers(), PagedMemory(1, 1).pages
    return (0, 0, 0, 1), numbers, numbers, into, pages, pages, into.own, candidates.empty(1, 1)


def _take_in_example() -> tuple[Any, ...]:
    return PagedMemory(1, 1).pages, _example_buffers().own, 0, 0, np.zeros((1, 2, 1, 1, 1), np.float32), 0


def _example_buffers() -> Buffers:
    return buffers(1, 1, Sizes(GraphSizes(layers=1, width=1, vocabulary=1), heads=1))


entry_point(pack_rows, lambda: (example(), np.zeros(1, np.int64), PagedMemory(1, 1).pages, _example_buffers()))
entry_point(take_in, _take_in_example)
entry_point(run_step, _run_example)
