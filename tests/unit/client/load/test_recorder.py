import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_client.load.histograms import percentile_ms
from beamline_client.load.recorder import PHASES, Frame, Recorder, window_length_s
from beamline_client.load.records import RECORD, Records
from beamline_client.load.target import FAILURES, Outcome

CLASS_OF = np.array([0, 1, 0], np.uint16)
DURATION_S, WARM_UP_S, LIMIT_S = 12.0, 2.0, 0.3


def drawn(n: int, seed: int) -> Records:
    """Ends of requests of all kinds, in no order."""
    rng = np.random.default_rng(seed)
    records = np.zeros(n, RECORD)
    records["arrival"] = np.arange(n)
    records["question"] = rng.integers(0, 3, n)
    records["outcome"] = rng.choice(7, n, p=[0.7, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05])
    records["code"] = np.where(records["outcome"] == Outcome.OK, 0, 8)
    records["intended_s"] = rng.uniform(0, DURATION_S, n)
    records["sent_s"] = records["intended_s"] + rng.exponential(0.001, n)
    records["done_s"] = records["sent_s"] + rng.exponential(0.2, n)
    for name in ("first_piece_s", "queue_s", "encode_s", "decode_s"):
        records[name] = np.nan
    answered = records["outcome"] == Outcome.OK
    took_s = (records["done_s"] - records["sent_s"])[answered]
    for name, share in (("queue_s", 0.2), ("encode_s", 0.1), ("decode_s", 0.6), ("first_piece_s", 0.5)):
        records[name][answered] = took_s * share
    records["tokens"][answered], records["characters"][answered] = 5, 20
    not_sent = records["outcome"] == Outcome.NOT_SENT
    records["sent_s"][not_sent] = records["done_s"][not_sent] = np.nan
    return records


def recorder(records: Records, *, limit_s: float | None = LIMIT_S, parts: int = 1) -> Recorder:
    made = Recorder(
        Frame(DURATION_S, window_length_s(DURATION_S), WARM_UP_S, limit_s, ("short", "long"), CLASS_OF),
        records["intended_s"],
    )
    for part in np.array_split(records, parts):
        made.add(part)
    return made


@settings(max_examples=12)
@given(st.integers(0, 60), st.integers(0, 9), st.integers(1, 12))
def test_how_the_records_come_in_pieces_does_not_matter(n: int, seed: int, parts: int) -> None:
    records = drawn(n, seed)
    whole, pieces = recorder(records), recorder(np.random.default_rng(seed).permutation(records), parts=parts)

    assert pieces.outcomes == whole.outcomes
    assert pieces.codes == whole.codes
    assert pieces.throughput(DURATION_S) == whole.throughput(DURATION_S)
    assert pieces.latencies() == whole.latencies()
    assert pieces.phases() == whole.phases()
    assert pieces.classes() == whole.classes()
    for one, other in zip(pieces.windows(DURATION_S), whole.windows(DURATION_S), strict=True):
        assert one.model_dump(exclude={"queue_ms", "encode_ms", "decode_ms"}) == other.model_dump(
            exclude={"queue_ms", "encode_ms", "decode_ms"}
        )
        assert one.decode_ms == pytest.approx(other.decode_ms)


def test_every_request_is_in_one_window_and_under_one_outcome() -> None:
    records = drawn(500, 1)
    made = recorder(records)
    windows = made.windows(DURATION_S)

    assert sum(made.outcomes.values()) == sum(window.offered for window in windows) == 500
    assert sum(window.failed for window in windows) == sum(made.outcomes[outcome] for outcome in FAILURES)
    assert sum(made.codes.values()) == 500 - made.outcomes[Outcome.NOT_SENT]
    answered = records[records["outcome"] == Outcome.OK]
    assert sum(window.answered for window in windows) == (answered["done_s"] < DURATION_S).sum()


def test_percentiles_are_those_of_the_values_after_the_warm_up() -> None:
    records = drawn(2000, 2)
    made = recorder(records)
    answered = records[(records["outcome"] == Outcome.OK) & (records["intended_s"] >= WARM_UP_S)]
    counted = ~np.isin(records["outcome"], (Outcome.CANCELLED, Outcome.NOT_SENT)) & (records["intended_s"] >= WARM_UP_S)
    ended = records[counted]

    for name, values_s in (
        ("latency", answered["done_s"] - answered["intended_s"]),
        ("latency_from_send", answered["done_s"] - answered["sent_s"]),
        ("latency_with_failures", ended["done_s"] - ended["intended_s"]),
        ("first_piece", answered["first_piece_s"] + answered["sent_s"] - answered["intended_s"]),
    ):
        told = made.latencies()[name]
        assert told is not None
        assert told.count == len(values_s)
        for percentile, value_ms in told.percentiles_ms.items():
            exact_s = np.percentile(values_s, float(percentile), method="inverted_cdf")
            assert value_ms == pytest.approx(1000 * exact_s, rel=2e-3), (name, percentile)


def test_the_phases_add_up_to_the_time_from_the_send() -> None:
    made = recorder(drawn(2000, 3))
    phases, whole = made.phases(), made.latencies()["latency_from_send"]
    assert whole is not None
    assert tuple(phases) == PHASES
    assert sum(phase.mean_ms for phase in phases.values()) == pytest.approx(whole.mean_ms, rel=2e-3)


def test_goodput_counts_answers_within_the_limit_only() -> None:
    records = drawn(2000, 4)
    tight, wide = recorder(records, limit_s=0.1), recorder(records, limit_s=100.0)
    slow, all_of_them = tight.throughput(DURATION_S), wide.throughput(DURATION_S)

    assert recorder(records, limit_s=None).throughput(DURATION_S).goodput_per_s is None
    assert slow.goodput_per_s is not None
    assert 0 < slow.goodput_per_s < slow.answered_per_s
    assert all_of_them.goodput_per_s == all_of_them.answered_per_s
    assert tight.too_slow > wide.too_slow == wide.failed_after_warm_up


def test_rates_are_per_second_of_whole_windows_after_the_warm_up() -> None:
    records = np.zeros(240, RECORD)
    records["intended_s"] = records["sent_s"] = np.arange(240) / 20
    records["done_s"] = records["intended_s"] + 0.01
    records["tokens"], records["characters"] = 3, 7
    for name in ("first_piece_s", "queue_s", "encode_s", "decode_s"):
        records[name] = np.nan
    made = recorder(records)

    told = made.throughput(DURATION_S)
    assert (told.seconds, told.offered_per_s, told.answered_per_s) == (10.0, 20.0, 20.0)
    assert (told.tokens_per_s, told.characters_per_s) == (60.0, 140.0)
    assert made.throughput(7.5).seconds == 5.0
    assert made.throughput(1.0).answered_per_s == 0.0
    assert made.phases() == {}
    assert made.windows(0.5) == []
    rate_per_s, median_ms = made.stretch(4.0, 7.0)
    assert rate_per_s == pytest.approx(20.0)
    assert median_ms == pytest.approx(10.0, rel=1e-3)


def test_a_closed_loop_offers_what_it_sends() -> None:
    records = drawn(300, 5)
    made = Recorder(Frame(DURATION_S, window_length_s(DURATION_S), 0.0, None, ("all",), np.zeros(3, np.uint16)), None)
    made.add(records)
    assert sum(window.offered for window in made.windows(DURATION_S)) == 300
    assert made.classes() == []


def test_a_class_has_the_latency_of_its_requests() -> None:
    records = drawn(1000, 6)
    measured = records[records["intended_s"] >= WARM_UP_S]
    for number, told in enumerate(recorder(records).classes()):
        of_class = measured[CLASS_OF[measured["question"]] == number]
        assert told.count == len(of_class)
        assert told.latency is not None
        assert told.latency.count == (of_class["outcome"] == Outcome.OK).sum()


@given(st.floats(0.05, 1e6))
def test_windows_cover_the_run_and_are_not_too_many(duration_s: float) -> None:
    made = Frame(duration_s, window_length_s(duration_s), 0.0, None, ("all",), np.zeros(1, np.uint16))
    assert made.window_s == window_length_s(duration_s)
    assert 1 <= made.windows <= 121
    assert made.windows * made.window_s >= duration_s * (1 - 1e-6)


def test_an_empty_recorder_has_nothing_to_tell() -> None:
    made = recorder(drawn(0, 0))
    assert set(made.latencies().values()) == {None}
    assert percentile_ms(made.answered, 50) == 0
    assert all(window.p50_ms is None and window.histogram is None for window in made.windows(DURATION_S))
