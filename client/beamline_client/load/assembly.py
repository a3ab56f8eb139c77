"""Puts the report of a run together."""

from dataclasses import dataclass
from datetime import datetime

import grpc

from beamline_client.load import histograms
from beamline_client.load.arrivals import schedule_sha256
from beamline_client.load.coordinator import Measured, Plan
from beamline_client.load.quality import AnswerBook
from beamline_client.load.report import Configuration, Generator, Lag, RunReport, ServerDescription, Slo, Verdict
from beamline_client.load.setup import Load, Setup, option_texts
from beamline_client.load.target import Outcome
from beamline_client.load.validity import allowed_lag_ms, objections
from beamline_client.load.watch import Seen
from beamline_client.load.workload import Workload
from beamline_client.results import ServerInfo

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that a report is made of."""

    setup: Setup
    load: Load
    plan: Plan
    measured: Measured
    book: AnswerBook
    seen: Seen

    def report(self, started_at: datetime) -> RunReport:
        """The report of the run that started then."""
        recorder, measured = self.measured.recorder, self.measured
        slo = self._slo()
        latencies = recorder.latencies()
        return RunReport(
            started_at=started_at.isoformat(timespec="seconds"),
            configuration=self._configuration(self.plan.workload),
            environment=self.setup.environment,
            server=server_description(self.setup.info),
            verdict=self._verdict(slo),
            outcomes={outcome.label: recorder.outcomes[outcome] for outcome in Outcome},
            codes={_CODES.get(code, str(code)): count for code, count in sorted(recorder.codes.items())},
            messages=dict(measured.messages),
            retries_seen=self.seen.retries,
            throughput=recorder.throughput(measured.seconds),
            latency=latencies["latency"],
            latency_from_send=latencies["latency_from_send"],
            latency_with_failures=latencies["latency_with_failures"],
            first_piece=latencies["first_piece"],
            phases=recorder.phases(),
            classes=recorder.classes(),
            slo=slo,
            quality=self.book.quality(),
            books=self.seen.books,
            generator=self._generator(),
            windows=recorder.windows(measured.seconds),
            server_samples=list(self.seen.samples),
        )

    def _median_ms(self) -> float | None:
        answered = self.measured.recorder.answered
        return histograms.percentile_ms(answered, 50) if answered.get_total_count() else None

    def _lag(self) -> Lag | None:
        latency = histograms.latency(self.measured.recorder.lag)
        if self.load.intended_s is None or latency is None:
            return None
        return Lag(latency=latency, allowed_p99_ms=allowed_lag_ms(self._median_ms()))

    def _generator(self) -> Generator:
        return Generator(
            processes=self.measured.processes,
            lag=self._lag(),
            pinning=self.setup.pinning,
            max_in_flight=self.plan.max_in_flight,
        )

    def _verdict(self, slo: Slo | None) -> Verdict:
        recorder, lag = self.measured.recorder, self._lag()
        invalid = objections(
            lag_p99_ms=None if lag is None else lag.latency.percentiles_ms["99"],
            median_ms=self._median_ms(),
            processes=self.measured.processes,
            outcomes=recorder.outcomes,
            max_in_flight=self.plan.max_in_flight,
            lost=self._lost(),
        )
        failures = self.book.failures()
        if not recorder.outcomes[Outcome.OK]:
            failures.append("no request was answered")
        if slo is not None and not slo.met:
            missed = ", ".join(f"{clause.text} ({clause.measured})" for clause in slo.clauses if not clause.met)
            failures.append(f"the SLO was missed: {missed}")
        return Verdict(
            valid=not invalid,
            invalid_because=invalid,
            interrupted=self.measured.interrupted,
            failures=failures,
            remarks=self._remarks(),
        )

    def _lost(self) -> int:
        was_stopped = self.measured.interrupted or self.measured.seconds < self.plan.frame.duration_s
        if self.load.intended_s is None or was_stopped:
            return 0
        return len(self.load.intended_s) - self.measured.recorder.ended

    def _remarks(self) -> list[str]:
        remarks = [*self.setup.remarks, *self.seen.remarks]
        if self.seen.books is not None:
            remarks += [f"the books do not balance: {mismatch}" for mismatch in self.seen.books.mismatches]
        if self.measured.interrupted:
            remarks.append("the run was interrupted: requests that were in flight count as cancelled")
        return remarks

    def _slo(self) -> Slo | None:
        if self.setup.objective is None:
            return None
        recorder = self.measured.recorder
        return self.setup.objective.check(
            recorder.answered, attempted=recorder.attempted_after_warm_up, failed=recorder.failed_after_warm_up
        )

    def _configuration(self, workload: Workload) -> Configuration:
        options, load = self.setup.options, self.load
        texts = {"sentences": str(self.setup.sentences_path), **option_texts(options.workload)}
        return Configuration(
            target=options.server,
            mode="open" if load.intended_s is not None else "closed",
            arrivals=load.arrivals,
            rate=load.rate,
            concurrency=load.callers or None,
            duration_s=load.duration_s,
            warm_up_s=self.plan.frame.warm_up_s,
            seed=options.seed,
            requests=self.measured.recorder.ended if load.intended_s is None else len(workload.question),
            schedule_sha256=None if load.intended_s is None else schedule_sha256(load.intended_s),
            workers=options.workers,
            channels=options.channels,
            retries=options.retries,
            workload=texts,
        )


def server_description(info: ServerInfo) -> ServerDescription:
    """What a report tells of the server."""
    model = info.model
    return ServerDescription(
        model=model.name,
        architecture=model.architecture,
        precision=model.precision,
        device=model.device,
        fingerprint=model.fingerprint,
        default_beam_size=info.default_search.beam_size,
        max_beam_size=info.limits.max_beam_size,
        versions=dict(info.versions),
    )
