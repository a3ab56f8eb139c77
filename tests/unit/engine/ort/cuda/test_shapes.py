"""Few shapes, each of which holds what is rounded up to it."""

from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.ort.cuda.shapes import batch_size, doubled, encoder_shape, step_shape, stepped
from beamline_server.engine.pack import LEAST_QUERIES, Extent


@given(st.integers(1, 5000), st.sampled_from([1, 2, 4, 8, 32]))
def test_what_is_rounded_up_fits(needed: int, least: int) -> None:
    for size in (doubled(needed, least), stepped(needed, least)):
        assert size >= max(needed, least)
        assert size < 2 * max(needed, least)


@given(st.integers(65, 5000))
def test_padding_of_large_numbers_is_at_most_half(needed: int) -> None:
    assert stepped(needed, 4) <= 1.5 * needed


def test_few_sizes_cover_a_thousand_rows() -> None:
    assert len({stepped(rows, 4) for rows in range(1, 1025)}) <= 14


@given(st.integers(0, 3000))
def test_a_batch_index_is_left_for_nobody(sequences: int) -> None:
    assert batch_size(sequences) > sequences


@given(st.integers(1, 2000), st.integers(1, 16), st.integers(1, 60), st.booleans())
def test_a_step_fits_into_its_shape(rows: int, queries: int, candidates: int, logprobs: bool) -> None:
    """Batch, slots and source width are those of the memory; no more candidates than there are tokens."""
    needed = Extent(rows=rows, queries=queries, slots=9, source_length=7, beams=4, length=2)
    shape = step_shape(needed, candidates, batch=5, slots=32, source_width=64, vocabulary=40, logprobs=logprobs)
    assert shape.rows >= rows
    assert shape.query_length >= max(queries, LEAST_QUERIES)
    assert min(candidates, 40) <= shape.candidates <= 40
    assert shape.axes() == {
        "S": 5,
        "Q": shape.query_length,
        "N": shape.rows,
        "P": 32,
        "R": 64,
        "C": shape.candidates,
    }
    assert shape.logprobs is logprobs


@given(st.integers(1, 100), st.integers(1, 500))
def test_sources_fit_into_their_shape(sources: int, width: int) -> None:
    axes = encoder_shape(sources, width).axes()
    assert axes["S"] >= sources
    assert axes["R"] >= width
    assert axes["N"] == axes["S"] * axes["R"]
