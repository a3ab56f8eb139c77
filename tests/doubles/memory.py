"""The memory of a bucket whose answers come from a table, and the checks of all that it is given.

What the engine packs, with the same loops as for a graph, is read back from the arrays alone; the arrays hold
rubbish before, so what is not written is seen.

Axes: S batch indices, N rows, Q rows of a sequence, P slots, C candidates, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beamline_server.engine.backend import StepResult
from beamline_server.engine.ort.cuda.buckets import FromEncoder, Origin
from beamline_server.engine.ort.cuda.rectangle import StepInputs, pack_step
from beamline_server.engine.pack import LEAST_QUERIES, EncoderInputs, Extent, flat, pack_encoder
from beamline_server.engine.step import ModelRules
from beamline_server.engine.table import BoolArray, FloatArray, IntArray, Table

Tokens = tuple[int, ...]
PackStep = Callable[[Table, IntArray, IntArray, Any, Any, StepInputs], None]

_RUBBISH = -77
_MASKED, _ATTENDED = np.uint16(0xF0E2), np.uint16(0)
"""In padded arrays, as a device of half precision has them."""


class BrokenContract(BaseException):
    """The engine broke the contract between itself and its backend.

    No `Exception`, because the engine turns those of a backend into failed requests; this one is the test's to see.
    """


def expect(holds: bool, problem: str) -> None:
    """Raise BrokenContract unless something holds."""
    if not holds:
        raise BrokenContract(problem)


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One decoder step as the backend saw it.

    Attributes:
        sources: The source of each sequence, by batch index.
        positions: Position of each sequence's last row.
        taken: Slots that each sequence's rows took, in their order.
        rows: N.
        slots: P.
        source_width: R.
        queries: Q.
    """

    sources: tuple[Tokens, ...]
    positions: tuple[int, ...]
    taken: tuple[Tokens, ...]
    rows: int
    slots: int
    source_width: int
    queries: int


class Answers(Protocol):
    """What a memory asks its backend for."""

    rules: ModelRules
    starts: frozenset[int]
    trace: list[TracedStep]

    def begin_step(self) -> BaseException | None:
        """A step begins; returns what is to be raised instead of computing."""
        ...

    def look_up(self, source: Tokens, prefix: Tokens) -> FloatArray:
        """The table's log-probabilities, (V,)."""
        ...


@dataclass(slots=True)
class Held:
    """One sequence of a memory: its source, and (position, token) by slot. What nobody wrote since is poison."""

    source: Tokens
    written: dict[int, tuple[int, int]] = field(default_factory=dict)


class TableMemory:
    """A `Memory` that knows what was written where, and whether a step that failed may have spoiled it.

    Args:
        backend: Answers.
        padded: Whether all arrays are larger than what is packed, and batch index 0 belongs to nobody.
    """

    def __init__(self, backend: Answers, *, padded: bool) -> None:
        self._backend = backend
        self._padded = padded
        self._broken = False
        self._last: StepResult | None = None
        self.slots = 0
        self.source_width = 0
        self.held: list[Held] = []

    def arrange(self, origins: Sequence[Origin], *, slots: int, source_width: int) -> None:
        """As `Memory.arrange`; what is cut off by fewer slots is lost, and all slots of a newcomer are poison."""
        expect(not self._broken, "a memory is used again whose step failed: it may hold anything")
        stayers = [
            origin.batch_index for origin in origins if not isinstance(origin, FromEncoder) and not origin.memory
        ]
        expect(len(stayers) == len(set(stayers)), f"batch indices {stayers} are taken twice")
        held = [self._taken_over(origin, slots) for origin in origins]
        longest = max((len(each.source) for each in held), default=0)
        expect(longest <= source_width, f"a source of {longest} tokens does not fit in {source_width}")
        # They are filled in order in the same memory: nobody's place may be taken before its sequence has moved.
        for b, origin in enumerate(origins):
            moves_down = isinstance(origin, FromEncoder) or origin.memory is not None or origin.batch_index >= b
            expect(moves_down, f"batch index {b} is filled from one that was filled before")
        self.held, self.slots, self.source_width = held, slots, source_width

    def _taken_over(self, origin: Origin, slots: int) -> Held:
        if isinstance(origin, FromEncoder):
            return Held(origin.encoded.tensors[origin.number])
        memory = self if origin.memory is None else origin.memory
        assert isinstance(memory, TableMemory)
        expect(origin.memory is not self, "a sequence comes from another memory, which is this one")
        expect(not memory._broken, "a sequence is taken from a memory whose step failed: it may hold anything")
        old = memory.held[origin.batch_index]
        return Held(old.source, {slot: entry for slot, entry in old.written.items() if slot < slots})

    def run(self, table: Table, members: IntArray, needed: Extent, candidates: int, *, logprobs: bool) -> StepResult:
        """As `Memory.run`: writes each row's token, reads its prefix through its mask, looks it up."""
        fault = self._backend.begin_step()
        if fault is not None:
            self._broken = True
            raise fault
        expect(not self._broken, "a memory is used again whose step failed: it may hold anything")
        vocabulary = self._backend.rules.vocabulary
        expect(0 < candidates <= vocabulary, f"{candidates} candidates of {vocabulary} tokens")
        expect(len(members) == len(self.held), f"{len(members)} sequences in a memory of {len(self.held)}")
        packed = PackedRows(self.pack(table, members, needed), self.batch_index(len(members)), needed.rows)
        packed.check([len(held.source) for held in self.held], self.slots, exact=not self._padded)
        self._note(packed, needed)
        return self._answer(packed, candidates, logprobs=logprobs)

    def batch_index(self, members: int) -> IntArray:
        """Where each member stands in the batch: backwards and away from 0 in a padded one."""
        return np.arange(members, 0, -1) if self._padded else np.arange(members)

    def pack(self, table: Table, members: IntArray, needed: Extent, loop: PackStep = pack_step) -> StepInputs:
        """The inputs of a step; `loop` writes them."""
        more = 3 if self._padded else 0
        rows, batch = needed.rows + more, len(members) + more
        queries, slots = max(needed.queries, LEAST_QUERIES) + more, self.slots + more
        inputs = StepInputs(
            ids=np.full(rows, _RUBBISH),
            positions=np.full(rows, _RUBBISH),
            slot=np.full((rows, 2), _RUBBISH),
            pad_index=np.full((batch, queries), _RUBBISH),
            unpad_index=np.full(rows, _RUBBISH),
            mask=np.full((batch, queries, slots), 1, np.uint16 if self._padded else np.bool_),
            source_length=np.full(batch, _RUBBISH),
        )
        attended, masked = (_ATTENDED, _MASKED) if self._padded else (True, False)
        loop(table, members, self.batch_index(len(members)), attended, masked, inputs)
        if self._padded:
            expect(
                bool(((inputs.mask == attended) | (inputs.mask == masked)).all()), "the mask is not written everywhere"
            )
            inputs = inputs._replace(mask=inputs.mask == attended)
        return inputs

    def _note(self, packed: "PackedRows", needed: Extent) -> None:
        of = [packed.rows_of(b) for b in packed.batch_index.tolist()]
        step = TracedStep(
            sources=tuple(held.source for held in self.held),
            positions=tuple(int(packed.inputs.positions[rows[-1]]) for rows in of),
            taken=tuple(tuple(packed.inputs.slot[rows, 1].tolist()) for rows in of),
            rows=needed.rows,
            slots=self.slots,
            source_width=self.source_width,
            queries=packed.inputs.pad_index.shape[1],
        )
        self._backend.trace.append(step)

    def _answer(self, packed: "PackedRows", candidates: int, *, logprobs: bool) -> StepResult:
        if self._last is not None:
            # A step may overwrite the results of the one before.
            self._last.top_logprob[:], self._last.top_token[:] = np.nan, _RUBBISH
            if self._last.logprob is not None:
                self._last.logprob[:] = np.nan
        at = dict(zip(packed.batch_index.tolist(), self.held, strict=True))
        for row in range(packed.rows):
            b, slot, position, token = packed.written(row)
            at[b].written[slot] = (position, token)
        prefixes = [(at[packed.written(row)[0]], packed.attended(row), row) for row in range(packed.rows)]
        every = np.stack([self._logprobs(held, slots, packed, row) for held, slots, row in prefixes])
        top = np.argsort(-every, axis=1, kind="stable")[:, :candidates]
        self._last = StepResult(np.take_along_axis(every, top, axis=1), top, every if logprobs else None)
        return self._last

    def _logprobs(self, held: Held, slots: Sequence[int], packed: "PackedRows", row: int) -> FloatArray:
        poison = [slot for slot in slots if slot not in held.written]
        expect(not poison, f"a row reads slots {poison}, which nobody wrote")
        path = sorted((*held.written[slot], slot) for slot in slots)
        _, own_slot, own_position, _ = packed.written(row)
        expect(
            [position for position, _, _ in path] == list(range(own_position + 1)), f"a row's ancestors are at {path}"
        )
        expect(path[-1][2] == own_slot, "a row does not see itself")
        prefix = tuple(token for _, token, _ in path)
        rules = self._backend.rules
        expect(prefix[0] in self._backend.starts, f"a prefix begins with {prefix[0]}")
        logprobs = self._backend.look_up(held.source, prefix)
        expect(logprobs.shape == (rules.vocabulary,), "the table does not have the vocabulary's size")
        return logprobs


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The inputs of a step, read back.

    Attributes:
        inputs: With a mask of booleans.
        batch_index: Of each sequence.
        rows: How many rows are meant; what follows is padding.
    """

    inputs: StepInputs
    batch_index: IntArray
    rows: int

    def written(self, row: int) -> tuple[int, int, int, int]:
        """Batch index and slot that a row writes to, its position and its token."""
        b, slot = self.inputs.slot[row].tolist()
        return b, slot, int(self.inputs.positions[row]), int(self.inputs.ids[row])

    def attended(self, row: int) -> list[int]:
        """The slots that a row attends to."""
        b, query = divmod(int(self.inputs.unpad_index[row]), self.inputs.pad_index.shape[1])
        slots: list[int] = self.inputs.mask[b, query].nonzero()[0].tolist()
        return slots

    def rows_of(self, b: int) -> IntArray:
        """The rows of a batch index."""
        return np.flatnonzero(self.inputs.slot[: self.rows, 0] == b)

    def check(self, source_lengths: Sequence[int], slots: int, *, exact: bool) -> None:
        """Raise BrokenContract unless the arrays agree with each other, and say nothing of who is not there."""
        self._check_shapes(exact=exact)
        self._check_rows(slots)
        for b, length in zip(self.batch_index.tolist(), source_lengths, strict=True):
            self._check_sequence(b, length)
        self._check_padding()

    def _check_shapes(self, *, exact: bool) -> None:
        of, rows = self.inputs, len(self.inputs.ids)
        batch, queries = of.pad_index.shape
        expect(queries >= LEAST_QUERIES, f"{queries} queries")
        expect(of.mask.shape[:2] == (batch, queries), "pad_index does not have the mask's shape")
        expect(len(of.source_length) == batch, "source_length is not one per batch index")
        expect(of.slot.shape == (rows, 2), "slot is not one pair per row")
        expect(len(of.positions) == len(of.unpad_index) == rows, "the packed arrays differ in length")
        expect(rows == self.rows if exact else rows >= self.rows, f"{rows} rows, {self.rows} are needed")

    def _check_rows(self, slots: int) -> None:
        of = self.inputs
        b, query = np.divmod(of.unpad_index[: self.rows], of.pad_index.shape[1])
        slot = of.slot[: self.rows]
        expect(bool((of.positions[: self.rows] >= 0).all() and (of.ids[: self.rows] >= 0).all()), "a row is rubbish")
        expect(len(set(of.unpad_index[: self.rows].tolist())) == self.rows, "two rows stand at one place")
        expect(np.array_equal(slot[:, 0], b), "a row writes into another sequence's slots")
        expect(np.array_equal(of.pad_index[b, query], np.arange(self.rows)), "pad_index and unpad_index contradict")
        expect(set(b.tolist()) == set(self.batch_index.tolist()), "a sequence has no row, or nobody has one")
        expect(bool(((slot[:, 1] >= 0) & (slot[:, 1] < slots)).all()), f"a slot is outside of {slots}")
        expect(not of.mask[b, :, slots:].any(), "a row attends to slots that are not there")

    def _check_sequence(self, b: int, source_length: int) -> None:
        of, own = self.inputs, self.rows_of(b)
        expect(int(of.source_length[b]) == source_length, f"a source of {source_length} has {of.source_length[b]}")
        expect(bool(np.isin(of.pad_index[b], own).all()), "padding is filled from another sequence")
        expect(bool((np.diff(of.unpad_index[own]) == 1).all()), "a sequence's rows are out of order")
        expect(len(set(of.slot[own, 1].tolist())) == len(own), "two rows write to one slot")
        repeats = of.mask[b] == of.mask[b, of.pad_index[b] - own[0]]
        expect(bool(repeats.all()), "a place of the rectangle has another mask than its row")

    def _check_padding(self) -> None:
        of = self.inputs
        for array in (of.ids, of.positions, of.slot, of.unpad_index):
            expect(not array[self.rows :].any(), "a padding row is not at batch index 0")
        nobody = np.setdiff1d(np.arange(len(of.source_length)), self.batch_index)
        expect(bool((of.source_length[nobody] == 1).all()), "nobody's source is not 1 long")
        expect(not of.pad_index[nobody].any(), "nobody's rows are not the first")
        only_first: BoolArray = np.arange(of.mask.shape[2]) == 0
        expect(bool((of.mask[nobody] == only_first).all()), "nobody attends to other slots than the first")


def read_sources(sources: Sequence[Sequence[int]]) -> tuple[tuple[Tokens, ...], int]:
    """Pack sources as for an encoder, check the arrays and read the sources back; and how many places are padding."""
    ids, lengths = flat(sources)
    width = max(-(-int(lengths.max()) // 8) * 8, LEAST_QUERIES)
    shape = len(lengths), width
    rows: list[NDArray[np.int64]] = [np.full(len(ids), _RUBBISH) for _ in range(3)]
    of = EncoderInputs(rows[0], rows[1], np.full(shape, _RUBBISH), rows[2], np.full(len(lengths), _RUBBISH))
    pack_encoder(ids, lengths, of)
    expect(int(of.source_length.sum()) == len(of.ids), "source_length does not add up to the packed rows")
    read = tuple(_read_source(of, b) for b in range(len(lengths)))
    return read, of.pad_index.size - len(ids)


def _read_source(of: EncoderInputs, b: int) -> Tokens:
    width, length = of.pad_index.shape[1], int(of.source_length[b])
    expect(0 < length <= width, f"a source of {length} tokens in {width}")
    rows = of.pad_index[b]
    expect(np.array_equal(of.positions[rows[:length]], np.arange(length)), "positions are not 0, 1, …")
    expect(
        np.array_equal(of.unpad_index[rows[:length]], b * width + np.arange(length)),
        "unpad_index does not lead to where pad_index comes from",
    )
    expect(bool(np.isin(rows, rows[:length]).all()), "padding is filled from another source")
    return tuple(of.ids[rows[:length]].tolist())
