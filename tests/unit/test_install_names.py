"""What people are told to install is this project: on PyPI, the name `beamline` belongs to somebody else."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
DISTRIBUTION = "beamline-serving"
THIS_FILE = Path(__file__).relative_to(REPOSITORY)

REQUIREMENT = re.compile(r"(beamline[\w.-]*?)(?:\[[\w$={},-]*\]|[=<>~!@;].*|)$")
"""A distribution's name or its wheel file, with extras or versions behind it."""
EXTRAS = re.compile(r"beamline[\w.-]*\[[\w$={}-][\w$={},-]*\]")
INSTALLER = re.compile(
    r"\b(?:pipx?3?|uvx?|poetry|pdm|conda|mamba|pixi)\s+(?:[\w-]+\s+)*?(?:install|add|wheel|download)\b(.*)"
)
"""A command that installs, up to the end of its line."""
LOOK_UP = re.compile(r"\b(?:version|distribution|metadata|requires|files)\(\s*[\"'](beamline[\w.-]*)[\"']")
"""Metadata of an installed distribution."""


def foreign_names(text: str) -> set[str]:
    """Every name in a text that stands for a distribution and begins like ours, but is another one."""
    words = [found[0] for found in EXTRAS.finditer(text)] + LOOK_UP.findall(text)
    for command in INSTALLER.findall(text):
        words += [word.rpartition("/")[2] for word in re.split(r"[\s'\"`)(]+", command)]
    names = {found[1] for word in words if (found := REQUIREMENT.match(word)) is not None}
    return {name for name in names if not _is_ours(name)}


def _is_ours(name: str) -> bool:
    # A wheel file is called by the distribution's name and its version; other such words are modules and metrics.
    if "_" in name and not name.endswith(".whl"):
        return True
    return canonicalize_name(name.partition("-")[0] if name.endswith(".whl") else name.rstrip(".")) == DISTRIBUTION


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name]


def text_of(file: Path) -> str | None:
    try:
        return (REPOSITORY / file).read_text("utf-8")
    except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
        return None


def test_nothing_here_installs_somebody_elses_project() -> None:
    texts = {file: text for file in tracked_files() if file != THIS_FILE and (text := text_of(file)) is not None}
    assert len(texts) > 300

    assert {str(file): names for file, text in texts.items() if (names := foreign_names(text))} == {}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pip install 'beamline[export,server]'", "beamline"),
        ("python -m pip install --upgrade beamline", "beamline"),
        ("uv add beamline==0.1", "beamline"),
        ('"beamline[server-common]",', "beamline"),
        ('    "beamline[${extra}]"', "beamline"),
        ('version("beamline")', "beamline"),
        ("pip install beamline-server", "beamline-server"),
        ("pip install './beamline-0.1.0-py3-none-any.whl[load]'", "beamline-0.1.0-py3-none-any.whl"),
        ("pip install 'dist/beamline_serving-0.1.0-py3-none-any.whl[load]'", None),
        ("pip install beamline-serving", None),
        ("rate(beamline_requests_total[5m])", None),
        ("beamline serve bundle; version('grpcio')", None),
    ],
)
def test_such_a_name_would_be_found(text: str, name: str | None) -> None:
    """Guards the test above."""
    assert foreign_names(text) == ({name} if name else set())


def test_the_project_and_its_extras_have_the_name() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    own = [line for lines in extras.values() for line in lines if "beamline" in line]

    assert project["name"] == DISTRIBUTION
    assert own
    assert {line.partition("[")[0] for line in own} == {DISTRIBUTION}


@pytest.mark.parametrize("page", ["README.md", "docs/bring-your-model.md", "docs/load-testing.md"])
def test_the_pages_tell_extras_that_there_are(page: str) -> None:
    """A misspelt extra is a warning of pip's, and then nothing but the client is installed."""
    told = re.findall(r"pip install '?\.\[([\w,-]+)\]", (REPOSITORY / page).read_text("utf-8"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]

    assert told, "from a checkout"
    assert {extra for extras in told for extra in extras.split(",")} <= project["optional-dependencies"].keys()


def test_a_checkout_installs_under_this_name() -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", "--no-index"]
    ran = subprocess.run(
        [*command, "--disable-pip-version-check", ".[server]"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"Would install {DISTRIBUTION}-" in ran.stdout
    assert "does not provide the extra" not in ran.stderr
