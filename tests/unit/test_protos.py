"""The API's definition: what is generated from it is up to date, and it keeps to buf's rules."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROTOS = REPOSITORY / "protos"
SOURCES = sorted(PROTOS.rglob("*.proto"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PROTOS)) for path in paths]


@pytest.mark.parametrize("source", names(SOURCES))
def test_the_committed_stubs_are_what_the_definition_gives(source: str, tmp_path: Path) -> None:
    """If not: `make protos`."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTOS), *outputs, source]
    subprocess.run(command, check=True, timeout=60)

    generated = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(generated) == 3
    for file in generated:
        committed = PROTOS / file.relative_to(tmp_path)
        assert file.read_text() == committed.read_text(), committed.name


def test_no_stub_is_left_of_a_definition_that_is_gone() -> None:
    stubs = {path.with_suffix("") for path in PROTOS.rglob("*_pb2*.py*") if path.parent.name != "__pycache__"}

    assert {Path(f"{source.with_suffix('')}_pb2") for source in SOURCES} == {
        Path(str(stub).removesuffix("_grpc")) for stub in stubs
    }


def test_buf_finds_no_fault() -> None:
    buf = Path(sys.executable).with_name("buf")

    checked = subprocess.run([buf, "lint"], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
