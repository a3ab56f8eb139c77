"""What the image is installed from: every package with its version and hashes, nothing missing and nothing to spare."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Lock = dict[str, str]
LOCKS = ("cpu", "gpu", "build")
EXPORT_SIDE = {"torch", "transformers", "onnx"}


@pytest.fixture(scope="session")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="session")
def locks(repository: Path) -> dict[str, Lock]:
    return {name: read_lock(repository / f"deploy/docker/requirements-{name}.txt") for name in LOCKS}


@pytest.fixture(scope="session")
def constraints(repository: Path) -> Lock:
    lines = (repository / "constraints.txt").read_text("utf-8").splitlines()
    return {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }


def read_lock(path: Path) -> Lock:
    """Each package's version; anything but `name==version` with hashes is an error."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    found: Lock = {}
    for line in text.replace("\\\n", "").splitlines():
        pinned = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)((?: +--hash=sha256:[0-9a-f]{64})+)", line)
        assert pinned, f"{path.name}: {line}"
        assert pinned[1] not in found, f"{path.name}: {line}"
        found[pinned[1]] = pinned[2]
    return found


def closure(wanted: Iterable[str], project: dict[str, Any]) -> dict[str, Requirement]:
    """Everything that requirements bring along, as the packages that are installed here tell it."""
    extras = project["project"]["optional-dependencies"]
    to_visit = [Requirement(line) for line in wanted]
    found: dict[str, Requirement] = {}
    seen: set[tuple[str, str]] = set()
    while to_visit:
        asked = to_visit.pop()
        name = canonicalize_name(asked.name)
        if name == project["project"]["name"]:
            to_visit += [Requirement(line) for extra in asked.extras for line in extras[extra]]
            continue
        found[name] = asked
        for extra in {"", *asked.extras} - {extra for package, extra in seen if package == name}:
            seen.add((name, extra))
            brought = map(Requirement, distribution(name).requires or ())
            to_visit += [each for each in brought if not each.marker or each.marker.evaluate({"extra": extra})]
    return found


def test_a_lock_without_a_hash_or_a_version_is_none(tmp_path: Path) -> None:
    """Guards `read_lock`."""
    for line in ("numpy==2.4.6\n", f"numpy>=2.4 \\\n    --hash=sha256:{'0' * 64}\n", "numpy==2.4.6 --hash=sha256:00\n"):
        (tmp_path / "lock").write_text(line)
        with pytest.raises(AssertionError, match="numpy"):
            read_lock(tmp_path / "lock")


def test_the_image_installs_what_the_server_asks_for_and_nothing_else(
    locks: dict[str, Lock], project: dict[str, Any]
) -> None:
    asked = closure([*project["project"]["dependencies"], "beamline-serving[server,moses]"], project)
    assert locks["cpu"].keys() == asked.keys()
    assert all(asked[name].specifier.contains(version) for name, version in locks["cpu"].items())


def test_the_gpu_variant_differs_in_its_runtime_alone(locks: dict[str, Lock]) -> None:
    more = {name: version for name, version in locks["gpu"].items() if not name.startswith("nvidia-")}
    assert more.pop("onnxruntime-gpu") == locks["cpu"]["onnxruntime"]
    assert {**more, "onnxruntime": locks["cpu"]["onnxruntime"]} == locks["cpu"]
    assert {"nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cuda-runtime"} <= locks["gpu"].keys()


def test_the_wheel_is_built_with_what_is_locked(locks: dict[str, Lock], project: dict[str, Any]) -> None:
    asked = closure(project["build-system"]["requires"], project)
    assert locks["build"].keys() == asked.keys()
    assert all(asked[name].specifier.contains(version) for name, version in locks["build"].items())


def test_no_lock_has_the_export_side(locks: dict[str, Lock]) -> None:
    assert not [name for name in LOCKS if EXPORT_SIDE & locks[name].keys()]


def test_locks_have_the_versions_that_are_tested(locks: dict[str, Lock], constraints: Lock) -> None:
    for name in ("cpu", "build"):
        assert locks[name].items() <= constraints.items()


def test_everything_that_is_developed_with_has_a_known_version(project: dict[str, Any], constraints: Lock) -> None:
    asked = closure([*project["project"]["dependencies"], "beamline-serving[dev]"], project)
    assert asked.keys() <= constraints.keys()


def test_constraints_leave_cuda_to_torch(locks: dict[str, Lock], constraints: Lock) -> None:
    """PyTorch's own CUDA libraries have other versions than the image's: pinned here, it would not install."""
    assert not (locks["gpu"].keys() - locks["cpu"].keys()) & constraints.keys()


# ---- the inventory --------------------------------------------------------------------------------------------------


@pytest.fixture
def image(locks: dict[str, Lock], tmp_path: Path) -> Path:
    """An environment that looks like the image's: the metadata of what is locked, linked from what is here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "image"], check=True)
    [packages] = (tmp_path / "image").glob("lib/python*/site-packages")
    for name in locks["cpu"]:
        [metadata] = [file for file in distribution(name).files or () if file.match("*.dist-info/METADATA")]
        folder = Path(str(metadata.locate())).parent
        (packages / folder.name).symlink_to(folder)
    return tmp_path / "image"


def write_inventory(repository: Path, tools: Path, image: Path) -> subprocess.CompletedProcess[str]:
    """`make inventory`, less the comparison with CycloneDX's schema, which takes seconds."""
    names = {"BIN": tools, "OF": image, "TO": image / "out" / "server", "ARGS": "--no-validate"}
    command = ["make", "inventory", *(f"{name}={value}" for name, value in names.items())]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_the_inventory_names_every_package_and_its_licence(
    repository: Path, inventory_tools: Path, image: Path, locks: dict[str, Lock]
) -> None:
    done = write_inventory(repository, inventory_tools, image)
    assert done.returncode == 0, done.stdout + done.stderr

    sbom = json.loads((image / "out" / "server.cdx.json").read_text("utf-8"))
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["name"] == "beamline-serving"
    assert {each["purl"] for each in sbom["components"]} == {f"pkg:pypi/{n}@{v}" for n, v in locks["cpu"].items()}

    _, _, *rows = (image / "out" / "server.licenses.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {canonicalize_name(name): version for name, version, *_ in cells} == locks["cpu"]
    licences = {name: licence for name, _, licence, _ in cells}
    assert licences["numba"] == "BSD License"
    assert "UNKNOWN" not in licences.values()


def test_a_package_without_a_licence_fails_the_inventory(repository: Path, inventory_tools: Path, image: Path) -> None:
    [packages] = image.glob("lib/python*/site-packages")
    nameless = packages / "nameless-1.0.dist-info"
    nameless.mkdir()
    (nameless / "METADATA").write_text("Metadata-Version: 2.1\nName: nameless\nVersion: 1.0\n")
    done = write_inventory(repository, inventory_tools, image)
    assert done.returncode != 0
    assert "nameless:1.0" in done.stdout + done.stderr
