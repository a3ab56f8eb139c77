"""A server whose loops have machine code, or have none yet: its log tells, and it answers."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from beamline_client import Client
from beamline_server.app import EXIT_SETTINGS
from beamline_server.bundle import Bundle
from beamline_server.process import BEAMLINE, ServerProcess
from doubles.loops import ENTRY_POINTS, environment, write_loops

SERVE = "import sys, loops.outer; from beamline_server.app import main; sys.exit(main())"
STARTING = ("listening", "engine_compiling", "engine_compiled", "serving")

Start = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def start(fr_en_int8: Bundle, tmp_path: Path) -> Iterator[Start]:
    """Starts a server that has compiled functions of a test beside the engine's; returns what it logs of its start."""
    write_loops(tmp_path)
    with ExitStack() as running:

        def started(**variables: str) -> list[dict[str, Any]]:
            given = {"PYTHONPATH": environment(tmp_path)["PYTHONPATH"]} | variables
            program = ("env", *(f"{name}={value}" for name, value in given.items()), sys.executable, "-c", SERVE)
            server = running.enter_context(ServerProcess(fr_en_int8.path, "--workers", "1", program=program))
            server.wait_until_serving(within_s=200)
            with Client(server.target) as client:
                assert client.generate_one("Bonjour.").hypotheses
            assert server.stop() == 0
            return [dict(record) for record in server.log.records() if record["event"] in STARTING]

        yield started


def events(records: list[dict[str, Any]]) -> list[str]:
    return [record["event"] for record in records]


def test_the_first_start_says_that_it_compiles_before_it_does(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "numba"

    records = start(NUMBA_CACHE_DIR=str(folder))

    assert events(records) == ["listening", "engine_compiling", "engine_compiled", "serving"]
    _, compiling, compiled, _ = records
    assert (compiling["level"], compiling["folder"]) == ("info", str(folder))
    assert "done once" in compiling["message"]
    assert compiling["functions"] == compiled["compiled"] >= ENTRY_POINTS
    assert (compiled["loaded"], compiled["kept"]) == (0, True)
    assert compiled["seconds"] > 0


def test_the_next_start_loads_them(start: Start, tmp_path: Path) -> None:
    folder = str(tmp_path / "numba")
    first = start(NUMBA_CACHE_DIR=folder)

    records = start(NUMBA_CACHE_DIR=folder)

    assert events(records) == ["listening", "engine_compiled", "serving"]
    assert (records[1]["compiled"], records[1]["loaded"]) == (0, first[1]["functions"])


def test_where_nothing_can_be_written_it_says_that_it_will_compile_again(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    records = start(NUMBA_CACHE_DIR=str(tmp_path / "file" / "folder"))

    assert events(records) == ["listening", "engine_compiling", "engine_compiled", "serving"]
    assert (records[1]["level"], records[1]["folder"]) == ("warning", None)
    assert "as at every start: no folder can be written" in records[1]["message"]
    assert records[2]["kept"] is False


def test_a_server_that_may_not_compile_says_what_to_do(fr_en_int8: Bundle) -> None:
    command = [str(BEAMLINE), "serve", str(fr_en_int8.path), "--grpc-port", "0", "--metrics-port", "0"]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}

    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert refused.returncode == EXIT_SETTINGS
    assert refused.stderr.endswith("NUMBA_DISABLE_JIT is set, so that nothing is compiled; unset it\n")
