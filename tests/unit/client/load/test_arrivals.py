"""When requests are sent: the inverse is exact, the counts are those of the rate, and bad input is one clear line."""

import gzip
import hashlib
import itertools
import math
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client.load import arrivals
from beamline_client.load.arrivals import (
    ArrivalsUnusable,
    RateProfile,
    draw_arrivals,
    parse_rate,
    read_trace,
    schedule_sha256,
)

rates = st.floats(0.1, 10_000)
Process = Literal["poisson", "constant"]
PROCESSES: tuple[Process, ...] = ("poisson", "constant")


@st.composite
def profiles(draw: st.DrawFn) -> RateProfile:
    """Any rate that fits a run of 10 seconds or longer."""
    shape = draw(st.sampled_from(["flat", "ramp", "step", "spike"]))
    some = [f"{draw(rates):.6f}" for _ in range(draw(st.integers(2, 5)))]
    if shape == "flat":
        return parse_rate(some[0])
    if shape == "ramp":
        return parse_rate(f"ramp:{some[0]}-{some[1]}")
    if shape == "step":
        return parse_rate(f"step:{','.join(some)}")
    start_s, length_s = draw(st.floats(0, 6)), draw(st.floats(0.01, 4))
    return parse_rate(f"spike:{some[0]},{some[1]},{start_s:.3f}s,{length_s * 1000:.0f}ms")


@given(profile=profiles(), duration_s=st.floats(10, 3600), shares=st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_times_are_the_exact_inverse_of_the_cumulative_rate(
    profile: RateProfile, duration_s: float, shares: list[float]
) -> None:
    points = np.sort(np.array(shares)) * profile.requests(duration_s)

    times = profile.when(points, duration_s)

    assert np.all(np.diff(times) >= -1e-9 * duration_s)
    np.testing.assert_allclose(profile.cumulative(times, duration_s), points, rtol=1e-9, atol=1e-9)


@given(
    profile=profiles(), duration_s=st.floats(10, 100), process=st.sampled_from(PROCESSES), seed=st.integers(0, 2**64)
)
def test_times_ascend_within_the_run_and_are_the_same_for_the_same_seed(
    profile: RateProfile, duration_s: float, process: Process, seed: int
) -> None:
    if profile.requests(duration_s) < 30:  # then a Poisson process may well have none
        duration_s = 1000.0

    times = draw_arrivals(profile, process, duration_s, seed)

    assert times.dtype == np.float64
    assert times[0] >= 0
    assert times[-1] < duration_s
    assert np.all(np.diff(times) >= 0)
    assert np.array_equal(times, draw_arrivals(profile, process, duration_s, seed))


@given(profile=profiles(), duration_s=st.floats(10, 100))
def test_constant_arrivals_are_one_mean_request_apart(profile: RateProfile, duration_s: float) -> None:
    times = draw_arrivals(profile, "constant", duration_s, 0)

    points = profile.cumulative(times, duration_s)
    np.testing.assert_allclose(points, np.arange(len(times)) + 0.5, rtol=1e-9, atol=1e-6)
    assert len(times) == pytest.approx(profile.requests(duration_s), abs=0.5 + 1e-6)


@pytest.mark.parametrize("text", ["500", "ramp:10-990", "step:100,900,500", "spike:400,1400,20s,10s"])
@pytest.mark.parametrize("seed", range(5))
def test_poisson_counts_are_within_their_bounds_everywhere(text: str, seed: int) -> None:
    """In every tenth of the run: mean and variance are the cumulative rate's increase (5 standard deviations)."""
    profile, duration_s = parse_rate(text), 100.0

    times = draw_arrivals(profile, "poisson", duration_s, seed)

    edges = np.linspace(0, duration_s, 11)
    counts, _ = np.histogram(times, edges)
    means = np.diff(profile.cumulative(edges, duration_s))
    assert np.all(np.abs(counts - means) <= 5 * np.sqrt(means))


@pytest.mark.parametrize("seed", range(5))
def test_poisson_gaps_are_exponential(seed: int) -> None:
    """By the distance of Kolmogorov and Smirnov; 1.95 / √n is exceeded once in a thousand."""
    gaps = np.sort(np.diff(draw_arrivals(parse_rate("100"), "poisson", 200.0, seed)))

    expected = 1 - np.exp(-100 * gaps)
    steps = np.arange(len(gaps) + 1) / len(gaps)
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(gaps))


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    short, long = (draw_arrivals(parse_rate("1000"), "poisson", duration_s, 7) for duration_s in (5.0, 2000.0))

    assert np.array_equal(long[: len(short)], short)
    assert len(long) > arrivals._CHUNK  # so that the second chunk goes on where the first ended
    assert np.diff(long).min() >= 0
    assert len(long) == pytest.approx(2_000_000, abs=5 * math.sqrt(2_000_000))


def test_seeds_differ() -> None:
    schedules = [draw_arrivals(parse_rate("10"), "poisson", 10.0, seed) for seed in range(20)]

    assert len({schedule_sha256(times) for times in schedules}) == 20


def test_shapes_are_what_they_say() -> None:
    def rate_at(text: str, second: float) -> float:
        profile = parse_rate(text)
        mean = profile.cumulative(np.array([second, second + 1e-3]), 30.0)
        return float(np.diff(mean)[0]) / 1e-3

    assert [rate_at("20", second) for second in (0, 15, 29)] == pytest.approx([20, 20, 20])
    assert [rate_at("ramp:10-40", second) for second in (0, 15, 29.999)] == pytest.approx([10, 25, 40], rel=1e-3)
    assert [rate_at("ramp:40-10", second) for second in (0, 15, 29.999)] == pytest.approx([40, 25, 10], rel=1e-3)
    assert [rate_at("step:5,10,15", second) for second in (9, 11, 19, 21)] == pytest.approx([5, 10, 10, 15])
    spike = [rate_at("spike:5,50,10s,2s", second) for second in (9.9, 10, 11.9, 12, 29)]
    assert spike == pytest.approx([5, 50, 50, 5, 5])
    assert parse_rate("spike:5,50,10,2").requests(30.0) == pytest.approx(28 * 5 + 2 * 50)
    assert parse_rate("spike:5,50,0s,30s").requests(30.0) == pytest.approx(30 * 50)
    assert parse_rate("ramp:10-40").highest_per_s == 40


@given(rate=rates)
def test_a_flat_profile_is_that_of_its_text(rate: float) -> None:
    profile = RateProfile.flat(rate)

    assert profile.rates == (rate,)
    assert parse_rate(profile.text).rates[0] == pytest.approx(rate, rel=1e-11)


BAD_RATES = [
    *("", " ", "0", "-1", "nan", "inf", "1e999", "2e6", "1_000", "ten", "100,200", "100/s", "0x10", "٣"),
    *("ramp:", "ramp:10", "ramp:0-10", "ramp:10-0", "ramp:10-20-30", "ramp:-5-10", "ramp:10,20"),
    *("step:", "step:10,", "step:10,0", "step:10,-5", "step:nan", "sine:5"),
    *("spike:5,50,10s", "spike:5,50,10s,0s", "spike:5,50,-1s,2s", "spike:5,50,10s,2s,1", "spike:0,50,1s,1s"),
    *("spike:5,50,10x,2s", "spike:5,inf,1s,1s", "spike:5,50,nan,2s"),
]


@pytest.mark.parametrize("text", BAD_RATES)
def test_what_is_no_rate_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ArrivalsUnusable) as refused:
        parse_rate(text)

    assert "\n" not in str(refused.value)
    assert repr(text) in str(refused.value)
    assert "such as" in str(refused.value) or "lower" in str(refused.value)


@given(text=st.text(max_size=30) | st.from_regex(r"(ramp|step|spike):[0-9.,\-esm]{0,20}", fullmatch=True))
def test_any_text_is_a_rate_or_is_refused(text: str) -> None:
    try:
        profile = parse_rate(text)
    except ArrivalsUnusable:
        return
    assert all(0 < rate <= arrivals.MAX_RATE_PER_S for rate in profile.rates)


@pytest.mark.parametrize(
    ("text", "duration_s", "seed", "reason"),
    [
        ("spike:5,50,10s,2s", 11.9, 0, "ends after 12 s"),
        ("100", 0.0, 0, "duration"),
        ("100", -1.0, 0, "duration"),
        ("100", math.nan, 0, "duration"),
        ("100", math.inf, 0, "duration"),
        ("100", 1.0, -1, "seed"),
        ("1e-9", 1.0, 0, "no request"),
        ("1000000", 51.0, 0, "more than 50,000,000"),
    ],
)
@pytest.mark.parametrize("process", PROCESSES)
def test_runs_that_cannot_be_drawn_are_refused(
    text: str, duration_s: float, seed: int, reason: str, process: Process
) -> None:
    with pytest.raises(ArrivalsUnusable, match=reason):
        draw_arrivals(parse_rate(text), process, duration_s, seed)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_flat_profile_refuses_what_is_no_rate(rate: float) -> None:
    with pytest.raises(ArrivalsUnusable):
        RateProfile.flat(rate)


@given(times=st.lists(st.floats(0, 1e5), min_size=1, max_size=100), packed=st.booleans(), log=st.booleans())
def test_a_trace_is_read_as_it_was_written(
    times: list[float], packed: bool, log: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("trace") / ("trace.gz" if packed else "trace")
    written = times if log else sorted(times)  # a log is in the order in which requests ended
    lines = ["arrival,intended_s,outcome", *(f"1,{time!r},ok" for time in written)] if log else map(repr, written)
    content = "".join(f"{line}\n" for line in itertools.chain(["# recorded", ""], lines)).encode()
    path.write_bytes(gzip.compress(content) if packed else content)

    assert read_trace(path).tolist() == sorted(times)


def test_times_of_a_calendar_begin_with_the_first(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("1700000000.5\n1700000001.5\n1700000001.75\n")

    assert read_trace(path).tolist() == [0, 1, 1.25]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no times"),
        (b"# nothing\n\n", "no times"),
        (b"intended_s\n", "no times"),
        (b"1\n2\n1.5\n", "line 3: 1.5 s comes before 2 s"),
        (b"1\n-2\n", "line 2: -2 s is negative"),
        (b"1\nnan\n", "line 2: 'nan' has no time"),
        (b"1\ninf\n", "line 2: 'inf' has no time"),
        (b"time,outcome\n1,ok\n", "line 1: 'time,outcome' has no time"),
        (b"1,ok\n2,ok\n", "line 1: '1,ok' has no time"),
        (b"a,intended_s\n1,2\n3\n", "line 3: '3' has no time"),
        (b"a,intended_s\n1,\n", "line 2: '1,' has no time"),
        (b"1\n\xff\n", "not UTF-8"),
        (b"1" * 200_000, "is no trace"),
        (b"1.0\r2.0\r", "is no trace"),
    ],
)
def test_traces_that_are_none_are_refused_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)

    with pytest.raises(ArrivalsUnusable, match=reason) as refused:
        read_trace(path)
    assert "\n" not in str(refused.value)


def test_traces_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gz").write_text("1\n2\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"1\n1\n" * 1000)[:-12])

    with pytest.raises(ArrivalsUnusable, match="No such file"):
        read_trace(tmp_path / "missing")
    with pytest.raises(ArrivalsUnusable, match="Is a directory"):
        read_trace(tmp_path)
    for name in ("no.gz", "cut.gz"):
        with pytest.raises(ArrivalsUnusable, match="no whole gzip file"):
            read_trace(tmp_path / name)


def test_the_fingerprint_is_of_little_endian_doubles() -> None:
    times = np.array([0.0, 1.0])

    assert schedule_sha256(times) == schedule_sha256(times.astype(">f8"))
    assert schedule_sha256(times) == schedule_sha256(np.array([0.0, 9.0, 1.0])[::2])
    assert schedule_sha256(times) == hashlib.sha256(struct.pack("<dd", 0.0, 1.0)).hexdigest()
    assert schedule_sha256(times) != schedule_sha256(times[::-1])
