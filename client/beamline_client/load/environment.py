"""Where the generator runs, for the report: another machine, another figure."""

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from beamline_client.load.report import Environment

LIBRARIES = ("grpcio", "protobuf", "numpy", "hdrhistogram")
NOT_INSTALLED = "(not installed)"
_HERE = Path(__file__).parent
_CPUINFO = Path("/proc/cpuinfo")
_WITHIN_S = 5.0

Ask = Callable[..., str | None]
"""Runs a command, given as its words, and returns what it prints; None if it is not there or fails."""


def ask(*command: str, within_s: float = _WITHIN_S) -> str | None:
    """See `Ask`. Runs it in the folder of this module; one that takes longer has failed."""
    try:
        done = subprocess.run(
            command, cwd=_HERE, capture_output=True, timeout=within_s, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip()


def describe(ask: Ask = ask) -> Environment:
    """Versions and machine. Raises nothing: what cannot be found out is None, or says so."""
    return Environment(
        beamline=version("beamline-serving"),
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu(),
        cores=_cores(),
        gpu=gpu(ask),
        commit=commit(ask),
        libraries={name: version(name) for name in LIBRARIES},
    )


def version(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def cpu_model(cpuinfo: str) -> str | None:
    """The first processor's name in the text of /proc/cpuinfo; None where it has none, as on ARM."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return None


def gpu(ask: Ask) -> str | None:
    """The names of NVIDIA's GPUs, each with its number if there are several; None without any."""
    told = ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or ""
    names = Counter(filter(None, (line.strip() for line in told.splitlines())))
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in names.items()) or None


def commit(ask: Ask) -> str | None:
    """The commit of the source tree, with "-dirty" when it has changes; None outside of one.

    An installed package may lie in somebody else's tree, which does not track it.
    """
    if ask("git", "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = ask("git", "rev-parse", "HEAD")
    changes = ask("git", "--no-optional-locks", "status", "--porcelain")
    return f"{head}-dirty" if head and changes else head or None


def _cpu() -> str:
    try:
        model = cpu_model(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        model = None
    return model or platform.processor() or "unknown"


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1
