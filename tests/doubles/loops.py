"""A package with compiled functions, written anew for each test that changes it."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

SOURCES = {
    "__init__.py": "",
    "limits.py": "MOST = 4\n",
    "inner.py": """
from beamline_server.engine.compiled import compiled


@compiled
def taken(values, i):
    return values[i] * 2
""",
    "outer.py": """
from typing import NamedTuple

import numpy as np
from beamline_server.engine.compiled import compiled, entry_point

from loops.inner import taken
from loops.limits import MOST

ROW = np.dtype([("total", np.int64), ("beams", np.int64, (4,))])


class Table(NamedTuple):
    values: np.ndarray
    rows: np.ndarray


def example():
    return Table(np.arange(10), np.zeros(2, ROW)), 0


@compiled
def add_up(table, row):
    for i in range(MOST):
        table.rows[row]["total"] += taken(table.values, i)
        table.rows[row]["beams"][i] = i
    return table.rows[row]["total"]


@compiled
def pick(values, i):
    return values[i]


@compiled
def last(values):
    return values[-1]


entry_point(add_up, example)
entry_point(pick, lambda: (np.zeros(0), 0))
""",
}
"""By default, `add_up` returns 2 * (0 + 1 + 2 + 3) = 12."""

ENTRY_POINTS = 2

PROGRAM = """
import json, loops.outer
from beamline_server.engine.compiled import make_ready
told = []
ready = make_ready(told.append)
print(json.dumps({"compiled": ready.compiled, "loaded": ready.loaded, "kept": ready.kept, "told": told,
                  "result": int(loops.outer.add_up(*loops.outer.example()))}))
"""


def write_loops(folder: Path) -> Path:
    """Write the package into a folder; returns the package's own."""
    package = folder / "loops"
    package.mkdir()
    for name, text in SOURCES.items():
        (package / name).write_text(text)
    return package


def run_loops(folder: Path, program: str = PROGRAM, *, confined: bool = False, **variables: str) -> Any:
    """Make the package's entry points ready in a new process and call one; returns what happened.

    Warnings are errors, and so is a word on stderr. A confined process may write only what its user may, root, too.
    """
    done = run_with_loops(folder, program, confined=confined, **variables)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def run_with_loops(
    folder: Path, program: str, *, confined: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python program that may import the package."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        preexec_fn=_drop_override if confined else None,
        env=environment(folder) | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def environment(folder: Path) -> dict[str, str]:
    """The variables of such a process: numba's defaults, the user's cache beside the package."""
    paths = map(str, (folder, *(REPOSITORY / root for root in ("server", "protos"))))
    outer = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return outer | {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(folder / "user")}


def _drop_override() -> None:
    """Take from this process and its children the right to pass over the modes of files, if it has it (Linux)."""
    drop_from_bounding_set, dac_override = 24, 1
    if sys.platform == "linux" and os.geteuid() == 0 and ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override):
        raise OSError("the right to pass over the modes of files cannot be dropped")


def code_files(folder: Path) -> list[Path]:
    """The files of machine code below a folder."""
    return sorted(folder.rglob("*.nbc"))
