"""Packing rows and unpacking them give back what was packed."""

import numpy as np
from beamline_server.engine.batch import LEAST_QUERIES, encoder_batch, layout, step_batch
from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.backend import StepBatch

sources = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=20), min_size=1, max_size=8)


@given(sources, st.integers(0, 20))
def test_sources_are_packed_row_by_row(texts: list[list[int]], idle: int) -> None:
    batch = encoder_batch(texts, source_width=max(map(len, texts)) + idle)
    assert batch.ids.tolist() == [token for text in texts for token in text]
    assert batch.positions.tolist() == [position for text in texts for position in range(len(text))]
    assert batch.source_length.tolist() == [len(text) for text in texts]


@given(sources, st.integers(0, 20))
def test_the_attention_rectangle_of_sources_leads_to_their_rows_and_back(texts: list[list[int]], idle: int) -> None:
    width = max(map(len, texts)) + idle
    batch = encoder_batch(texts, source_width=width)
    rectangle = batch.ids[batch.row_of]
    assert rectangle.shape == (len(texts), max(width, LEAST_QUERIES))
    for row, text in zip(rectangle.tolist(), texts, strict=True):
        # Padding repeats the last token: finite, and of the same sentence.
        assert row == text + text[-1:] * (len(row) - len(text))
    assert np.array_equal(batch.row_of.ravel()[batch.back], np.arange(len(batch.ids)))


def test_a_single_token_is_attended_to_by_two_rows() -> None:
    """One query would take another kernel, with other last bits."""
    assert encoder_batch([[7]], source_width=1).row_of.tolist() == [[0, 0]]


class Beams:
    """Live beams of some sentences, with tokens and slots that tell them apart."""

    def __init__(self, counts: list[int], idle_beams: int) -> None:
        sentences, beams = len(counts), max(counts) + idle_beams
        self.counts = counts
        self.live = np.arange(beams) < np.array(counts)[:, None]
        self.token = 100 * np.arange(sentences)[:, None] + np.arange(beams)
        self.slot = self.token + 50
        self.step = 10 + np.arange(sentences)
        self.queries = max(beams, LEAST_QUERIES)

    def packed(self) -> StepBatch:
        return step_batch(
            layout(self.live),
            token=self.token,
            step=self.step,
            slot=self.slot,
            ancestors=np.zeros((len(self.counts), 1, self.queries, 16), np.bool_),
            source_length=np.ones(len(self.counts), np.int64),
            candidates=4,
        )


beams = st.builds(Beams, st.lists(st.integers(1, 16), min_size=1, max_size=8), st.integers(0, 4))


@given(beams)
def test_only_live_beams_have_rows(beams: Beams) -> None:
    batch = beams.packed()
    expected = [
        (100 * sentence + beam, 10 + sentence, [sentence, 100 * sentence + beam + 50])
        for sentence, count in enumerate(beams.counts)
        for beam in range(count)
    ]
    assert list(zip(batch.ids.tolist(), batch.positions.tolist(), batch.slot.tolist(), strict=True)) == expected


@given(beams)
def test_the_attention_rectangle_of_beams_leads_to_their_rows_and_back(beams: Beams) -> None:
    batch = beams.packed()
    assert batch.row_of.shape == (len(beams.counts), beams.queries)
    assert np.array_equal(batch.row_of.ravel()[batch.back], np.arange(sum(beams.counts)))
    rectangle = batch.ids[batch.row_of]
    for sentence, count in enumerate(beams.counts):
        own = [100 * sentence + beam for beam in range(count)]
        assert rectangle[sentence, :count].tolist() == own
        assert set(rectangle[sentence].tolist()) == set(own)
