"""`beamline compile`, in processes of its own that have compiled functions of a test beside the engine's."""

import subprocess
from pathlib import Path

import pytest

from doubles.loops import code_files, run_with_loops, write_loops


def beamline_compile(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys, loops.outer; from beamline_server.compile_cli import main; sys.exit(main({arguments!r}))"
    return run_with_loops(folder, program, confined=False, **variables)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with compiled functions that have no machine code yet."""
    write_loops(tmp_path)
    return tmp_path


def test_it_compiles_once_and_says_where_it_is_kept(folder: Path) -> None:
    numba = str(folder / "numba")

    first, second = (beamline_compile(folder, NUMBA_CACHE_DIR=numba) for _ in range(2))

    assert (first.returncode, first.stderr) == (second.returncode, second.stderr) == (0, "")
    assert first.stdout.startswith("compiling ")
    assert first.stdout.endswith(f" s, kept in {numba}\n")
    assert second.stdout.startswith("nothing to compile: ")
    assert {file.parent for file in code_files(folder)} == {folder / "numba"}


def test_a_check_tells_whether_all_is_compiled_and_compiles_nothing(folder: Path) -> None:
    numba = str(folder / "numba")

    before = beamline_compile(folder, "--check", NUMBA_CACHE_DIR=numba)
    assert code_files(folder) == []
    beamline_compile(folder, NUMBA_CACHE_DIR=numba)
    after = beamline_compile(folder, "--check", NUMBA_CACHE_DIR=numba)

    assert (before.returncode, before.stdout) == (1, "")
    assert before.stderr.startswith("beamline compile: functions without machine code: ")
    assert (after.returncode, after.stdout, after.stderr) == (0, "all functions have machine code\n", "")


def test_what_cannot_be_kept_is_told(folder: Path) -> None:
    (folder / "file").touch()

    done = beamline_compile(folder, NUMBA_CACHE_DIR=str(folder / "file" / "folder"))

    assert done.returncode == 1
    assert done.stderr.startswith("beamline compile: the machine code is lost, since no folder for it can be written; ")


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_it_refuses_to_pretend_when_numba_is_switched_off(folder: Path, arguments: tuple[str, ...]) -> None:
    done = beamline_compile(folder, *arguments, NUMBA_DISABLE_JIT="1")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "beamline compile: NUMBA_DISABLE_JIT is set, so that nothing is compiled; unset it\n"
