"""The double that runs compiled modules as plain Python: whole, with its indices checked, and beside the real ones."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from beamline_server.engine import compiled as real
from doubles.loops import write_loops
from doubles.uncompiled import not_negative, uncompiled


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the package of compiled functions, which can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    yield write_loops(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "loops"]:
        del sys.modules[name]


@pytest.fixture
def outer(package: Path) -> ModuleType:
    """Its functions as plain Python."""
    return uncompiled("loops.outer", "loops.inner")[0]


def test_it_computes_what_the_compiled_ones_compute(outer: ModuleType) -> None:
    compiled_outer = sys.modules["loops.outer"]
    plain, machine = outer.example()[0], compiled_outer.example()[0]

    assert outer.add_up(plain, 1) == compiled_outer.add_up(machine, 1) == 12
    assert plain.rows.tobytes() == machine.rows.tobytes()


def test_the_functions_it_calls_are_plain_too(outer: ModuleType) -> None:
    assert [type(function).__name__ for function in (outer.add_up, outer.taken, outer.pick)] == ["function"] * 3
    with pytest.raises(IndexError, match="out of bounds"):
        outer.taken(np.arange(3), 3)


def test_negative_indices_are_refused_but_written_ones(outer: ModuleType) -> None:
    with pytest.raises(IndexError, match="index -1 is negative"):
        outer.pick(np.arange(3), -1)
    with pytest.raises(IndexError, match="index -1 is negative"):
        outer.pick(np.zeros((3, 3)), np.int64(-1))
    assert outer.last(np.arange(3)) == 2


def test_the_real_modules_stay_what_they_are(package: Path) -> None:
    outer, inner = import_module("loops.outer"), import_module("loops.inner")
    before, finders = dict(sys.modules), list(sys.meta_path)

    plain, _ = uncompiled("loops.outer", "loops.inner")

    assert plain is not outer
    assert (dict(sys.modules), list(sys.meta_path)) == (before, finders)
    assert vars(sys.modules["loops"])["outer"] is outer
    assert isinstance(outer.pick, type(inner.taken))
    assert not isinstance(plain.pick, type(inner.taken))


def test_a_module_that_fails_leaves_nothing_behind(package: Path) -> None:
    outer = import_module("loops.outer")
    (package / "outer.py").write_text("raise ValueError('no')")

    with pytest.raises(ValueError, match="no"):
        uncompiled("loops.outer")
    assert sys.modules["loops.outer"] is outer
    assert sys.modules[real.__name__] is real


@pytest.mark.parametrize("index", [0, 3, True, np.int64(2), None, ..., "name", int, np.int64])
def test_what_is_no_negative_number_passes(index: object) -> None:
    assert not_negative(index) is index
