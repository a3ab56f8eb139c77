"""The generator's processes against a queue in their own event loop: real processes, real time, no network."""

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from beamline_client.load.coordinator import (
    GeneratorFailed,
    Interruption,
    Measured,
    Plan,
    RunObserver,
    measure,
)
from beamline_client.load.fake_target import FakeTargets
from beamline_client.load.histograms import percentile_ms
from beamline_client.load.live import open_view
from beamline_client.load.recorder import Frame, Recorder, window_length_s
from beamline_client.load.records import RECORD, Records
from beamline_client.load.sentences import Sentence
from beamline_client.load.target import Outcome, TargetUnusable
from beamline_client.load.workload import WorkloadOptions, draw_workload

SENTENCES = [Sentence(f"sentence number {i}", ()) for i in range(7)]


class Keeper(RunObserver):
    """Keeps all records and answers; says when it is enough."""

    def __init__(self, enough_after: int | None = None, interruption: Interruption | None = None) -> None:
        self.batches: list[Records] = []
        self.answers: list[tuple[int, int, tuple[str, ...]]] = []
        self._enough_after = enough_after
        self._interruption = interruption

    def learned(self, question: int, answer: int, texts: tuple[str, ...]) -> None:
        self.answers.append((question, answer, texts))

    def ended(self, records: Records) -> None:
        self.batches.append(records.copy())
        if self._interruption is not None:
            self._interruption.asked = True

    def enough(self, recorder: Recorder, elapsed_s: float) -> bool:
        return self._enough_after is not None and recorder.ended >= self._enough_after

    @property
    def records(self) -> Records:
        return np.concatenate([np.zeros(0, RECORD), *self.batches])


def plan(
    targets: FakeTargets, intended_s: Sequence[float] | None, *, duration_s: float = 1.0, **changes: object
) -> Plan:
    times = None if intended_s is None else np.array(intended_s, np.float64)
    options = changes.pop("options", WorkloadOptions())
    assert isinstance(options, WorkloadOptions)
    workload = draw_workload(SENTENCES, options, 100 if times is None else len(times), 0)
    made = Plan(
        title="a test",
        targets=targets,
        workload=workload,
        intended_s=times,
        callers=0,
        frame=Frame(duration_s, window_length_s(duration_s), 0.0, None, workload.class_names, workload.class_of),
        workers=1,
        max_in_flight=1000,
        cores=(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def run(plan: Plan, keeper: Keeper, interruption: Interruption | None = None) -> Measured:
    return measure(plan, open_view(io.StringIO(), quiet=True), keeper, interruption or Interruption())


def lindley(sent_s: Sequence[float], service_s: Sequence[float]) -> list[float]:
    """Time in the system of each request: W' = max(0, W + S - A), plus its own service."""
    times, free_at = [], 0.0
    for now, service in zip(sent_s, service_s, strict=True):
        free_at = max(free_at, now) + service
        times.append(free_at - now)
    return times


def test_every_arrival_has_one_record_with_the_time_it_was_meant_for() -> None:
    intended_s = np.sort(np.random.default_rng(0).uniform(0, 1, 200))
    keeper = Keeper()

    measured = run(plan(FakeTargets(), intended_s.tolist(), workers=2), keeper)

    records = np.sort(keeper.records, order="arrival")
    assert records["arrival"].tolist() == list(range(200))
    assert records["intended_s"].tolist() == intended_s.tolist()
    assert measured.recorder.outcomes == {Outcome.OK: 200}
    assert (records["sent_s"] >= records["intended_s"]).all()
    assert (records["done_s"] - records["sent_s"] >= 0.001 - 1e-6).all()
    assert [process.requests for process in measured.processes] == [100, 100, 0]
    assert measured.seconds == 1.0
    assert not measured.interrupted


def test_every_answer_is_told_before_or_with_its_record_and_once_per_process() -> None:
    keeper = Keeper()
    run(plan(FakeTargets(), np.linspace(0, 0.5, 60).tolist()), keeper)

    told = {(question, answer): texts for question, answer, texts in keeper.answers}
    assert len(told) == len(keeper.answers) == len(SENTENCES)
    assert {(int(r["question"]), int(r["answer"])) for r in keeper.records} == told.keys()
    assert set(told.values()) == {(sentence.source.upper(),) for sentence in SENTENCES}


def test_an_open_loop_reports_what_the_lindley_recursion_says_and_a_closed_one_hides_the_stall() -> None:
    service_s, stall_s = 0.004, 0.3
    targets = FakeTargets(service_s=service_s, stall_s=stall_s, stall_after=20)
    keeper = Keeper()
    opened = run(plan(targets, np.arange(0, 1, 0.01).tolist()), keeper)
    closed = run(plan(targets, None, callers=1), Keeper())

    records = np.sort(keeper.records, order="sent_s")
    services = [service_s + (stall_s if i == 20 else 0.0) for i in range(len(records))]
    truth_ms = 1000 * np.array(lindley(records["sent_s"].tolist(), services))
    reported_ms = 1000 * (records["done_s"] - records["sent_s"])
    assert (reported_ms >= truth_ms - 0.1).all()  # a process that has no core for a while can only make it longer
    for percentile in (50, 90, 99):
        truth = float(np.percentile(truth_ms, percentile, method="inverted_cdf"))
        assert percentile_ms(opened.recorder.answered, percentile) >= 0.99 * truth
    assert percentile_ms(opened.recorder.answered, 90) >= 1000 * stall_s / 2  # a third of all requests came meanwhile
    assert percentile_ms(closed.recorder.answered, 90) < 1000 * stall_s / 2  # one request met it
    assert opened.recorder.lag.get_total_count() == len(records)


def test_deadlines_cancellations_and_refusals_are_told_apart() -> None:
    options = WorkloadOptions(deadlines="30ms:50%,10s:50%", cancel="30%", cancel_within="1-2ms")
    keeper = Keeper()
    targets = FakeTargets(service_s=0.02, most_waiting=10)
    measured = run(plan(targets, np.linspace(0, 0.2, 80).tolist(), options=options), keeper)

    outcomes = measured.recorder.outcomes
    assert sum(outcomes.values()) == 80
    assert set(outcomes) == {Outcome.OK, Outcome.REJECTED, Outcome.DEADLINE, Outcome.CANCELLED}
    assert measured.messages == {"full": outcomes[Outcome.REJECTED], "too late": outcomes[Outcome.DEADLINE]}


def test_a_fault_of_the_target_is_an_error_not_a_gap() -> None:
    measured = run(plan(FakeTargets(faulty=True), [0.0, 0.1]), Keeper())
    assert measured.recorder.outcomes == {Outcome.ERROR: 2}
    assert measured.messages == {"the load generator failed: ZeroDivisionError('on purpose')": 2}


def test_an_interrupted_closed_loop_gives_what_is_in_flight_a_moment() -> None:
    interruption = Interruption()
    keeper = Keeper(interruption=interruption)
    measured = run(plan(FakeTargets(service_s=0.1), None, callers=3, duration_s=120), keeper, interruption)

    assert measured.interrupted
    assert measured.recorder.outcomes.keys() == {Outcome.OK}


def test_an_interruption_hurries_a_run_that_had_enough() -> None:
    interruption = Interruption()

    class Impatient(Keeper):
        def enough(self, recorder: Recorder, elapsed_s: float) -> bool:
            interruption.asked = True  # as if Ctrl-C came just after
            return True

    made = plan(FakeTargets(service_s=100.0), [0.0] * 3, duration_s=120)
    measured = run(made, Impatient(), interruption)

    assert measured.interrupted
    assert measured.recorder.outcomes == {Outcome.CANCELLED: 3}


def test_what_exceeds_the_most_in_flight_is_recorded_as_not_sent() -> None:
    keeper = Keeper()
    measured = run(plan(FakeTargets(service_s=1.0), [0.0] * 10, max_in_flight=3), keeper)

    assert measured.recorder.outcomes == {Outcome.OK: 3, Outcome.NOT_SENT: 7}
    assert np.isnan(keeper.records["sent_s"]).sum() == 7


def test_an_interrupted_run_keeps_what_it_has() -> None:
    interruption = Interruption()
    keeper = Keeper(interruption=interruption)
    measured = run(plan(FakeTargets(), np.arange(0, 120, 0.01).tolist(), duration_s=120), keeper, interruption)

    assert measured.interrupted
    assert 0 < len(keeper.records) == measured.recorder.ended < 12_000
    assert measured.seconds < 120


def test_a_run_that_has_enough_waits_for_what_is_in_flight() -> None:
    keeper = Keeper(enough_after=10)
    targets = FakeTargets(stall_s=0.6, stall_after=50)
    measured = run(plan(targets, np.arange(0, 120, 0.01).tolist(), duration_s=120), keeper)

    assert not measured.interrupted
    assert 10 <= measured.recorder.outcomes[Outcome.OK] == measured.recorder.ended < 12_000
    assert measured.seconds < 120


def test_an_interruption_before_the_start_ends_everything() -> None:
    interruption = Interruption()
    interruption.asked = True
    with pytest.raises(KeyboardInterrupt):
        run(plan(FakeTargets(), [0.0]), Keeper(), interruption)


def test_a_target_that_cannot_be_prepared_is_told_in_its_own_words() -> None:
    with pytest.raises(TargetUnusable, match="no such thing"):
        run(plan(FakeTargets(unusable="no such thing"), [0.0]), Keeper())


def test_a_process_that_dies_is_named() -> None:
    with pytest.raises(GeneratorFailed, match="generator 0 ended before its work was done"):
        run(plan(FakeTargets(dies_after=3), np.linspace(0, 0.5, 20).tolist()), Keeper())


def test_a_process_without_a_caller_or_a_request_ends_like_the_others() -> None:
    closed = run(plan(FakeTargets(), None, callers=1, workers=2, duration_s=0.2), Keeper())
    opened = run(plan(FakeTargets(), [0.0], workers=2, duration_s=0.2), Keeper())

    assert [process.requests > 0 for process in closed.processes] == [True, False, False]
    assert [process.requests for process in opened.processes] == [1, 0, 0]


def test_a_closed_loop_has_as_many_in_flight_as_callers() -> None:
    keeper = Keeper()
    run(plan(FakeTargets(service_s=0.01), None, callers=5, workers=2, duration_s=0.5), keeper)

    records = keeper.records
    moments = np.concatenate([records["sent_s"], records["done_s"]])
    changes = np.concatenate([np.ones(len(records)), -np.ones(len(records))])
    in_flight = np.cumsum(changes[np.lexsort((changes, moments))])
    assert in_flight.max() == 5
    assert records["intended_s"].max() < 0.5
