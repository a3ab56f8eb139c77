"""The log of a real server: one JSON object per line, with ids that find a request, and never what it said."""

import fcntl
import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_client import Client
from beamline_server.bundle import Bundle
from beamline_server.process import BEAMLINE, ServerProcess

SECRET = "Marguerite cache le trésor sous le vieux chêne"
# Of the text, and of what it may become.
WORDS = ("Marguerite", "trésor", "tr\\u00e9sor", "vieux", "chêne", "ch\\u00eane", "treasure", "chest", "jndi")
SHORTEST_LINES_OF_A_CALL = 350
"""Bytes that the log has of a call at debug."""
STOPPED_WITHIN_S = 20
FORGED = '"}\n{"event": "forged", "request_id": "'
HOSTILE = [
    SECRET,
    f"{SECRET}\r\nlevel=error forged",
    f"{SECRET}\x1b[31m\x1b]0;title\x07",
    f"{SECRET}\u2028\u2029\x85\x00",
    f"{SECRET} %s %(message)s {{0}} ${{jndi:ldap://x}}",
    f"{SECRET}{FORGED}",
]


@pytest.fixture
def send(stub: Any) -> Callable[..., grpc.StatusCode]:
    """Sends a request under an id; returns its status."""

    def call(request: pb.GenerateRequest, request_id: str) -> grpc.StatusCode:
        try:
            stub.Generate(request, timeout=10, metadata=(("x-request-id", request_id),))
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    return call


def test_every_line_is_one_json_object_with_time_level_and_event(
    server: ServerProcess, send: Callable[..., grpc.StatusCode]
) -> None:
    send(pb.GenerateRequest(inputs=[pb.Input(text="Bonjour.")]), "lines")

    lines = server.log.text().splitlines()
    records = [json.loads(line) for line in lines]

    assert len(records) > 3
    assert all({"time", "level", "logger", "event"} <= record.keys() for record in records)


def test_a_request_is_found_by_its_id(server: ServerProcess, send: Callable[..., grpc.StatusCode]) -> None:
    send(pb.GenerateRequest(inputs=[pb.Input(text="Bonjour.")]), "good-1")
    send(pb.GenerateRequest(), "bad-1")

    good = server.log.wait_for("request_ended", request_id="good-1")
    bad = server.log.wait_for("request_ended", request_id="bad-1")
    assert (good["outcome"], good["code"], good["level"]) == ("ok", "OK", "debug")
    assert (bad["outcome"], bad["code"], bad["level"]) == ("invalid", "INVALID_ARGUMENT", "info")
    assert good["method"] == "/beamline.v1.GenerationService/Generate"
    assert 0 < good["seconds"] < 10


def test_what_requests_say_is_never_logged(server: ServerProcess, send: Callable[..., grpc.StatusCode]) -> None:
    """Not of answered, refused or failing ones, not even at debug level."""
    requests = [
        *(pb.GenerateRequest(inputs=[pb.Input(text=text)]) for text in HOSTILE),
        *(pb.GenerateRequest(model=text, inputs=[pb.Input(text=text)]) for text in HOSTILE),
        *(pb.GenerateRequest(inputs=[pb.Input(text=text), pb.Input()]) for text in HOSTILE),
        pb.GenerateRequest(inputs=[pb.Input(text=SECRET * 1000)]),
        pb.GenerateRequest(inputs=[pb.Input(text=SECRET * 10_000)]),
    ]
    codes = [send(request, f"secret-{number}") for number, request in enumerate(requests)]

    assert {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT} == set(codes)
    server.log.wait_for("request_ended", request_id=f"secret-{len(requests) - 1}")
    log = server.log.text()
    assert [word for word in WORDS if word in log] == []
    assert "forged" not in log
    assert server.log.records("forged") == []


@pytest.mark.parametrize(
    ("sent", "logged"), [('"}{"event":"forged"', '"}{"event":"forged"'), ("%s%d" * 50, ("%s%d" * 50)[:128])]
)
def test_a_hostile_request_id_is_one_field(
    server: ServerProcess, send: Callable[..., grpc.StatusCode], sent: str, logged: str
) -> None:
    send(pb.GenerateRequest(), sent)

    assert server.log.wait_for("request_ended", request_id=logged)
    assert server.log.records("forged") == []


def test_a_log_that_nobody_reads_holds_up_neither_calls_nor_the_stop(fr_en_int8: Bundle) -> None:
    flags = ("--host", "127.0.0.1", "--grpc-port", "0", "--metrics-port", "0", "--log-level", "debug")
    command = [str(BEAMLINE), "serve", str(fr_en_int8.path), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        pipe_bytes = fcntl.fcntl(process.stderr, fcntl.F_GETPIPE_SZ)
        try:
            told: dict[str, Any] = {}
            while "serving" not in told:
                record = json.loads(process.stderr.readline())
                told[record["event"]] = record
            with Client(f"127.0.0.1:{told['listening']['grpc_port']}") as client:
                for _ in range(2 * pipe_bytes // SHORTEST_LINES_OF_A_CALL):
                    assert client.generate_one("Oui.", timeout_s=20).hypotheses
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOPPED_WITHIN_S) == 0
        finally:
            process.kill()
