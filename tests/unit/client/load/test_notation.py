"""How durations, shares and mixes are written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load.notation import (
    NotationUnusable,
    parse_duration_range_s,
    parse_duration_s,
    parse_mix,
    parse_positive_integer,
    parse_share,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("500ms", 0.5),
        ("250us", 0.00025),
        ("2m", 120),
        ("1.5h", 5400),
        (" .5s ", 0.5),
        ("1e3ms", 1),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "30", "-1s", "1 s", "1d", "nans", "1e999s", "1s2ms", "٣s", "1\n"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(NotationUnusable, match="such as 500ms, 30s or 2m"):
        parse_duration_s(text)


def test_a_bare_number_takes_the_unit_that_is_expected() -> None:
    assert parse_duration_s("2", unit="ms") == pytest.approx(0.002)
    assert parse_duration_s("2s", unit="ms") == 2


@pytest.mark.parametrize(
    ("text", "seconds"), [("0-200ms", (0, 0.2)), ("100-200ms", (0.1, 0.2)), ("50ms-1s", (0.05, 1)), ("1s-1s", (1, 1))]
)
def test_ranges_of_durations(text: str, seconds: tuple[float, float]) -> None:
    assert parse_duration_range_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "200ms", "0-200", "-5ms", "2s-1s", "1s-100ms", "0-1s-2s", "a-bs"])
def test_what_is_no_range_of_durations_is_refused(text: str) -> None:
    with pytest.raises(NotationUnusable, match=r"range of durations|ends before it starts"):
        parse_duration_range_s(text)


def test_shares() -> None:
    assert [parse_share(text) for text in ("20%", "0.2", "0%", "0", "100%", "1")] == [0.2, 0.2, 0, 0, 1, 1]


@pytest.mark.parametrize("text", ["", "%", "20", "101%", "-1%", "nan", "inf%", "a fifth", "20%%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(NotationUnusable, match=r"20% or 0\.2"):
        parse_share(text)


@given(
    weights=st.dictionaries(st.integers(1, 10**9), st.floats(1e-3, 1e3), min_size=1, max_size=9), percent=st.booleans()
)
def test_the_weights_of_a_mix_are_proportions(weights: dict[int, float], percent: bool) -> None:
    text = ", ".join(f"{value}:{weight:.9f}{'%' * percent}" for value, weight in weights.items())

    mix = parse_mix(text, parse_positive_integer)

    assert mix.values == tuple(weights)
    assert mix.shares == pytest.approx([weight / sum(weights.values()) for weight in weights.values()], rel=1e-5)
    assert math.fsum(mix.shares) == pytest.approx(1)


def test_values_without_weights_are_equally_likely_and_those_without_weight_are_left_out() -> None:
    assert parse_mix("4", parse_positive_integer).shares == (1,)
    assert parse_mix("1,2,4,8", parse_positive_integer).shares == (0.25,) * 4
    assert parse_mix("1:0%,4:80%", parse_positive_integer).values == (4,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no whole number"),
        ("1,", "no whole number"),
        ("0", "no whole number"),
        ("99999999999", "no whole number"),
        ("1.5", "no whole number"),
        ("²", "no whole number"),
        ("1:", "no weight"),
        ("1:-5%,2:5%", "no weight"),
        ("1:nan,2:1", "no weight"),
        ("1:20%,4", "weighs only some"),
        ("1:20%,4:80", "with and without %"),
        ("1:0,4:0", "above 0"),
        ("1:1e308,4:1e308", "above 0|of no use"),
        ("4,4", "twice"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(NotationUnusable, match=reason) as refused:
        parse_mix(text, parse_positive_integer)
    assert "\n" not in str(refused.value)


@given(text=st.text(max_size=30) | st.from_regex(r"[0-9:%.,e\-]{0,20}", fullmatch=True))
def test_any_text_is_a_mix_or_is_refused(text: str) -> None:
    try:
        mix = parse_mix(text, parse_positive_integer)
    except NotationUnusable:
        return
    assert all(0 < share <= 1 for share in mix.shares)
