"""The wheel: what is in it, what it asks for, and that its client needs no more than that."""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
ROOTS = {
    "beamline": "protos",
    "beamline_client": "client",
    "beamline_export": "export",
    "beamline_server": "server",
}
"""Where the source of each package is."""
SENTENCES = {
    Path("beamline_client/load/sentences.tsv.gz"): Path("models/fr-en/test.tsv.gz"),
    Path("beamline_client/load/sentences.LICENSE"): Path("models/fr-en/LICENSE"),
}
"""What `beamline load` asks by default and its licence, and where they are from."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the working tree in this environment, so without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def info(unpacked: Path) -> Path:
    """The folder of the metadata."""
    (folder,) = unpacked.glob("*.dist-info")
    return folder


@pytest.fixture(scope="module")
def metadata(info: Path) -> Message:
    return Parser().parsestr((info / "METADATA").read_text("utf-8"))


def files_below(folder: Path) -> Iterator[Path]:
    return (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


def test_it_has_the_packages_and_nothing_else(unpacked: Path, info: Path) -> None:
    assert {entry.name for entry in unpacked.iterdir()} == {*ROOTS, info.name}


@pytest.mark.parametrize("package", ROOTS)
def test_each_package_is_whole(unpacked: Path, package: str) -> None:
    source = REPOSITORY / ROOTS[package] / package
    sources = {file for file in files_below(source) if "__pycache__" not in file.parts}

    brought_along = {file.relative_to(package) for file in SENTENCES if file.is_relative_to(package)}
    assert set(files_below(unpacked / package)) == sources | brought_along
    assert Path("py.typed") in sources


def test_the_api_comes_with_its_stubs_and_its_definition(unpacked: Path) -> None:
    names = {file.name for file in files_below(unpacked / "beamline" / "v1")}

    assert {"generation.proto", "generation_pb2.py", "generation_pb2.pyi", "generation_pb2_grpc.py"} <= names


def test_the_sentences_of_the_load_tester_come_with_their_licence(unpacked: Path) -> None:
    for file, origin in SENTENCES.items():
        assert (unpacked / file).read_bytes() == (REPOSITORY / origin).read_bytes()


def test_nothing_else_of_tests_models_or_deployment_is_in_it(unpacked: Path) -> None:
    unwanted = {".safetensors", ".onnx", ".spm", ".gz", ".yaml", ".Dockerfile"}

    files = set(files_below(unpacked)) - SENTENCES.keys()
    assert [file for file in files if file.suffix in unwanted or file.name.startswith("test_")] == []


def test_an_sdist_has_what_a_wheel_is_made_of_but_no_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert built.returncode == 0, built.stderr
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}

    assert set(SENTENCES.values()) <= names
    assert not [name for name in names if name.suffix == ".safetensors"]


def test_it_installs_one_command_with_its_sub_commands(info: Path) -> None:
    entries = ConfigParser()
    entries.read(info / "entry_points.txt")

    assert dict(entries["console_scripts"]) == {"beamline": "beamline_client.main:main"}
    assert dict(entries["beamline.commands"]) == {
        "compile": "beamline_server.compile_cli:main",
        "export": "beamline_export.cli:main",
        "inspect": "beamline_server.inspect_cli:main",
        "load": "beamline_client.load.cli:main",
        "serve": "beamline_server.app:main",
        "translate": "beamline_client.cli:main",
    }


def test_without_extras_it_asks_for_grpc_and_protobuf_alone(metadata: Message) -> None:
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]

    assert {requirement.name for requirement in requirements if requirement.marker is None} == {
        *("grpcio", "grpcio-status", "protobuf")
    }


def test_its_metadata_names_license_versions_and_extras(metadata: Message, info: Path) -> None:
    assert metadata["Name"] == "beamline-serving"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (info / "licenses" / "LICENSE").read_text() == (REPOSITORY / "LICENSE").read_text()
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        *("dev", "export", "load", "moses", "server", "server-common", "server-gpu")
    }


CLIENT_ALONE = """
import sys
from importlib.abc import MetaPathFinder

allowed, wheel, installed = set(sys.argv[1].split(",")), sys.argv[2], sys.argv[3]

class Guard(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{top} is not among the dependencies", name=top)

sys.meta_path.insert(0, Guard())
sys.path[:] = [wheel, *sys.path, installed]
import beamline_client, beamline_client.cli, beamline_client.main, beamline_client.testing
assert all(wheel in module.__file__ for module in (beamline_client, sys.modules["beamline.v1.generation_pb2"]))
with beamline_client.testing.FakeServer() as server, beamline_client.Client(server.target) as client:
    print(client.generate_one("hello").text)
"""


def top_level_names(name: str) -> set[str]:
    """What a distribution and all that it asks for install, by the names they are imported by."""
    found, waiting = set[str](), [name]
    done = set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        installed = distribution(name)
        tops = {file.parts[0].removesuffix(".py") for file in installed.files or () if file.suffix in (".py", ".so")}
        found |= {top.partition(".")[0] for top in tops}
        requirements = [Requirement(line) for line in installed.requires or ()]
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_the_client_needs_the_wheel_and_its_dependencies_alone(unpacked: Path, metadata: Message) -> None:
    """In a new process that finds neither the working tree nor anything else that is installed here."""
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    allowed = set(ROOTS).union(*(top_level_names(r.name) for r in requirements if r.marker is None))
    installed = str(distribution("grpcio").locate_file(""))

    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CLIENT_ALONE, ",".join(sorted(allowed)), str(unpacked), installed],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=unpacked,
    )

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "HELLO\n", "")
    assert not allowed & {"numpy", "onnxruntime", "torch", "pydantic", "prometheus_client", "sentencepiece"}
