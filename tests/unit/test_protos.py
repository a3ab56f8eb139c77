"""The API's definition: what is generated from it is up to date, and it keeps to buf's rules."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from beamline.v1 import generation_pb2

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


def floors() -> dict[str, str]:
    """By package, the version that the committed stubs ask for when they are imported."""
    grpcio, protobuf = set[str](), set[tuple[str, ...]]()
    for path in PROTOS.rglob("*_pb2*.py"):
        text = path.read_text("utf-8")
        grpcio |= {*re.findall(r"^GRPC_GENERATED_VERSION = '(.+)'$", text, re.MULTILINE)}
        protobuf |= {*re.findall(r"ValidateProtobufRuntimeVersion\(\s*\S+,\s*(\d+),\s*(\d+),\s*(\d+),", text)}
    return {
        "grpcio": max(grpcio, key=Version),
        "protobuf": ".".join(max(protobuf, key=lambda parts: [*map(int, parts)])),
    }


def requirements() -> Iterator[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, lines)


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_project_asks_for_what_its_stubs_ask_for() -> None:
    """A lower floor would let in versions with which they cannot be imported."""
    floor = floors()
    asked = {found.name: str(found.specifier) for found in requirements()}

    assert asked["grpcio"] == f">={floor['grpcio']}"
    assert asked["protobuf"] == f">={floor['protobuf']}"


def test_what_is_released_along_with_grpcio_is_as_new() -> None:
    family = {found.name: str(found.specifier) for found in requirements() if found.name.startswith("grpcio")}

    assert set(family.values()) == {f">={floors()['grpcio']}"}
    assert "grpcio-tools" in family


@pytest.mark.parametrize("package", floors())
def test_the_versions_that_are_installed_for_tests_fit_the_stubs(package: str) -> None:
    assert Version(constraints()[package]) >= Version(floors()[package])
    assert Version(version(package)) >= Version(floors()[package])


OPTIONS = {
    "csharp_namespace": "Beamline.V1",
    "go_package": "beamline/v1;beamlinev1",
    "java_multiple_files": True,
    "java_outer_classname": "GenerationProto",
    "java_package": "beamline.v1",
}
"""Where other languages find the generated code; callers' imports name it, so it stays."""


def test_other_languages_find_their_code_where_it_always_was() -> None:
    options = generation_pb2.DESCRIPTOR.GetOptions()

    assert {field.name: value for field, value in options.ListFields()} == OPTIONS


def test_buf_finds_no_fault() -> None:
    buf = Path(sys.executable).with_name("buf")

    checked = subprocess.run([buf, "lint"], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
