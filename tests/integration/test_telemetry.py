"""onnxruntime tells its maker about every session, unless it is told not to before its first import."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from beamline_export.testing import nn_config, write_nn_transformer
from beamline_server.bundle import Bundle
from beamline_server.process import BEAMLINE, ServerProcess

VARIABLE = "ORT_DISABLE_TELEMETRY"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def environment(home: Path) -> Mapping[str, str]:
    """As that of a user who has never heard of it: with a variable that CI systems set, onnxruntime tells nothing."""
    return {"PATH": os.environ["PATH"], "HOME": str(home)}


def test_a_bare_onnxruntime_leaves_an_id_in_home(home: Path, environment: Mapping[str, str]) -> None:
    """Guards the tests below; if this fails, they and what they are about are not needed any more."""
    subprocess.run([sys.executable, "-c", "import onnxruntime"], env=environment, check=True, timeout=60)
    assert [file.name for file in home.rglob("deviceid")] == ["deviceid"]


def test_a_server_leaves_nothing_in_home(fr_en_int8: Bundle, home: Path, environment: Mapping[str, str]) -> None:
    """And its log holds no line of somebody else's."""
    variables = (f"{name}={value}" for name, value in environment.items())
    program = ("env", "--ignore-environment", *variables, str(BEAMLINE), "serve")
    with ServerProcess(fr_en_int8.path, program=program) as server:
        server.wait_until_serving()
        assert server.stop() == 0
    assert len(server.log.records()) == len(server.log.text().splitlines()) > 0
    assert list(home.iterdir()) == []


def test_an_export_leaves_nothing_in_home(home: Path, environment: Mapping[str, str], tmp_path: Path) -> None:
    source = write_nn_transformer(tmp_path / "checkpoint", nn_config())
    command = [str(BEAMLINE), "export", str(source), "-o", str(tmp_path / "bundle")]
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    assert (tmp_path / "bundle" / "manifest.json").exists()
    assert list(home.iterdir()) == []


def test_whoever_wants_it_gets_it(home: Path, environment: Mapping[str, str]) -> None:
    """What an operator sets stays."""
    code = f"import os, beamline_server.engine.ort.sessions; print(os.environ['{VARIABLE}'])"
    asked = [sys.executable, "-c", code]
    told = subprocess.run(asked, env={**environment, VARIABLE: "0"}, check=True, timeout=60, capture_output=True)
    assert told.stdout == b"0\n"
    assert list(home.rglob("deviceid"))
