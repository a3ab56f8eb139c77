"""`beamline translate`, from the arguments to what is printed."""

import io
import json
import os
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


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


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
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))

        assert translate() == (0, "ONE\nTWO\n", "")

    def test_what_is_typed_is_answered_line_by_line(
        self, server: FakeServer, translate: Translate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\n"))

        assert translate() == (0, "ONE\nTWO\n", "")
        assert [len(call.request.inputs) for call in server.calls] == [1, 1]

    def test_nothing_gives_nothing(self, translate: Translate, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))

        assert translate() == (0, "", "")

    def test_blank_lines_never_reach_the_server(self, server: FakeServer, translate: Translate, tmp_path: Path) -> None:
        status, out, _ = translate("--file", written(tmp_path / "in.txt", "\n \n\n"))

        assert (status, out) == (0, "\n\n\n")
        assert server.calls == []

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
        assert sorted(len(call.request.inputs) for call in server.calls) == [1, 3, 3, 3]


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
        assert [call.method for call in server.calls] == ["GenerateStream", "GenerateStream"]

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

    (call,) = server.calls
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

    assert server.calls[0].request.search == pb.SearchOptions()


class TestErrors:
    @pytest.mark.parametrize(
        "arguments",
        [
            pytest.param(["text", "--file", "in.txt"], id="two-inputs"),
            pytest.param(["x", "--stream", "--json"], id="stream-json"),
            pytest.param(["x", "--stream", "--n-best", "2"], id="stream-n-best"),
            pytest.param(["--file", "does-not-exist.txt"], id="no-such-file"),
            pytest.param(["x", "-o", "no/such/folder/out.txt"], id="no-such-folder"),
            pytest.param(["lone \ud800 surrogate"], id="not-unicode"),
            pytest.param(["x", "--min-new-tokens", "-1"], id="negative"),
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
        "arguments", [["--beam", "0"], ["--timeout", "inf"], ["--batch-size", "x"], ["--early-stopping", "soon"]]
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

    def test_a_file_that_is_not_text(self, translate: Translate, tmp_path: Path) -> None:
        source = tmp_path / "in.txt"
        source.write_bytes(b"\xff\xfe")

        status, _, err = translate("--file", str(source))

        assert status == 2
        assert "not UTF-8" in err

    def test_a_refused_line_is_named(self, server: FakeServer, translate: Translate, tmp_path: Path) -> None:
        bad_request = error_details_pb2.BadRequest()
        bad_request.field_violations.add(field="inputs[0].text", description="has 900 tokens, at most 512")
        server.fail(Failure(grpc.StatusCode.INVALID_ARGUMENT, "invalid request", [bad_request]))

        status, out, err = translate("--file", written(tmp_path / "in.txt", "\nlong\n"))

        assert (status, out) == (2, "")
        assert "line 2: has 900 tokens, at most 512" in err

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

        status, _, err = translate("x", "--timeout", "0.05")

        assert status == 1
        assert "within 0.05 s: raise --timeout" in err


def test_an_unreachable_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as stopped:
        target = stopped.target

    status = main(["translate", "x", "--server", target])

    err = capsys.readouterr().err
    assert status == 1
    assert err.count("\n") == 1
    assert f"cannot reach a server at {target}" in err
    assert "beamline serve" in err
