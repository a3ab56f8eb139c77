"""The server process as tests, benchmarks and demos handle it: what they see when it does not do as they wish."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from beamline_server.manifest import MANIFEST
from beamline_server.process import ProcessFailed, ServerProcess
from doubles.service import write_manifest


def test_a_server_that_cannot_start_fails_with_its_log(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server, pytest.raises(ProcessFailed, match=re.escape(MANIFEST)):
        server.wait_until_serving()


def test_a_server_that_ends_while_it_warms_up_fails_with_its_last_words(slow_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(slow_bundle, bundle)
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    manifest["golden"][-1]["top_logprob"][0] -= 1.0
    write_manifest(bundle, manifest)

    with (
        ServerProcess(bundle) as server,
        pytest.raises(ProcessFailed, match=r"ended with status \d+ before it was SERVING:(?s:.*)golden input"),
    ):
        server.wait_until_serving()


def test_an_event_that_does_not_come_fails_in_time(server: ServerProcess) -> None:
    with pytest.raises(ProcessFailed, match="'stopped'} came 0 times within 0 s"):
        server.log.wait_for("stopped", within_s=0)


def test_metrics_that_do_not_change_fail_in_time(server: ServerProcess) -> None:
    with pytest.raises(ProcessFailed, match="beamline_running_rows"):
        server.scrape_until(lambda _: False, within_s=0)


def test_a_server_that_does_not_end_fails_in_time(server: ServerProcess) -> None:
    with pytest.raises(ProcessFailed, match="still runs"):
        server.wait(within_s=0)


def test_another_program_is_started_alike(tmp_path: Path) -> None:
    script = "import json, sys; sys.stderr.write(json.dumps({'event': 'started', 'arguments': sys.argv[1:]}))"

    with ServerProcess(tmp_path, "--max-rows", "8", program=(sys.executable, "-c", script)) as server:
        arguments = server.log.wait_for("started")["arguments"]

    assert arguments[0] == str(tmp_path)
    assert arguments[-2:] == ["--max-rows", "8"]
    assert "--grpc-port" in arguments
