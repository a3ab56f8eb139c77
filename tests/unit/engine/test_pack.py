"""Packing rows and unpacking them give back what was packed, whatever the arrays held before."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.admission import MOST_ROWS
from beamline_server.engine.pack import LEAST_QUERIES, EncoderInputs, StepInputs, extent, flat, pack_encoder, pack_step
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.table import IntArray, SequenceTable
from doubles.memory import read_sources

RUBBISH = -77

# -- sources ----------------------------------------------------------------------------------------------------------

sources = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=20), min_size=1, max_size=8)


def packed(texts: list[list[int]], *, width: int, more: int = 0) -> EncoderInputs:
    """Sources in arrays that are larger by some rows and batch indices."""
    ids, lengths = flat(texts)
    rows, batch = len(ids) + more, len(texts) + more
    into = EncoderInputs(
        ids=np.full(rows, RUBBISH),
        positions=np.full(rows, RUBBISH),
        pad_index=np.full((batch, width), RUBBISH),
        unpad_index=np.full(rows, RUBBISH),
        source_length=np.full(batch, RUBBISH),
    )
    pack_encoder(ids, lengths, into)
    return into


@given(sources, st.integers(0, 20), st.integers(0, 3))
def test_sources_are_packed_row_by_row(texts: list[list[int]], idle: int, more: int) -> None:
    into = packed(texts, width=max(map(len, texts)) + idle, more=more)
    rows = sum(map(len, texts))
    assert into.ids[:rows].tolist() == [token for text in texts for token in text]
    assert into.positions[:rows].tolist() == [position for text in texts for position in range(len(text))]
    assert into.source_length.tolist() == [*(len(text) for text in texts), *[1] * more]
    for array in (into.ids, into.positions, into.unpad_index):
        assert not array[rows:].any()


@given(sources, st.integers(0, 20), st.integers(0, 3))
def test_the_attention_rectangle_of_sources_leads_to_their_rows_and_back(
    texts: list[list[int]], idle: int, more: int
) -> None:
    into = packed(texts, width=max(map(len, texts)) + idle, more=more)
    rectangle = into.ids[into.pad_index]
    for row, text in zip(rectangle.tolist(), texts, strict=False):
        # Padding repeats the last token: finite, and of the same source.
        assert row == text + text[-1:] * (len(row) - len(text))
    rows = sum(map(len, texts))
    assert np.array_equal(into.pad_index.ravel()[into.unpad_index[:rows]], np.arange(rows))
    assert not into.pad_index[len(texts) :].any()


@given(sources)
def test_the_double_reads_back_what_was_packed(texts: list[list[int]]) -> None:
    read, padded_tokens = read_sources(texts)
    assert read == tuple(map(tuple, texts))
    assert (padded_tokens + sum(map(len, texts))) % len(texts) == 0


# -- rows of a step ---------------------------------------------------------------------------------------------------


class Sequences:
    """Sequences in a table, with tokens, positions, slots and ancestors that tell them apart."""

    def __init__(self, rows: list[int], size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.members: IntArray = rng.permutation(size)[: len(rows)]
        self.table = SequenceTable(size, (1,))
        for number, (index, count) in enumerate(zip(self.members.tolist(), rows, strict=True)):
            request = GenerationRequest(RequestId(number), (7,) * (1 + number), SearchOptions(beam_size=count))
            self.table.enter(index, request, 0)
            sequence = self.table.arrays.sequences[index]
            sequence.rows, sequence.slots_end, sequence.length = count, int(rng.integers(1, 40)), number
            sequence.token[:count] = 100 * number + np.arange(count)
            sequence.position[:count] = 200 + 10 * number + np.arange(count)
            sequence.slot[:count] = rng.permutation(40)[:count]
            self.table.arrays.ancestors[index, :, : sequence.slots_end] = rng.integers(0, 2, (MOST_ROWS, 1))


@st.composite
def several(draw: st.DrawFn) -> Sequences:
    rows = draw(st.lists(st.integers(1, MOST_ROWS), min_size=1, max_size=8))
    return Sequences(rows, len(rows) + draw(st.integers(0, 4)), draw(st.integers(0, 1 << 16)))


def packed_step(of: Sequences, more: int, *, slots: int = 48) -> tuple[StepInputs, IntArray]:
    """Rows in arrays that are larger by some of everything; batch index 0 is nobody's then."""
    needed = extent(of.table.arrays, of.members)
    rows, batch, queries = needed.rows + more, len(of.members) + more, max(needed.queries, LEAST_QUERIES) + more
    into = StepInputs(
        ids=np.full(rows, RUBBISH),
        positions=np.full(rows, RUBBISH),
        slot=np.full((rows, 3), RUBBISH),
        pad_index=np.full((batch, queries), RUBBISH),
        unpad_index=np.full(rows, RUBBISH),
        mask=np.full((batch, queries, slots), RUBBISH, np.float32),
        source_length=np.full(batch, RUBBISH),
    )
    batch_index = np.arange(len(of.members)) + (1 if more else 0)
    pack_step(of.table.arrays, of.members, batch_index, np.float32(0.0), np.float32(-1e4), into)
    return into, batch_index


@given(several())
def test_the_extent_is_what_the_neediest_need_and_the_rows_of_all(of: Sequences) -> None:
    needed = extent(of.table.arrays, of.members)
    these = of.table.arrays.sequences[of.members]
    assert needed.rows == these["rows"].sum()
    assert needed.queries == these["rows"].max()
    assert needed.slots == these["slots_end"].max()
    assert needed.source_length == these["source_length"].max()
    assert needed.beams == these["beams"].max()
    assert needed.length == these["length"].max()


def test_nobody_needs_nothing() -> None:
    assert not any(extent(SequenceTable(3, (1,)).arrays, np.zeros(0, np.int64)))


@given(several(), st.integers(0, 3))
def test_every_row_has_its_token_position_and_slot(of: Sequences, more: int) -> None:
    into, batch_index = packed_step(of, more)
    expected = [
        (int(sequence.token[r]), int(sequence.position[r]), [b, int(sequence.slot[r])])
        for b, sequence in zip(batch_index.tolist(), of.table.arrays.sequences[of.members], strict=True)
        for r in range(sequence.rows)
    ]
    rows = len(expected)
    slots = into.slot[:rows, :2].tolist()
    assert list(zip(into.ids[:rows].tolist(), into.positions[:rows].tolist(), slots, strict=True)) == expected
    # The third number of a slot is the backend's own.
    assert (into.slot[:, 2] == RUBBISH).all()


@given(several(), st.integers(0, 3))
def test_the_attention_rectangle_leads_to_the_rows_and_back_and_sees_their_ancestors(of: Sequences, more: int) -> None:
    into, batch_index = packed_step(of, more)
    rows = extent(of.table.arrays, of.members).rows
    assert np.array_equal(into.pad_index.ravel()[into.unpad_index[:rows]], np.arange(rows))
    rectangle = into.ids[into.pad_index]
    for b, index in zip(batch_index.tolist(), of.members.tolist(), strict=True):
        sequence, ancestors = of.table.arrays.sequences[index], of.table.arrays.ancestors[index]
        own = sequence.token[: sequence.rows].tolist()
        # A place at which no row stands repeats the first one.
        assert rectangle[b].tolist() == own + own[:1] * (rectangle.shape[1] - len(own))
        rows_there = [r if r < len(own) else 0 for r in range(rectangle.shape[1])]
        assert np.array_equal(into.mask[b] == 0.0, ancestors[rows_there, : into.mask.shape[2]])
        assert into.source_length[b] == sequence.source_length


@given(several(), st.integers(1, 3))
def test_what_nobody_needs_changes_nothing_and_is_finite(of: Sequences, more: int) -> None:
    into, batch_index = packed_step(of, more)
    rows = extent(of.table.arrays, of.members).rows
    for array in (into.ids, into.positions, into.slot[:, :2], into.unpad_index):
        assert not array[rows:].any()
    nobody = np.setdiff1d(np.arange(len(into.source_length)), batch_index)
    assert len(nobody) == more
    assert 0 in nobody
    assert not into.pad_index[nobody].any()
    assert (into.source_length[nobody] == 1).all()
    assert (into.mask[nobody, :, 0] == 0.0).all()
    assert (into.mask[nobody, :, 1:] == np.float32(-1e4)).all()
    assert np.isin(into.mask, np.array([0.0, -1e4], np.float32)).all()


@given(several(), st.sampled_from([1, 30, 64, 200]))
def test_a_mask_may_have_more_slots_than_the_table_or_fewer(of: Sequences, slots: int) -> None:
    into, batch_index = packed_step(of, 0, slots=slots)
    for b, index in zip(batch_index.tolist(), of.members.tolist(), strict=True):
        row = of.table.arrays.ancestors[index, 0]
        kept = min(slots, len(row))
        assert np.array_equal(into.mask[b, 0, :kept] == 0.0, row[:kept])
        assert (into.mask[b, 0, kept:] == np.float32(-1e4)).all()
