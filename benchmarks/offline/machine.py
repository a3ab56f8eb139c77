"""Where and with what a run was made."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from beamline_client.load.environment import ask, commit, cpu_model
from offline.prepared import Pythons

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
PACKAGES = {
    "own": ("beamline", "onnxruntime", "numpy"),
    "peers": ("ctranslate2", "transformers", "torch"),
    "optimum": ("optimum-onnx", "optimum", "onnxruntime", "transformers", "torch"),
}
_CPUINFO = Path("/proc/cpuinfo")
_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


def about(pythons: Pythons) -> dict[str, Any]:
    """Machine and versions; nothing that tells whose machine it is."""
    text = _cpuinfo()
    environments = {"own": pythons.own, "peers": pythons.peers, "optimum": pythons.optimum}
    return {
        "cpu": cpu_model(text) or platform.processor() or "unknown",
        "instructions": known_instructions(text),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "busy_at_start": round(busy(), 2),
        "python": platform.python_version(),
        "versions": {name: _versions(python, PACKAGES[name]) for name, python in environments.items()},
    }


def instructions() -> list[str]:
    """Those of INSTRUCTIONS that this machine has."""
    return known_instructions(_cpuinfo())


def busy() -> float:
    """Processes that wanted a core during the last minute, on average."""
    return os.getloadavg()[0]


def stage_stamp() -> dict[str, Any]:
    """When a stage ran, and on which commit."""
    return {"date": datetime.now(UTC).isoformat(timespec="minutes"), "commit": commit(ask)}


def known_instructions(cpuinfo: str) -> list[str]:
    """Those of INSTRUCTIONS that the text of /proc/cpuinfo has."""
    flags = {flag for line in cpuinfo.splitlines() if line.startswith("flags") for flag in line.split()}
    return [name for name in INSTRUCTIONS if name in flags]


def _cpuinfo() -> str:
    return _CPUINFO.read_text("utf-8") if _CPUINFO.exists() else ""


def _versions(python: Path, packages: Iterable[str]) -> dict[str, str] | None:
    """None where the environment or one of the packages is not there."""
    try:
        done = subprocess.run(
            [str(python), "-c", _VERSIONS, *packages], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found: dict[str, str] = json.loads(done.stdout)
    return found
