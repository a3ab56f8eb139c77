"""`beamline load`, from the arguments to the exit status, against a real gRPC server that does not need a model."""

import csv
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import jsonschema
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_client.load.report import FindMaxReport, RunReport, json_schema, read_report, to_json
from beamline_client.load.testing import example_run
from beamline_client.main import main
from beamline_client.testing import Failure, FakeServer, shouted

Load: TypeAlias = Callable[..., tuple[int, str, str]]
"""Runs the command; returns exit status, stdout and stderr."""

RUN = ("--metrics", "off", "--warm-up", "0s", "--quiet")
SENTENCES = "un\tone\ndeux mots\ttwo words\nencore trois mots\tthree more words\n"


def capable() -> pb.GetInfoResponse:
    info = pb.GetInfoResponse()
    info.model.name, info.model.has_tokenizer = "shouting", True
    info.limits.max_beam_size, info.limits.max_text_bytes, info.limits.max_new_tokens = 8, 1000, 100
    info.limits.max_duration.FromSeconds(60)
    info.default_search.beam_size = 4
    return info


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(info=capable()) as running:
        yield running


@pytest.fixture
def load(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Load:
    (tmp_path / "sentences.tsv").write_text(SENTENCES, encoding="utf-8")

    def run(*arguments: str) -> tuple[int, str, str]:
        common = ["--server", server.target, "--sentences", str(tmp_path / "sentences.tsv"), *RUN]
        find_max = arguments[:1] == ("find-max",)
        line = ["find-max", *common, *arguments[1:]] if find_max else [*common, *arguments]
        status = main(["load", *line])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def run_report(folder: Path) -> RunReport:
    report = read_report(folder / "report.json")
    assert isinstance(report, RunReport)
    return report


def answered(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
    """What the server answers by default."""
    del context
    return pb.GenerateResponse(results=[shouted(source, request.search, request.output) for source in request.inputs])


def sent(server: FakeServer) -> list[Any]:
    """The requests for generation that have come."""
    return [call.request for call in server.calls if call.method != "GetInfo"]


def is_status(report: RunReport, status: int) -> bool:
    """Whether the exit status is the one of the report: how late the generator was depends on the machine."""
    expected = 3 if not report.verdict.valid else 1 if report.verdict.failures else 0
    return status == expected


class TestARun:
    def test_sends_its_schedule_and_writes_its_report(self, load: Load, server: FakeServer, tmp_path: Path) -> None:
        folder, log = tmp_path / "report", tmp_path / "log.csv.gz"
        status, out, err = load(
            "--rate", "60", "--duration", "1s", "--workers", "2", "-o", str(folder), "--request-log", str(log)
        )

        report = run_report(folder)
        assert is_status(report, status)
        assert err == ""
        assert ("VALID" in out, str(folder / "report.html") in out) == (True, True)
        assert (
            len(sent(server)) == report.outcomes["ok"] == report.configuration.requests == sum(report.outcomes.values())
        )
        assert report.latency is not None
        assert report.latency.count == report.outcomes["ok"]
        assert report.quality is not None
        assert (report.quality.inconsistent, report.quality.golden) == (0, None)
        assert set(report.phases) == {"queue", "encode", "decode", "elsewhere"}
        assert {path.name for path in folder.iterdir()} == {"report.json", "report.html", "latency.hgrm"}
        jsonschema.validate(json.loads((folder / "report.json").read_text()), json_schema())

    def test_a_log_of_requests_is_a_trace_that_can_be_sent_again(self, load: Load, tmp_path: Path) -> None:
        log, folder = tmp_path / "log.csv", tmp_path / "report"
        load("--rate", "40", "--duration", "1s", "--request-log", str(log), "-o", str(folder))
        first = run_report(folder)

        status, _, _ = load("--trace", str(log), "-o", str(folder))

        again = run_report(folder)
        assert is_status(again, status)
        with log.open() as file:
            assert len(list(csv.DictReader(file))) == again.configuration.requests == first.configuration.requests
        assert (again.configuration.arrivals, first.configuration.arrivals) == ("trace", "poisson")

    def test_the_same_seed_sends_the_same(self, load: Load, server: FakeServer) -> None:
        load("--rate", "30", "--duration", "1s", "--seed", "7", "--beam", "1:50%,4:50%")
        first = sorted(request.SerializeToString() for request in sent(server))
        server.calls.clear()

        load("--rate", "30", "--duration", "1s", "--seed", "7", "--beam", "1:50%,4:50%")

        assert sorted(request.SerializeToString() for request in sent(server)) == first

    def test_a_closed_loop_has_callers(self, load: Load, tmp_path: Path) -> None:
        status, _, _ = load("--concurrency", "3", "--duration", "2s", "-o", str(tmp_path / "report"))

        report = run_report(tmp_path / "report")
        assert is_status(report, status)
        assert (report.configuration.mode, report.configuration.concurrency) == ("closed", 3)
        assert report.generator.lag is None
        assert report.outcomes["ok"] == report.configuration.requests > 3

    def test_streams_tell_the_time_to_their_first_piece(self, load: Load, tmp_path: Path) -> None:
        load("--rate", "30", "--duration", "1s", "--stream", "100%", "-o", str(tmp_path / "report"))

        report = run_report(tmp_path / "report")
        assert report.first_piece is not None
        assert report.latency is not None
        assert report.first_piece.count == report.latency.count == report.outcomes["ok"]
        assert report.first_piece.percentiles_ms["50"] <= report.latency.percentiles_ms["50"]

    def test_failures_are_counted_apart(self, load: Load, server: FakeServer, tmp_path: Path) -> None:
        def every_other(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
            if len(sent(server)) % 2:
                Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full").end(context)
            return answered(request, context)

        server.generate = every_other
        status, _, _ = load("--rate", "50", "--duration", "1s", "-o", str(tmp_path / "report"))

        report = run_report(tmp_path / "report")
        assert is_status(report, status)
        assert report.outcomes["rejected"] == report.codes["RESOURCE_EXHAUSTED"] == report.messages["full"] > 0
        assert report.latency is not None
        assert report.latency_with_failures is not None
        assert report.latency.count == report.outcomes["ok"]
        assert report.latency_with_failures.count == report.outcomes["ok"] + report.outcomes["rejected"]

    def test_a_latency_objective_is_missed_by_requests_that_fail(
        self, load: Load, server: FakeServer, tmp_path: Path
    ) -> None:
        def mostly_full(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
            if len(sent(server)) % 10:
                Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full").end(context)
            return answered(request, context)

        server.generate = mostly_full
        status, out, _ = load("--rate", "50", "--duration", "1s", "--slo", "p99<=10s", "-o", str(tmp_path / "report"))

        report = run_report(tmp_path / "report")
        assert is_status(report, status)
        assert report.slo is not None
        assert not report.slo.met
        assert "failed" in report.slo.clauses[0].measured
        assert "the SLO was missed" in " ".join(out.split())

    def test_an_slo_that_is_missed_is_a_failure(self, load: Load, tmp_path: Path) -> None:
        status, out, _ = load(
            "--rate", "30", "--duration", "1s", "-o", str(tmp_path / "report"), "--slo", "p50<=1us,errors<=1%"
        )

        report = run_report(tmp_path / "report")
        assert is_status(report, status)
        assert status in {1, 3}
        assert report.slo is not None
        assert [clause.met for clause in report.slo.clauses] == [False, True]
        assert "the SLO was missed" in " ".join(out.split())
        assert report.throughput.goodput_per_s == 0

    def test_an_interrupted_run_writes_what_it_has(self, load: Load, server: FakeServer, tmp_path: Path) -> None:
        once = threading.Lock()

        def interrupting(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
            if len(sent(server)) >= 10 and once.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)
            return answered(request, context)

        server.generate = interrupting
        handler = signal.getsignal(signal.SIGINT)
        status, out, _ = load("--rate", "50", "--duration", "10m", "-o", str(tmp_path / "report"))

        report = run_report(tmp_path / "report")
        assert status == 130
        assert signal.getsignal(signal.SIGINT) is handler
        assert report.verdict.interrupted
        assert "INTERRUPTED" in out
        assert 10 <= sum(report.outcomes.values()) < report.configuration.requests
        assert (tmp_path / "report" / "report.html").exists()

    def test_what_cannot_be_written_does_not_take_the_summary_along(self, load: Load, tmp_path: Path) -> None:
        (tmp_path / "report" / "report.json").mkdir(parents=True)
        status, out, err = load("--rate", "20", "--duration", "1s", "-o", str(tmp_path / "report"))

        assert status == 1
        assert "VALID" in out
        assert err.startswith("beamline load: the report cannot be written")
        assert err.count("\n") == 1


class TestGolden:
    def test_the_same_answers_pass_and_others_fail(self, load: Load, server: FakeServer, tmp_path: Path) -> None:
        golden, folder = str(tmp_path / "golden.jsonl"), tmp_path / "report"
        run = ("--rate", "40", "--duration", "1s", "-o", str(folder))
        load(*run, "--record-golden", golden)

        status, _, _ = load(*run, "--golden", golden)
        report = run_report(folder)
        assert is_status(report, status)
        assert status in {0, 3}
        assert report.quality is not None
        assert report.quality.golden is not None
        assert report.quality.golden.compared == report.outcomes["ok"]
        assert (report.quality.golden.different, report.quality.golden.missing) == (0, 0)

        server.generate = lambda request, context: pb.GenerateResponse(
            results=[pb.Result(hypotheses=[pb.Hypothesis(text="something else")])]
        )
        status, out, _ = load(*run, "--golden", golden)
        report = run_report(folder)
        assert status == 1  # a wrong answer is wrong, whether or not the figures can be believed
        assert report.quality is not None
        assert report.quality.golden is not None
        assert report.quality.golden.different == report.outcomes["ok"] > 0
        assert report.verdict.failures
        assert "FAILED" in out

    def test_an_answer_that_changes_fails(self, load: Load, server: FakeServer, tmp_path: Path) -> None:
        server.generate = lambda request, context: pb.GenerateResponse(
            results=[pb.Result(hypotheses=[pb.Hypothesis(text=f"answer {len(server.calls)}")])]
        )
        status, _, _ = load("--rate", "40", "--duration", "1s", "-o", str(tmp_path / "report"))
        report = run_report(tmp_path / "report")
        assert status == 1
        assert report.quality is not None
        assert report.quality.inconsistent > 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--rate", "0"), "a rate that is not above 0"),
            (("--rate", "fast"), "'fast'"),
            (("--rate", "1e9"), "1e9"),
            (("--slo", "p99<=0ms"), "cannot be met"),
            (("--slo", "p100<=1s"), "between 0 and 100"),
            (("--slo", "quick"), "is no condition"),
            (("--sentences", "nowhere.txt"), "nowhere.txt"),
            (("--trace", "nowhere.csv"), "nowhere.csv"),
            (("--golden", "nowhere.jsonl"), "nowhere.jsonl"),
            (("-o", "nowhere/report"), "its folder nowhere does not exist"),
            (("-o", __file__), "is a file: name a folder"),
            (("--request-log", str(Path(__file__).parent)), "is a folder: name a file"),
            (("--beam", "9"), "8"),
            (("--beam", "2", "--n-best", "3"), "3"),
            (("--lengths", "60-50"), "60-50"),
            (("--deadline", "2m"), "60"),
            (("--metrics", "http://127.0.0.1:1/metrics"), "http://127.0.0.1:1/metrics"),
            (("--server", ""), "--server: the address of the server is empty"),
            (("--server", "localhost:999999"), "ports are 1 to 65535"),
            (("--server", "http://localhost:8001"), "gRPC alone, such as localhost:8001"),
            (("--server", "::1:8001"), "write [::1]:8001"),
            (("--server", "127.0.0.1:1"), "cannot reach a server at 127.0.0.1:1"),
        ],
    )
    def test_is_told_in_one_line_before_any_load(
        self, load: Load, server: FakeServer, arguments: tuple[str, ...], says: str
    ) -> None:
        status, out, err = load(*arguments)

        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith("beamline load: ")
        assert says in err
        assert sent(server) == []

    def test_every_problem_is_told(self, load: Load) -> None:
        status, _, err = load("--rate", "0", "--slo", "quick", "--golden", "nowhere.jsonl")
        assert status == 2
        assert [line.partition(": ")[0] for line in err.splitlines()] == ["beamline load"] * 3

    @pytest.mark.parametrize(
        "arguments",
        [("--duration", "0s"), ("--duration", "soon"), ("--workers", "0"), ("--workers", "many"), ("--seed", "-1")],
    )
    def test_what_argparse_refuses_names_the_argument(
        self, load: Load, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            load(*arguments)
        assert ended.value.code == 2
        assert f"argument {arguments[0]}" in capsys.readouterr().err

    def test_a_model_without_a_tokenizer_is_told(self, load: Load, server: FakeServer) -> None:
        server.info.model.has_tokenizer = False

        status, _, err = load()

        assert (status, err.count("\n")) == (2, 1)
        assert "has no tokenizer" in err
        assert sent(server) == []

    def test_something_else_that_listens_is_told(self, load: Load) -> None:
        """A port that is open but speaks no gRPC, such as the one of the metrics."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            status, _, err = load("--server", f"127.0.0.1:{listening.getsockname()[1]}")
        assert status == 2
        assert err.count("\n") == 1


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "find-maxx"]) == 2
    assert capsys.readouterr().err == (
        "beamline load: unknown command 'find-maxx'; there are: find-max, compare, schema; "
        "a run has options alone, see --help\n"
    )


class TestFindMax:
    SEARCH = ("find-max", "--window", "0.4s", "--max-windows", "3", "--stability", "100%", "--precision", "30%")

    def test_finds_a_rate_between_one_that_met_and_one_that_missed(
        self, load: Load, server: FakeServer, tmp_path: Path
    ) -> None:
        """The server answers a fixed number of requests; what comes beyond is refused at once."""
        spent: dict[str, float] = {"tokens": 5.0, "at": time.monotonic()}
        lock = threading.Lock()

        def limited(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
            with lock:
                now = time.monotonic()
                spent["tokens"] = min(5.0, spent["tokens"] + 60 * (now - spent["at"])) - 1
                spent["at"] = now
                if refused := spent["tokens"] < 0:
                    spent["tokens"] += 1
            if refused:
                Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full").end(context)
            return answered(request, context)

        server.generate = limited
        status, out, _ = load(*self.SEARCH, "--slo", "errors<=50%", "--start", "60", "-o", str(tmp_path / "report"))

        report = read_report(tmp_path / "report" / "report.json")
        assert isinstance(report, FindMaxReport)
        assert status in {0, 3}
        assert report.highest_rate_per_s is not None
        assert report.step_per_s is not None
        assert 0 < report.step_per_s <= 0.3 * report.highest_rate_per_s * 1.001
        assert report.highest_rate_per_s < 400  # the server answers 60/s; half of the requests may fail
        by_rate = {point.rate_per_s: point.met for point in report.points}
        assert by_rate[report.highest_rate_per_s]
        assert not by_rate[min(rate for rate, met in by_rate.items() if not met)]
        assert report.best is not None
        assert "/s" in out
        jsonschema.validate(json.loads((tmp_path / "report" / "report.json").read_text()), json_schema())

    def test_an_slo_that_nothing_meets_is_a_failure(self, load: Load, tmp_path: Path) -> None:
        status, _, _ = load(*self.SEARCH, "--slo", "p50<=1us", "--start", "4", "-o", str(tmp_path / "report"))
        report = read_report(tmp_path / "report" / "report.json")
        assert isinstance(report, FindMaxReport)
        assert report.highest_rate_per_s is None
        assert status in {1, 3}

    def test_a_server_that_goes_away_leaves_the_rates_that_were_tried(
        self, load: Load, server: FakeServer, tmp_path: Path
    ) -> None:
        once = threading.Lock()

        def leaving(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
            if len(sent(server)) >= 30 and once.acquire(blocking=False):
                threading.Thread(target=server.__exit__, args=(None, None, None)).start()
            return answered(request, context)

        server.generate = leaving
        status, out, err = load(*self.SEARCH, "--slo", "p99<=10s", "--start", "40", "-o", str(tmp_path / "report"))

        report = read_report(tmp_path / "report" / "report.json")
        assert isinstance(report, FindMaxReport)
        assert (status in {1, 3}, err) == (True, "")
        assert report.points
        assert "the search ended early" in " ".join(out.split())

    def test_needs_an_slo(self, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            load("find-max")
        assert "--slo" in capsys.readouterr().err


class TestCompare:
    def test_a_report_with_itself_is_the_same(
        self, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        load("--rate", "50", "--duration", "2s", "-o", str(tmp_path / "report"))
        path = str(tmp_path / "report" / "report.json")

        assert main(["load", "compare", "--allow-invalid", path, path]) == 0
        assert "same" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "damage",
        [
            lambda window: window.update(histogram=window["histogram"][: len(window["histogram"]) // 2]),
            lambda window: window.update(histogram="é"),
            lambda window: window.update(seconds=0),
            lambda window: window.update(answered=-5),
        ],
    )
    def test_a_damaged_window_is_told(
        self, damage: Callable[[dict[str, Any]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report = json.loads(to_json(example_run()))
        damage(report["windows"][3])
        (tmp_path / "a.json").write_text(json.dumps(report))

        assert main(["load", "compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "window 3" in err

    def test_endless_brackets_are_no_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.json").write_text("[" * 100_000)
        assert main(["load", "compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_what_is_no_report_is_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.json").write_text("{}")
        assert main(["load", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "a.json is not a report" in err


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == json_schema()
