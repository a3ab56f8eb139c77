"""What is packed into larger arrays is what it is in exact ones; padding touches nobody's batch index alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from beamline_server.engine.ort.cuda.rectangle import MASK_VALUES, StepInputs, pack_step
from beamline_server.engine.ort.cuda.shapes import batch_size, encoder_shape, step_shape
from beamline_server.engine.pack import EncoderInputs, extent, flat, pack_encoder
from beamline_server.engine.table import SequenceTable, Table

SLOTS, WIDER_SLOTS, VOCABULARY = 20, 32, 40


@dataclass(frozen=True)
class Packed:
    """Sequences of a table, where they stand, and what was written.

    Attributes:
        table: The sequences.
        members: Those that are meant.
        batch_index: Where each of them stands.
        exact: Arrays that are as large as they have to be, the members at 0, 1, …
        padded: Larger arrays.
        attended: Of the larger mask: which slots are attended to.
        rows: N, without padding.
    """

    table: Table
    members: NDArray[np.int64]
    batch_index: NDArray[np.int64]
    exact: StepInputs
    padded: StepInputs
    attended: NDArray[np.bool_]
    rows: int


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    """Some of the sequences of a table, in any order, with any rows, slots and ancestors."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=9))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    table = filled(counts, rng)
    members = rng.permutation(len(counts))[: draw(st.integers(1, len(counts)))]
    needed = extent(table, members)
    exact = inputs(needed.rows, len(members), max(needed.queries, 2), SLOTS, np.dtype(np.bool_), rng)
    pack_step(table, members, np.arange(len(members)), True, False, exact)
    batch = batch_size(len(members))
    shape = step_shape(
        needed, 3, batch=batch, slots=WIDER_SLOTS, source_width=32, vocabulary=VOCABULARY, logprobs=False
    )
    batch_index = 1 + rng.permutation(batch - 1)[: len(members)]
    dtype = np.dtype(draw(st.sampled_from([np.bool_, np.uint16])))
    padded = inputs(shape.rows, batch, shape.query_length, WIDER_SLOTS, dtype, rng)
    attended, masked = MASK_VALUES[dtype]
    pack_step(table, members, batch_index, attended, masked, padded)
    assert set(np.unique(padded.mask)) <= {attended, masked}
    return Packed(table, members, batch_index, exact, padded, padded.mask == attended, needed.rows)


def filled(counts: list[int], rng: np.random.Generator) -> Table:
    """A table of sequences of so many rows."""
    table = SequenceTable(len(counts), ()).arrays
    for index, rows in enumerate(counts):
        sequence = table.sequences[index]
        sequence.rows, sequence.slots_end, sequence.source_length = rows, SLOTS, rng.integers(1, 9)
        sequence.token, sequence.position = rng.integers(5, 50, 16), rng.integers(0, 9, 16)
        sequence.slot[:rows] = rng.permutation(SLOTS)[:rows]
        table.ancestors[index, :rows, :SLOTS] = rng.random((rows, SLOTS)) < 0.5
        table.ancestors[index, np.arange(rows), sequence.slot[:rows]] = True
    return table


def inputs(
    rows: int, batch: int, queries: int, slots: int, mask: np.dtype[Any], rng: np.random.Generator
) -> StepInputs:
    """Arrays that hold anything; of half precision, the slot has a third number, which is zero."""
    result = StepInputs(
        ids=rng.integers(0, 99, rows),
        positions=rng.integers(0, 99, rows),
        slot=rng.integers(0, 99, (rows, 2)),
        pad_index=rng.integers(0, 99, (batch, queries)),
        unpad_index=rng.integers(0, 99, rows),
        mask=rng.integers(0, 2, (batch, queries, slots)).astype(mask),
        source_length=rng.integers(0, 99, batch),
    )
    if mask == np.uint16:
        return result._replace(slot=np.concatenate([result.slot, np.zeros((rows, 1), np.int64)], axis=1))
    return result


@given(packed())
def test_rows_are_what_they_are_in_exact_arrays(packed: Packed) -> None:
    exact, padded, rows = packed.exact, packed.padded, packed.rows
    assert np.array_equal(padded.ids[:rows], exact.ids)
    assert np.array_equal(padded.positions[:rows], exact.positions)
    assert np.array_equal(padded.slot[:rows, 0], packed.batch_index[exact.slot[:, 0]])
    assert np.array_equal(padded.slot[:rows, 1], exact.slot[:, 1])
    # Each row is read back from the place of the rectangle at which it stands.
    assert np.array_equal(padded.pad_index.ravel()[padded.unpad_index[:rows]], np.arange(rows))


@given(packed())
def test_rows_are_those_of_the_table(packed: Packed) -> None:
    """One sequence after the other, each with its own tokens, and with its ancestors at its batch index."""
    row, exact = 0, packed.exact
    for m, index in enumerate(packed.members):
        sequence = packed.table.sequences[index]
        for r in range(sequence.rows):
            assert exact.ids[row] == sequence.token[r]
            assert exact.positions[row] == sequence.position[r]
            assert exact.slot[row].tolist() == [m, sequence.slot[r]]
            assert np.array_equal(exact.mask[m, r], packed.table.ancestors[index, r, :SLOTS])
            assert exact.unpad_index[row] == m * exact.pad_index.shape[1] + r
            row += 1
        assert exact.source_length[m] == sequence.source_length
    assert row == packed.rows


@given(packed())
def test_sequences_attend_to_what_they_attend_to_in_exact_arrays(packed: Packed) -> None:
    exact, padded = packed.exact, packed.padded
    _, queries, slots = exact.mask.shape
    mask = packed.attended[packed.batch_index]
    assert np.array_equal(mask[:, :queries, :slots], exact.mask)
    assert not mask[:, :, slots:].any()
    assert np.array_equal(padded.source_length[packed.batch_index], exact.source_length)
    assert np.array_equal(padded.pad_index[packed.batch_index, :queries], exact.pad_index)


@given(packed())
def test_places_without_a_row_repeat_one_of_their_sequence(packed: Packed) -> None:
    """So that nothing of another sequence, and no row without an ancestor, is computed there."""
    for m, index in enumerate(packed.members):
        rows, b = packed.table.sequences[index].rows, packed.batch_index[m]
        assert (packed.padded.pad_index[b, rows:] == packed.padded.pad_index[b, 0]).all()
        assert np.array_equal(
            packed.attended[b, rows:], np.tile(packed.attended[b, 0], (len(packed.attended[b]) - rows, 1))
        )


@given(packed())
def test_padding_writes_one_slot_of_batch_index_0_and_reads_what_is_there(packed: Packed) -> None:
    padded, rows = packed.padded, packed.rows
    batch, queries = padded.pad_index.shape
    assert 0 not in packed.batch_index
    assert (padded.slot[rows:] == 0).all()
    assert (padded.ids[rows:] == 0).all()
    assert (padded.positions[rows:] == 0).all()
    assert (padded.unpad_index[rows:] // queries == 0).all()
    others = np.setdiff1d(np.arange(batch), packed.batch_index)
    assert packed.attended[others].any(axis=-1).all()
    assert (padded.source_length[others] == 1).all()
    assert (padded.pad_index < rows).all()
    assert (padded.pad_index >= 0).all()


@pytest.mark.parametrize("kind", [np.bool_, np.uint16])
def test_what_is_masked_is_finite_in_half_precision(kind: type[np.generic]) -> None:
    """A row without any ancestor must not become NaN."""
    attended, masked = MASK_VALUES[np.dtype(kind)]
    if kind is np.uint16:
        attended, masked = (np.array([bits]).view(np.float16)[0] for bits in (attended, masked))
        assert attended == 0
        assert -np.inf < masked <= -1e4
    else:
        assert (attended, masked) == (True, False)


@pytest.mark.parametrize("lengths", [[1], [3, 1, 7], [2] * 5])
def test_a_padded_encoder_call_has_the_same_sources(lengths: list[int]) -> None:
    sources = [list(range(5, 5 + length)) for length in lengths]
    axes = encoder_shape(len(lengths), max(lengths)).axes()
    into = EncoderInputs(
        ids=np.full(axes["N"], 7),
        positions=np.full(axes["N"], 7),
        pad_index=np.full((axes["S"], axes["R"]), 7),
        unpad_index=np.full(axes["N"], 7),
        source_length=np.full(axes["S"], 7),
    )
    ids, _ = flat(sources)
    pack_encoder(*flat(sources), into)
    rows = len(ids)
    assert np.array_equal(into.pad_index.ravel()[into.unpad_index[:rows]], np.arange(rows))
    for source, length in enumerate(lengths):
        places = into.pad_index[source]
        assert into.ids[places[:length]].tolist() == sources[source]
        assert into.positions[places[:length]].tolist() == list(range(length))
        assert (places[length:] == places[length - 1]).all()
        assert into.source_length[source] == length
    assert (into.pad_index < rows).all()
    assert (into.source_length[len(lengths) :] == 1).all()
    assert (into.ids[rows:] == 0).all()
    assert (into.positions[rows:] == 0).all()
    assert (into.unpad_index[rows:] == 0).all()
