"""Few shapes, each of which holds what is rounded up to it."""

from hypothesis import given
from hypothesis import strategies as st

from beamline_server.engine.ort.cuda.shapes import doubled, seat_count, stepped


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
def test_a_seat_is_left_for_nobody(sentences: int) -> None:
    assert seat_count(sentences) > sentences
