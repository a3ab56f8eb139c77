"""Machine code in files: when it is used, when it is not, and where it lies. Each run is a process of its own."""

import math
import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from beamline_server.engine.code_cache import trusted_owners
from beamline_server.engine.processor import processor, target
from doubles.loops import ENTRY_POINTS, code_files, run_loops, write_loops

COMPILED = {"compiled": ENTRY_POINTS, "loaded": 0, "kept": True, "told": [ENTRY_POINTS]}
LOADED = {"compiled": 0, "loaded": ENTRY_POINTS, "kept": True, "told": []}
TARGET = "import json, loops.outer; print(json.dumps(loops.outer.pick.targetctx.codegen().magic_tuple()))"
OTHER_PROCESSOR = "cortex-a53" if platform.machine() in ("aarch64", "arm64") else "x86-64-v2"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, whose machine code has been compiled; not to be changed."""
    folder = tmp_path_factory.mktemp("filled")
    write_loops(folder)
    assert run_loops(folder) == COMPILED | {"result": 12}
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test."""
    return Path(shutil.copytree(filled, tmp_path / "copy"))


def test_a_copied_folder_is_used_whatever_its_file_times_are(folder: Path) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (1_000_000_000, 1_000_000_000))

    assert run_loops(folder) == LOADED | {"result": 12}


@pytest.mark.parametrize(
    ("file", "old", "new", "result"),
    [
        pytest.param("limits.py", "MOST = 4", "MOST = 3", 6, id="a constant of another module"),
        pytest.param("inner.py", "* 2", "* 3", 18, id="a function of another module"),
    ],
)
def test_what_another_module_brings_is_compiled_again_when_it_changes(
    folder: Path, file: str, old: str, new: str, result: int
) -> None:
    """With the same size and times, too."""
    source = folder / "loops" / file
    before = source.stat()
    source.write_text(source.read_text().replace(old, new))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    for bytecode in folder.rglob("*.pyc"):  # Python's own, which goes by time and size
        bytecode.unlink()

    assert run_loops(folder) == COMPILED | {"result": result}
    assert run_loops(folder) == LOADED | {"result": result}


@pytest.mark.parametrize("setting", ["NUMBA_OPT=1", "NUMBA_BOUNDSCHECK=1", f"NUMBA_CPU_NAME={OTHER_PROCESSOR}"])
def test_machine_code_of_other_settings_is_not_used(folder: Path, setting: str) -> None:
    name, _, value = setting.partition("=")

    assert run_loops(folder, confined=False, **{name: value}) == COMPILED | {"result": 12}


def test_damaged_files_are_compiled_and_written_again(folder: Path) -> None:
    taken, add_up, pick = code_files(folder)
    taken.write_bytes(b"")
    add_up.write_bytes(add_up.read_bytes()[:-100])
    pick.write_bytes(b"x" * 1000)

    assert run_loops(folder) == COMPILED | {"result": 12}
    assert run_loops(folder) == LOADED | {"result": 12}


def test_one_that_changes_leaves_the_others_alone(folder: Path) -> None:
    """What a module does not import is no part of its machine code."""
    (folder / "loops" / "stranger.py").write_text("MOST = 5\n")

    assert run_loops(folder) == LOADED | {"result": 12}


def test_several_processes_may_compile_at_once(tmp_path: Path) -> None:
    write_loops(tmp_path)

    with ThreadPoolExecutor(3) as threads:
        results = [run["result"] for run in threads.map(lambda _: run_loops(tmp_path), range(3))]

    assert results == [12, 12, 12]
    assert run_loops(tmp_path) == LOADED | {"result": 12}
    assert len(code_files(tmp_path)) == len([*tmp_path.rglob("*.nbc*")]) == ENTRY_POINTS + 1, (
        "no half-written ones stay"
    )


def test_it_lies_beside_the_source(filled: Path) -> None:
    files = code_files(filled)

    assert {file.parent for file in files} == {filled / "loops" / "__pycache__"}
    assert {file.name.partition("-")[0] for file in files} == {
        "loops.inner.taken",
        "loops.outer.add_up",
        "loops.outer.pick",
    }
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_it_lies_in_the_users_cache_where_the_source_is_read_only(tmp_path: Path) -> None:
    package = write_loops(tmp_path)
    (package / "__pycache__").touch()

    assert run_loops(tmp_path) == COMPILED | {"result": 12}
    assert run_loops(tmp_path) == LOADED | {"result": 12}
    assert {file.parent.parent for file in code_files(tmp_path)} == {tmp_path / "user" / "beamline"}


def test_two_installations_share_the_users_cache_without_meeting(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (write_loops(tmp_path / name) / "__pycache__").touch()
    (tmp_path / "b" / "loops" / "limits.py").write_text("MOST = 3\n")
    user = str(tmp_path / "user")

    for name, result in (("a", 12), ("b", 6)):
        assert run_loops(tmp_path / name, XDG_CACHE_HOME=user) == COMPILED | {"result": result}
    for name, result in (("a", 12), ("b", 6)):
        assert run_loops(tmp_path / name, XDG_CACHE_HOME=user) == LOADED | {"result": result}


def test_numbas_folder_takes_the_place_of_both(tmp_path: Path) -> None:
    package = write_loops(tmp_path)

    assert run_loops(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "numba")) == COMPILED | {"result": 12}
    assert run_loops(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "numba")) == LOADED | {"result": 12}
    assert {file.parent for file in code_files(tmp_path)} == {tmp_path / "numba"}
    assert code_files(package) == []


def test_where_nothing_can_be_written_every_process_compiles(tmp_path: Path) -> None:
    (write_loops(tmp_path) / "__pycache__").touch()
    (tmp_path / "user").touch()

    for _ in range(2):
        assert run_loops(tmp_path) == COMPILED | {"result": 12, "kept": False}


def test_a_folder_that_cannot_be_written_is_read(folder: Path) -> None:
    """As in a container with a read-only root, whoever the user is."""
    files = sorted(folder.rglob("*"))
    for file in (folder, *files):
        file.chmod(0o555 if file.is_dir() else 0o444)

    assert run_loops(folder, confined=True) == LOADED | {"result": 12}
    assert run_loops(folder, confined=True, NUMBA_OPT="1") == COMPILED | {"result": 12, "kept": False}
    assert sorted(folder.rglob("*")) == files


def test_it_is_pickled_so_it_must_be_ours(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.touch()

    assert trusted_owners(source) == {0, os.geteuid()}
    assert trusted_owners(Path("/")) == {0, os.geteuid()}


def test_it_is_for_all_processors_of_a_kind_and_has_nothing_of_this_one_alone(tmp_path: Path) -> None:
    write_loops(tmp_path)

    kind, features = run_loops(tmp_path, TARGET)[1:]

    assert kind == target(processor())
    assert features == ""


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("fpu avx avx2 bmi1 bmi2 f16c fma abm movbe xsave avx512f", "x86-64-v3"),
        ("fpu avx avx2 bmi1 bmi2 f16c abm movbe xsave", "generic"),
        ("Features : fp asimd", "generic"),
        ("", "generic"),
    ],
)
def test_attention_gets_vectors_where_there_are_some(flags: str, kind: str) -> None:
    assert target(flags) == kind


WORK = """
import math
import numpy as np
from beamline_server.engine.compiled import compiled, entry_point

@compiled
def work(values, exponent):
    if exponent < 0:
        raise ValueError("negative")
    longest = np.empty(2 * len(values), np.float32)
    for i in range(len(values)):
        longest[i] = math.log(values[i]) ** exponent / (values[i] - 1)
    return longest, values.sum(), exponent > 1

entry_point(work, lambda: (np.zeros(0), 0.5))
"""
CALLS = """
import json, numpy as np, loops.work
from beamline_server.engine.compiled import make_ready
loaded = make_ready().loaded
array, total, flag = loops.work.work(np.array([2.0, 4.0]), 1.5)
errors = []
for values, exponent in (([2.0], -1.0), ([1.0], 1.0)):
    try:
        loops.work.work(np.array(values), exponent)
    except (ValueError, ZeroDivisionError) as error:
        errors.append(f"{type(error).__name__}: {error}")
print(json.dumps([loaded, [*map(float, array[:2])], len(array), total, flag, errors]))
"""


def test_loaded_machine_code_does_all_that_compiled_does(tmp_path: Path) -> None:
    """It allocates, computes logarithms and powers, raises, and returns what has to be made into Python's."""
    (write_loops(tmp_path) / "work.py").write_text(WORK)

    was_compiled, *compiled = run_loops(tmp_path, CALLS)
    was_loaded, *loaded = run_loops(tmp_path, CALLS)

    assert (was_compiled, was_loaded) == (0, 1)
    assert loaded == compiled
    expected = [math.log(value) ** 1.5 / (value - 1) for value in (2, 4)]
    assert loaded == [
        pytest.approx(expected),
        4,
        6,
        True,
        ["ValueError: negative", "ZeroDivisionError: division by zero"],
    ]
