"""A padded batch says what the batch says, and its padding touches nobody's seat alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from beamline_server.engine.batch import encoder_batch, layout, step_batch
from beamline_server.engine.ort.padding import NOBODYS_SEAT, fill_encoder, fill_step
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from beamline_server.engine.backend import StepBatch
from beamline_server.engine.ort.cuda.shapes import StepShape, encoder_shape, seat_count, step_shape

SLOTS, BUCKET_SLOTS = 20, 32


@dataclass(frozen=True)
class Padded:
    """A batch, where its sentences sit, and what came of it."""

    batch: StepBatch
    seat: NDArray[np.int64]
    shape: StepShape
    into: dict[str, NDArray[Any]]

    @property
    def rows(self) -> int:
        return len(self.batch.ids)


@st.composite
def batches(draw: st.DrawFn) -> Padded:
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=9))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    sentences, beams = len(counts), max(counts)
    live = np.arange(beams) < np.array(counts)[:, None]
    batch = step_batch(
        layout(live),
        token=rng.integers(5, 50, (sentences, beams)),
        step=rng.integers(0, 9, sentences),
        slot=rng.permuted(np.tile(np.arange(SLOTS), (sentences, 1)), axis=1)[:, :beams],
        ancestors=rng.random((sentences, 1, max(beams, 2), SLOTS)) < 0.5,
        source_length=rng.integers(1, 9, sentences),
        candidates=draw(st.integers(1, 30)),
    )
    seats = seat_count(sentences)
    shape = step_shape(batch, seats=seats, slots=BUCKET_SLOTS, source_width=32, vocabulary=40)
    seat = 1 + rng.permutation(seats - 1)[:sentences]
    half = draw(st.booleans())
    into = inputs(shape, half=half)
    for array in into.values():  # whatever was there before
        array.view(np.uint8)[:] = rng.integers(0, 2, array.view(np.uint8).shape)
    if half:
        into["slot"][..., 2] = 0
    fill_step(into, batch, seat)
    return Padded(batch, seat, shape, into)


def inputs(shape: StepShape, *, half: bool) -> dict[str, NDArray[Any]]:
    axes = shape.axes()
    mask: type[np.generic] = np.float16 if half else np.bool_
    return {
        "ids": np.zeros(axes["N"], np.int64),
        "positions": np.zeros(axes["N"], np.int64),
        "slot": np.zeros((axes["N"], 1, 3) if half else (axes["N"], 2), np.int64),
        "row_of": np.zeros((axes["S"], axes["Q"]), np.int64),
        "back": np.zeros(axes["N"], np.int64),
        "ancestors": np.zeros((axes["S"], 1, axes["Q"], axes["P"]), mask),
        "source_length": np.zeros(axes["S"], np.int64),
    }


def attended(into: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    mask = into["ancestors"]
    result: NDArray[np.bool_] = mask if mask.dtype == np.bool_ else mask == 0
    return result


@given(batches())
def test_rows_are_what_they_were(padded: Padded) -> None:
    batch, into, rows = padded.batch, padded.into, padded.rows
    slot = into["slot"].reshape(len(into["slot"]), -1)
    assert np.array_equal(into["ids"][:rows], batch.ids)
    assert np.array_equal(into["positions"][:rows], batch.positions)
    assert np.array_equal(slot[:rows, 0], padded.seat[batch.slot[:, 0]])
    assert np.array_equal(slot[:rows, 1], batch.slot[:, 1])
    # Each row is read back from the place of the rectangle at which it stands.
    assert np.array_equal(into["row_of"].ravel()[into["back"][:rows]], np.arange(rows))


@given(batches())
def test_sentences_attend_to_what_they_attended_to(padded: Padded) -> None:
    batch, into = padded.batch, padded.into
    _, _, beams, slots = batch.ancestors.shape
    mask = attended(into)[padded.seat]
    assert np.array_equal(mask[:, :, :beams, :slots], batch.ancestors)
    assert not mask[:, :, :beams, slots:].any()
    assert np.array_equal(into["source_length"][padded.seat], batch.source_length)
    assert np.array_equal(into["row_of"][padded.seat, :beams], batch.row_of)


@given(batches())
def test_padding_writes_one_slot_of_nobodys_seat_and_reads_what_is_there(padded: Padded) -> None:
    into, rows, shape = padded.into, padded.rows, padded.shape
    slot = into["slot"].reshape(len(into["slot"]), -1)[rows:]
    assert (slot == [NOBODYS_SEAT, *[0] * (slot.shape[1] - 1)]).all()
    assert (into["ids"][rows:] == 0).all()
    assert (into["positions"][rows:] == 0).all()
    assert (into["back"][rows:] // shape.query_length == NOBODYS_SEAT).all()
    assert NOBODYS_SEAT not in padded.seat
    others = np.setdiff1d(np.arange(shape.seats), padded.seat)
    assert attended(into)[others].any(axis=-1).all()
    assert (into["source_length"][others] == 1).all()
    assert (into["row_of"] < rows).all()
    assert (into["row_of"] >= 0).all()


@given(batches())
def test_a_bucket_holds_its_batch(padded: Padded) -> None:
    shape, batch = padded.shape, padded.batch
    assert shape.rows >= padded.rows
    assert shape.seats > len(batch.source_length)
    assert shape.query_length >= batch.row_of.shape[1]
    assert shape.candidates >= min(batch.candidates, 40)
    assert shape.candidates <= 40


@pytest.mark.parametrize("lengths", [[1], [3, 1, 7], [2] * 5])
def test_a_padded_encoder_call_has_the_same_sentences(lengths: list[int]) -> None:
    batch = encoder_batch([list(range(5, 5 + length)) for length in lengths], source_width=max(lengths))
    shape = encoder_shape(batch)
    axes = shape.axes()
    into = {
        **{name: np.full(axes["N"], 7) for name in ("ids", "positions", "back")},
        "row_of": np.full((axes["S"], axes["R"]), 7),
        "source_length": np.full(axes["S"], 7),
    }
    fill_encoder(into, batch)
    rows = len(batch.ids)
    assert np.array_equal(into["row_of"].ravel()[into["back"][:rows]], np.arange(rows))
    for sentence, length in enumerate(lengths):
        assert into["ids"][into["row_of"][sentence, :length]].tolist() == list(range(5, 5 + length))
        assert into["source_length"][sentence] == length
    assert (into["row_of"] < rows).all()
    assert (into["source_length"][len(lengths) :] == 1).all()
    assert (into["ids"][rows:] == 0).all()
