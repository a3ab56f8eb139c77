"""`beamline translate`, from the arguments to what is printed."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest
from google.rpc import error_details_pb2

from beamline.v1 import generation_pb2 as pb
from beamline_client.main import main
from beamline_client.testing import Failure, FakeServer, shouted

Translate: TypeAlias = Callable[..., tuple[int, str, str]]
"""Runs the command; returns exit status, stdout and stderr."""


@pytest.fixture
def translate(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> Translate:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["translate", "--server", server.target, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def type_in(monkeypatch: pytest.MonkeyPatch, content: str | bytes, *, terminal: bool = False) -> None:
    """Lets the command read this from stdin."""
    raw = io.BytesIO(content.encode() if isinstance(content, str) else content)
    if terminal:
        raw.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))


def texts(request: pb.GenerateRequest) -> list[str]:
    return [source.text for source in request.inputs]


def refusing(*bad: str) -> Callable[[pb.GenerateRequest, grpc.ServicerContext], pb.GenerateResponse]:
    """A server that does not take these texts."""

    def generate(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        found = error_details_pb2.BadRequest()
        for index, text in enumerate(texts(request)):
            if text in bad:
                problem = "has 900 tokens; expected at most 512, or truncate_source"
                found.field_violations.add(field=f"inputs[{index}].text", description=problem)
        if found.field_violations:
            Failure(grpc.StatusCode.INVALID_ARGUMENT, "invalid request", [found]).end(context)
        return pb.GenerateResponse(results=[shouted(i, request.search, request.output) for i in request.inputs])

    return generate


class TestInput:
    def test_texts_from_the_arguments(self, translate: Translate) -> None:
        assert translate("one", "two words") == (0, "ONE\nTWO WORDS\n", "")

    def test_lines_of_a_file(self, translate: Translate, tmp_path: Path) -> None:
        source = written(tmp_path / "in.txt", "un\n\nété\r\n")

        status, out, err = translate("--file", source)

        assert (status, out) == (0, "UN\n\nÉTÉ\n")
        assert err.startswith("3 of 3 lines")

    def test_a_pipe_as_the_file_is_read_once(self, translate: Translate, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(pipe.write_text, "one\ntwo\n")

            assert translate("--file", str(pipe)) == (0, "ONE\nTWO\n", "")
            writing.result()

    def test_lines_of_stdin(self, translate: Translate, monkeypatch: pytest.MonkeyPatch) -> None:
        type_in(monkeypatch, "one\ntwo")

        assert translate() == (0, "ONE\nTWO\n", "")

    def test_what_is_typed_is_answered_line_by_line(
        self, server: FakeServer, translate: Translate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        type_in(monkeypatch, "one\ntwo\n", terminal=True)

        status, out, err = translate()

        assert (status, out) == (0, "ONE\nTWO\n")
        assert err == "beamline translate: type a text and Enter; Ctrl-D ends\n"
        assert [texts(request) for request in server.requests()] == [["one"], ["two"]]

    def test_nothing_gives_nothing(self, translate: Translate, monkeypatch: pytest.MonkeyPatch) -> None:
        type_in(monkeypatch, "")

        assert translate() == (0, "", "")

    def test_blank_lines_never_reach_the_server(self, server: FakeServer, translate: Translate, tmp_path: Path) -> None:
        status, out, _ = translate("--file", written(tmp_path / "in.txt", "\n \n\n"))

        assert (status, out) == (0, "\n\n\n")
        assert server.requests() == []

    def test_order_is_kept_when_later_batches_are_faster(
        self, server: FakeServer, translate: Translate, tmp_path: Path
    ) -> None:
        last_done = threading.Event()

        def generate(request: pb.GenerateRequest, _context: grpc.ServicerContext) -> pb.GenerateResponse:
            if request.inputs[0].text == "line 0":
                last_done.wait(30)
            if request.inputs[-1].text == "line 9":
                last_done.set()
            return pb.GenerateResponse(results=[shouted(i, request.search, request.output) for i in request.inputs])

        server.generate = generate
        source = written(tmp_path / "in.txt", "".join(f"line {i}\n" for i in range(10)))

        status, out, _ = translate("--file", source, "--batch-size", "3", "--concurrency", "4")

        assert status == 0
        assert out == "".join(f"LINE {i}\n" for i in range(10))
        assert sorted(len(request.inputs) for request in server.requests()) == [1, 3, 3, 3]


class TestLines:
    def test_only_line_feeds_end_lines(self, server: FakeServer, translate: Translate, tmp_path: Path) -> None:
        odd = "a\rb\x0bc\x0cd\x85e\u2028f\u2029g"

        status, out, err = translate("--file", written(tmp_path / "in.txt", f"\ufeffun\r\n{odd}\n\nun\r"))

        assert (status, err.split(" in ")[0]) == (0, "4 of 4 lines")
        assert [texts(request) for request in server.requests()] == [["un", odd, "un\r"]]
        assert out == f"UN\n{odd.upper()}\n\nUN \n".replace("\r", " ")

    def test_stdin_has_the_same_lines(
        self, server: FakeServer, translate: Translate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        type_in(monkeypatch, "\ufeffa\rb\u2028c\r\nd")

        translate()

        assert [texts(request) for request in server.requests()] == [["a\rb\u2028c", "d"]]

    @pytest.mark.parametrize("arguments", [[], ["--stream"], ["--json"]])
    def test_line_breaks_that_come_back_do_not_shift_the_lines(
        self, server: FakeServer, translate: Translate, tmp_path: Path, arguments: list[str]
    ) -> None:
        result = pb.Result(hypotheses=[pb.Hypothesis(text="a\r\nb\nc\rd")])
        server.generate = lambda request, _context: pb.GenerateResponse(results=[result for _ in request.inputs])
        server.stream = lambda _request, _context: iter([pb.GenerateStreamResponse(result=result)])

        _, out, _ = translate("--file", written(tmp_path / "in.txt", "1\n2\n"), *arguments)

        assert out.count("\n") == 2
        assert "\r" not in out
        if "--json" not in arguments:
            assert out == "a  b c d\na  b c d\n"

    def test_text_is_utf_8_whatever_the_locale(self, server: FakeServer, tmp_path: Path) -> None:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "beamline_client", "translate", "--server", server.target]

        done = subprocess.run(command, input="été".encode(), env=environment, capture_output=True, check=True)

        assert (done.stdout, done.stderr) == ("ÉTÉ\n".encode(), b"")


class TestTextsThatCannotBeTranslated:
    """They are told by name; by default they end everything, and with --on-error skip they leave an empty line."""

    def test_the_lines_before_are_written(self, server: FakeServer, translate: Translate, tmp_path: Path) -> None:
        server.generate = refusing("long")

        status, out, err = translate("--file", written(tmp_path / "in.txt", "one\n\nlong\ntwo\n"))

        assert (status, out) == (2, "ONE\n\n")
        assert "2 of 4 lines" in err
        last = err.splitlines()[-1]
        assert last.startswith("beamline translate: line 3: has 900 tokens; expected at most 512, or --truncate. ")
        assert "--on-error skip" in last

    @pytest.mark.parametrize("arguments", [[], ["--batch-size", "1"], ["--stream"], ["--truncate"]])
    def test_skipped_ones_leave_empty_lines(
        self, server: FakeServer, translate: Translate, tmp_path: Path, arguments: list[str]
    ) -> None:
        content = b"one\n\ntw\xe9\nthree\n\xff\xfe\n"

        status, out, err = translate("--file", written(tmp_path / "in.txt", content), "--on-error", "skip", *arguments)

        assert (status, out) == (3, "ONE\n\n\nTHREE\n\n")
        first, second, *_, last = err.splitlines()
        assert first.startswith("beamline translate: line 3 is skipped: is not UTF-8 text (byte 3 of it: ")
        assert second.startswith("beamline translate: line 5 is skipped: is not UTF-8 text (byte 1 of it: ")
        assert last == "beamline translate: 2 skipped, with an empty line for each"

    def test_a_refused_one_does_not_take_its_request_along(
        self, server: FakeServer, translate: Translate, tmp_path: Path
    ) -> None:
        server.generate = refusing("long", "longer")

        status, out, err = translate(
            "--file", written(tmp_path / "in.txt", "one\nlong\ntwo\nlonger\n"), "--on-error", "skip"
        )

        assert (status, out) == (3, "ONE\n\nTWO\n\n")
        assert [line.split(" is ")[0] for line in err.splitlines() if " is skipped" in line] == [
            "beamline translate: line 2",
            "beamline translate: line 4",
        ]

    def test_json_has_the_problem_in_its_place(self, translate: Translate, tmp_path: Path) -> None:
        status, out, _ = translate("--json", "--on-error", "skip", "--file", written(tmp_path / "in.txt", b"\xff\na"))

        bad, good = [json.loads(line) for line in out.split("\n")[:-1]]
        assert status == 3
        assert (bad["source"], bad["hypotheses"]) == ("\ufffd", [])
        assert bad["problem"].startswith("is not UTF-8 text")
        assert "problem" not in good

    def test_an_argument_can_be_one_too(self, server: FakeServer, translate: Translate) -> None:
        status, out, err = translate("one", "caf\udce9")

        assert (status, out) == (2, "ONE\n")
        assert "text 2: is not UTF-8 text (byte 4 of it: " in err

    @pytest.mark.parametrize("flag", ["--stream", "--scores", "--json"])
    def test_an_argument_that_is_skipped_can_be_printed(
        self, server: FakeServer, flag: str, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        line = ["translate", "--server", server.target, "--on-error", "skip", flag, "caf\udce9"]

        status, (out, err) = main(line), capsysbinary.readouterr()

        assert status == 3
        assert out.startswith(
            {"--stream": "", "--scores": "caf\ufffd", "--json": '{"source": "caf\ufffd"'}[flag].encode()
        )
        assert err.startswith(b"beamline translate: text 1 is skipped: is not UTF-8 text (byte 4 of it: ")

    def test_what_is_no_texts_fault_ends_everything(self, server: FakeServer, translate: Translate) -> None:
        server.generate = lambda _request, context: Failure(  # type: ignore[assignment,return-value]
            grpc.StatusCode.INTERNAL, "internal error e-1"
        ).end(context)

        status, out, err = translate("one", "two", "--on-error", "skip")

        assert (status, out) == (1, "")
        assert "error id e-1" in err


class TestLimits:
    """What a server takes, it tells; texts are cut, refused and put into requests by that."""

    @pytest.mark.parametrize("arguments", [[], ["--stream"]])
    def test_truncate_cuts_what_is_over_the_bytes_too(
        self, server: FakeServer, translate: Translate, arguments: list[str]
    ) -> None:
        server.info.limits.max_text_bytes = 10

        status, out, err = translate("ééééé", "éééééé", "aéééééé", "--truncate", *arguments)

        assert (status, out) == (0, "ÉÉÉÉÉ\nÉÉÉÉÉ\nAÉÉÉÉ\n")
        assert err == "beamline translate: 2 cut to what the model reads\n"

    def test_what_the_server_cuts_is_counted_as_well(self, server: FakeServer, translate: Translate) -> None:
        cut = pb.Result(hypotheses=[pb.Hypothesis(text="x")], source_truncated=True)
        server.generate = lambda request, _context: pb.GenerateResponse(results=[cut for _ in request.inputs])

        assert translate("a", "b", "--truncate") == (0, "x\nx\n", "beamline translate: 2 cut to what the model reads\n")

    def test_json_tells_that_a_text_was_cut(self, server: FakeServer, translate: Translate) -> None:
        server.info.limits.max_text_bytes = 3

        whole, cut = [json.loads(line) for line in translate("abc", "abcd", "--truncate", "--json")[1].splitlines()]

        assert (whole["source"], whole["source_truncated"]) == ("abc", False)
        assert (cut["source"], cut["source_truncated"]) == ("abcd", True)

    def test_without_it_such_a_text_cannot_be_translated(self, server: FakeServer, translate: Translate) -> None:
        server.info.limits.max_text_bytes = 10

        status, out, err = translate("one", "éééééé")

        assert (status, out) == (2, "ONE\n")
        assert "text 2: has 12 bytes; expected at most 10, or --truncate" in err
        assert [texts(request) for request in server.requests()] == [["one"]]

    def test_a_text_that_fills_a_message_is_cut_to_fit(self, server: FakeServer, translate: Translate) -> None:
        server.info.limits.max_message_bytes = server.info.limits.max_text_bytes = 2048

        status, _, _ = translate("x" * 5000, "--truncate", "--beam", "4", "--max-new-tokens", "100", "--json")

        (request,) = server.requests()
        assert status == 0
        assert 1024 < request.ByteSize() <= 2048

    def test_requests_have_no_more_texts_and_bytes_than_the_server_takes(
        self, server: FakeServer, translate: Translate, tmp_path: Path
    ) -> None:
        server.info.limits.max_inputs = 7
        server.info.limits.max_message_bytes = 2048
        lines = [f"{number}{'x' * (number * 37 % 700)}" for number in range(60)]

        status, out, _ = translate("--file", written(tmp_path / "in.txt", "\n".join(lines)))

        assert status == 0
        assert out == "".join(f"{line.upper()}\n" for line in lines)
        assert all(len(request.inputs) <= 7 and request.ByteSize() <= 2048 for request in server.requests())
        assert len(server.requests()) < 30

    @pytest.mark.parametrize(
        ("arguments", "most"), [([], 5), (["--beam", "10"], 2), (["--max-new-tokens", "4"], 32), (["--beam", "16"], 1)]
    )
    def test_requests_cost_no_more_than_the_server_takes(
        self, server: FakeServer, translate: Translate, tmp_path: Path, arguments: list[str], most: int
    ) -> None:
        server.info.limits.max_request_cost = 2000
        server.info.default_search.max_new_tokens = 100
        lines = "\n".join(map(str, range(64)))

        status, _, _ = translate("--file", written(tmp_path / "in.txt", lines), *arguments)

        assert status == 0
        assert max(len(request.inputs) for request in server.requests()) == most

    @pytest.mark.parametrize(
        ("arguments", "priority"), [([], pb.PRIORITY_NORMAL), (["--priority", "batch"], pb.PRIORITY_BATCH)]
    )
    def test_others_go_first_if_it_is_asked_for(
        self, server: FakeServer, translate: Translate, arguments: list[str], priority: pb.Priority
    ) -> None:
        assert translate("x", *arguments)[0] == 0
        assert [request.priority for request in server.requests()] == [priority]

    def test_a_model_without_a_tokenizer_is_told(self, server: FakeServer, translate: Translate) -> None:
        server.info.model.has_tokenizer = False

        status, out, err = translate("x")

        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "has no tokenizer and takes token ids alone: send them with beamline_client.Client" in err
        assert server.requests() == []


class TestOutput:
    def test_to_a_file(self, translate: Translate, tmp_path: Path) -> None:
        out_path = tmp_path / "out.txt"

        assert translate("été", "-o", str(out_path)) == (0, "", "")
        assert out_path.read_text(encoding="utf-8") == "ÉTÉ\n"

    def test_one_input_is_one_line(self, translate: Translate) -> None:
        assert translate("two\nlines")[1] == "TWO LINES\n"

    @pytest.mark.parametrize("arguments", [["--scores"], ["--n-best", "1", "--scores"]])
    def test_scores(self, translate: Translate, arguments: list[str]) -> None:
        assert translate("one", *arguments)[1] == "one\n-0.5000\tONE\n\n"

    def test_n_best(self, translate: Translate) -> None:
        _, out, _ = translate("one", "two", "--beam", "4", "--n-best", "2")

        assert out == "one\n-0.5000\tONE\n-1.0000\tONE #2\n\ntwo\n-0.5000\tTWO\n-1.0000\tTWO #2\n\n"

    def test_json(self, translate: Translate, tmp_path: Path) -> None:
        _, out, _ = translate("--json", "--file", written(tmp_path / "in.txt", "été un\n\n"))

        first, second = [json.loads(line) for line in out.splitlines()]
        assert first == {
            "source": "été un",
            "hypotheses": [
                {
                    "text": "ÉTÉ UN",
                    "score": -0.5,
                    "finish": "end_of_sequence",
                    "token_ids": [0, 1],
                    "token_logprobs": [-0.25, -0.25],
                }
            ],
            "source_tokens": 2,
            "source_truncated": False,
            "timing": {"queue_ms": 1.0, "encode_ms": 2.0, "decode_ms": 30.0, "steps": 2},
        }
        assert second == {"source": "", "hypotheses": []}
        assert "É" in out

    def test_stream(self, server: FakeServer, translate: Translate, tmp_path: Path) -> None:
        assert translate("--stream", "--file", written(tmp_path / "in.txt", "one two\n\nthree\n")) == (
            0,
            "ONE TWO\n\nTHREE\n",
            "",
        )
        assert [call.method for call in server.calls] == ["GetInfo", "GenerateStream", "GenerateStream"]

    def test_a_result_that_continues_its_pieces_is_printed_to_its_end(
        self, server: FakeServer, translate: Translate
    ) -> None:
        server.stream = lambda _request, _context: iter(
            [
                pb.GenerateStreamResponse(piece=pb.Piece(text="Hel")),
                pb.GenerateStreamResponse(result=pb.Result(hypotheses=[pb.Hypothesis(text="Hello.")])),
            ]
        )

        assert translate("--stream", "x")[1] == "Hello.\n"


def test_search_options_reach_the_server(server: FakeServer, translate: Translate) -> None:
    translate(
        *["x", "--beam", "8", "--n-best", "3", "--length-penalty", "-0.5", "--early-stopping", "heuristic"],
        *["--min-new-tokens", "0", "--max-new-tokens", "9", "--truncate", "--timeout", "77"],
    )

    _, call = server.calls
    assert call.request.search == pb.SearchOptions(
        beam_size=8,
        n_best=3,
        length_penalty=-0.5,
        early_stopping=pb.EARLY_STOPPING_HEURISTIC,
        min_new_tokens=0,
        max_new_tokens=9,
    )
    assert call.request.truncate_source
    assert call.time_remaining_s is not None
    assert call.time_remaining_s == pytest.approx(77, abs=5)


def test_search_options_that_are_left_out_stay_unset(server: FakeServer, translate: Translate) -> None:
    translate("x")

    assert server.requests()[0].search == pb.SearchOptions()


class TestTargetPrefix:
    """What every target begins with."""

    @pytest.mark.parametrize("arguments", [[], ["--stream"]])
    def test_every_target_begins_with_it(self, server: FakeServer, translate: Translate, arguments: list[str]) -> None:
        assert translate("one", "two", "--target-prefix", "Now", *arguments) == (0, "Now ONE\nNow TWO\n", "")
        assert translate("one", "two", "--target-prefix-ids", "8,17", *arguments) == (0, "8 17 ONE\n8 17 TWO\n", "")
        sent = [entry for request in server.requests() for entry in getattr(request, "inputs", None) or [request.input]]
        assert [list(entry.target_prefix.token_ids.ids) for entry in sent] == [[], [], [8, 17], [8, 17]]
        assert [entry.target_prefix.text for entry in sent] == ["Now", "Now", "", ""]

    def test_without_it_nothing_is_sent(self, server: FakeServer, translate: Translate) -> None:
        translate("one")

        assert not server.requests()[0].inputs[0].HasField("target_prefix")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--target-prefix", "a", "--target-prefix-ids", "1"],
            *(["--target-prefix-ids", ids] for ids in ("", "1,", "x", "1.5", "\u0663")),
        ],
    )
    def test_what_is_no_prefix_ends_with_status_2(self, translate: Translate, arguments: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            translate("x", *arguments)
        assert caught.value.code == 2

    @staticmethod
    def refusing(*violations: tuple[str, str]) -> Callable[..., pb.GenerateResponse]:
        def generate(_request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
            found = error_details_pb2.BadRequest()
            for field, description in violations:
                found.field_violations.add(field=field, description=description)
            Failure(grpc.StatusCode.INVALID_ARGUMENT, "; ".join(map(": ".join, violations)), [found]).end(context)
            return pb.GenerateResponse()

        return generate

    @pytest.mark.parametrize(
        ("arguments", "flag"),
        [(["--target-prefix", "Now"], "--target-prefix"), (["--target-prefix-ids", "1"], "--target-prefix-ids")],
    )
    @pytest.mark.parametrize("further", [[], ["--on-error", "skip"], ["--stream"]], ids=lambda further: further[-1:])
    def test_its_refusal_is_told_once_and_ends_everything(
        self, server: FakeServer, translate: Translate, arguments: list[str], flag: str, further: list[str]
    ) -> None:
        problem = "has 300 tokens, and search.max_new_tokens is 300; expected at most 512 together"
        fields = ("inputs[0].target_prefix.text", "inputs[1].target_prefix.text", "inputs[1].text")
        server.generate = self.refusing(*((field, problem) for field in fields), ("", "and 3 more violations"))
        server.stream = self.refusing(("input.target_prefix.text", problem))  # type: ignore[assignment]  # never returns

        status, out, err = translate("one", "two", *arguments, *further)

        told = problem.replace("search.max_new_tokens", "--max-new-tokens")
        assert (status, out, err) == (2, "", f"beamline translate: {flag}: {told}\n")

    def test_a_refusal_that_is_about_more_is_told_as_it_is(self, server: FakeServer, translate: Translate) -> None:
        server.generate = self.refusing(("inputs[0].target_prefix.text", "is odd"), ("search.beam_size", "is 99"))

        status, _, err = translate("one", "--target-prefix", "x")

        assert status == 2
        assert "the request is not valid: " in err
        assert "search.beam_size: is 99" in err

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["--target-prefix", "caf\udce9"], "--target-prefix: not valid Unicode at character 3"),
            (["--target-prefix-ids", "99999999999"], "--target-prefix-ids: Value out of range: 99999999999"),
        ],
    )
    def test_one_that_cannot_be_sent_is_named(
        self, server: FakeServer, translate: Translate, arguments: list[str], problem: str
    ) -> None:
        assert translate("one", *arguments) == (2, "", f"beamline translate: {problem}\n")
        assert server.requests() == []

    def test_a_server_that_does_not_know_prefixes_is_told(self, server: FakeServer, translate: Translate) -> None:
        server.info.limits.max_target_tokens = 0

        status, out, err = translate("one", "--target-prefix", "x")

        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "takes no notice of target prefixes: leave --target-prefix out" in err
        assert server.requests() == []

    def test_requests_have_no_more_bytes_than_the_server_takes(
        self, server: FakeServer, translate: Translate, tmp_path: Path
    ) -> None:
        server.info.limits.max_message_bytes = 4096
        lines = [f"{number}{'x' * (number * 37 % 700)}" for number in range(60)]

        status, out, _ = translate(
            "--file", written(tmp_path / "in.txt", "\n".join(lines)), "--target-prefix", "p" * 900
        )

        assert status == 0
        assert out == "".join(f"{'p' * 900} {line.upper()}\n" for line in lines)
        assert all(request.ByteSize() <= 4096 for request in server.requests())
        assert len(server.requests()) < 30

    def test_one_that_fills_a_message_is_told(self, server: FakeServer, translate: Translate) -> None:
        server.info.limits.max_message_bytes = 4096

        status, out, err = translate("one", "--target-prefix", "p" * 3600, "--truncate")

        assert (status, out) == (2, "")
        assert "leaves no room for a text in a message of 4096; shorten it" in err
        assert server.requests() == []


class TestLanguages:
    """`--from` and `--to`."""

    @pytest.fixture(autouse=True)
    def multilingual(self, server: FakeServer) -> None:
        server.info.model.source_languages.extend(["fra", "eng"])
        server.info.model.target_languages.extend(["fra", "eng"])

    @pytest.mark.parametrize("arguments", [[], ["--stream"]])
    def test_they_are_sent_if_they_are_given(
        self, server: FakeServer, translate: Translate, arguments: list[str]
    ) -> None:
        assert translate("one", "--from", "fra", "--to", "eng", *arguments)[0] == 0
        assert translate("one", "--to", "eng", *arguments)[0] == 0
        both, one = server.requests()
        assert (both.source_language, both.target_language) == ("fra", "eng")
        assert (one.HasField("source_language"), one.target_language) == (False, "eng")

    @pytest.mark.parametrize("further", [[], ["--on-error", "skip"], ["--stream"]], ids=lambda further: further[-1:])
    def test_a_refusal_is_told_once_by_their_flags(
        self, server: FakeServer, translate: Translate, further: list[str]
    ) -> None:
        refuse = TestTargetPrefix.refusing(("source_language", "is missing"), ("target_language", "is 'x'; expected y"))
        server.generate = refuse
        server.stream = refuse  # type: ignore[assignment]  # never returns

        told = "beamline translate: --from is missing; --to is 'x'; expected y\n"
        assert translate("one", "two", "--to", "x", *further) == (2, "", told)

    @pytest.mark.parametrize(("flag", "side"), [("--from", "source"), ("--to", "target")])
    def test_a_model_without_languages_takes_none(
        self, server: FakeServer, translate: Translate, flag: str, side: str
    ) -> None:
        getattr(server.info.model, f"{side}_languages").clear()

        status, out, err = translate("one", flag, "eng")

        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"takes no {side} language: leave {flag} out" in err
        assert server.requests() == []

    def test_one_that_cannot_be_sent_is_named(self, server: FakeServer, translate: Translate) -> None:
        told = "beamline translate: --to not valid Unicode at character 1\n"
        assert translate("one", "--to", "x\udce9") == (2, "", told)
        assert server.requests() == []


class TestErrors:
    @pytest.mark.parametrize(
        "arguments",
        [
            pytest.param(["text", "--file", "in.txt"], id="two-inputs"),
            pytest.param(["x", "--stream", "--json"], id="stream-json"),
            pytest.param(["x", "--stream", "--n-best", "2"], id="stream-n-best"),
            pytest.param(["--file", "does-not-exist.txt"], id="no-such-file"),
            pytest.param(["x", "-o", "no/such/folder/out.txt"], id="no-such-folder"),
            pytest.param(["x", "-o", str(Path(__file__).parent)], id="a-folder"),
        ],
    )
    def test_bad_usage_is_one_line_and_status_2(
        self, server: FakeServer, translate: Translate, arguments: list[str]
    ) -> None:
        status, out, err = translate(*arguments)

        assert (status, out) == (2, "")
        assert err.startswith("beamline translate: ")
        assert err.count("\n") == 1
        assert server.calls == []

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--beam", "0"],
            ["--timeout", "inf"],
            ["--batch-size", "x"],
            ["--early-stopping", "soon"],
            ["--min-new-tokens", "-1"],
            ["--on-error", "ignore"],
        ],
    )
    def test_an_argument_that_is_no_value_ends_with_status_2(self, translate: Translate, arguments: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            translate("x", *arguments)
        assert caught.value.code == 2

    def test_the_input_is_not_overwritten(self, translate: Translate, tmp_path: Path) -> None:
        source = written(tmp_path / "in.txt", "one\n")

        status, _, err = translate("--file", source, "-o", source)

        assert status == 2
        assert "is the input" in err
        assert Path(source).read_text(encoding="utf-8") == "one\n"

    @pytest.mark.parametrize(
        ("failure", "advice"),
        [
            (Failure(grpc.StatusCode.UNAVAILABLE, "draining"), "cannot reach a server at 127.0.0.1:"),
            (Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"), "lower --concurrency"),
            (Failure(grpc.StatusCode.INTERNAL, "internal error e-1"), "error id e-1"),
            (Failure(grpc.StatusCode.UNIMPLEMENTED, "no"), "check --server"),
        ],
        ids=lambda value: value.code.name if isinstance(value, Failure) else "",
    )
    @pytest.mark.parametrize("arguments", [[], ["--stream"]], ids=["bulk", "stream"])
    def test_a_failing_server_is_one_line_and_status_1(
        self, server: FakeServer, translate: Translate, failure: Failure, advice: str, arguments: list[str]
    ) -> None:
        server.fail(*[failure] * 3)

        status, out, err = translate("x", *arguments)

        assert (status, out.strip()) == (1, "")
        assert advice in err
        assert err.count("\n") == 1

    def test_a_deadline_names_the_option(self, server: FakeServer, translate: Translate) -> None:
        server.generate = server.hang

        status, _, err = translate("x", "--timeout", "1")

        assert status == 1
        assert "within 1 s: raise --timeout" in err


def test_an_unreachable_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as stopped:
        target = stopped.target

    status = main(["translate", "x", "--server", target])

    err = capsys.readouterr().err
    assert status == 1
    assert err.count("\n") == 1
    assert f"cannot reach a server at {target}" in err
    assert "beamline serve" in err
