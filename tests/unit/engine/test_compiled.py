"""Functions as machine code: what they compute, and what is refused instead of computed wrongly or late."""

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from beamline_server.engine.compiled import compiled, compiled_unlocked, entry_point
from doubles.loops import run_loops, write_loops


@compiled_unlocked
def count_until(flag: NDArray[np.int64], counted: NDArray[np.int64], most: int) -> bool:
    for _ in range(most):
        counted[0] += 1  # it might be the flag's memory, so the flag is read each time
        if flag[0]:
            return True
    return False


@compiled
def divided(a: float, b: float) -> float:
    return a / b


@compiled
def sum_of(values: NDArray[np.float32]) -> np.float32:
    total = np.float32(0)
    for value in values:
        total += value
    return total


def test_other_threads_run_while_an_unlocked_one_does() -> None:
    flag, counted, found = np.zeros(1, np.int64), np.zeros(1, np.int64), list[bool]()
    count_until(flag, counted, 1)
    thread = threading.Thread(target=lambda: found.append(count_until(flag, counted, 10**10)))

    thread.start()
    while counted[0] < 1000:
        pass
    flag[0] = 1
    thread.join()

    assert found == [True]


def test_a_division_by_zero_raises_as_in_python() -> None:
    with pytest.raises(ZeroDivisionError):
        divided(1.0, 0.0)


def test_sums_are_added_up_in_the_order_that_is_written() -> None:
    """Whatever the processor could add at once: the bits are those of one after the other."""
    values = np.random.default_rng(0).random(1001).astype(np.float32)
    expected = np.float32(0)
    for value in values:
        expected += value

    assert sum_of(values) == expected
    assert sum_of(values) != values.sum(), "another order gives other bits, or this shows nothing"


def test_a_function_that_encloses_variables_is_refused() -> None:
    most = 3

    def enclosing() -> int:
        return most

    with pytest.raises(TypeError, match="enclosing encloses variables; make them arguments"):
        compiled(enclosing)


def test_an_entry_point_has_to_be_compiled() -> None:
    with pytest.raises(TypeError, match="is no compiled function; decorate it with @compiled"):
        entry_point(len, lambda: ([],))


OTHER_TYPES = """
import json, numpy as np, loops.outer
from beamline_server.engine.compiled import make_ready
before = float(loops.outer.pick(np.arange(3, dtype=np.float32), 1))
make_ready()
try:
    loops.outer.pick(np.arange(3, dtype=np.int8), 1)
except TypeError as error:
    refused = str(error)
print(json.dumps({"before": before, "refused": refused, "after": float(loops.outer.pick(np.arange(3.0), 2)),
                  "no entry point": loops.outer.last(np.arange(3))}))
"""


def test_when_ready_other_types_are_refused_instead_of_compiled_for(tmp_path: Path) -> None:
    """A request would wait for the compiler."""
    write_loops(tmp_path)

    answers = run_loops(tmp_path, OTHER_TYPES)

    assert (answers["before"], answers["after"], answers["no entry point"]) == (1, 2, 2)
    assert "No matching definition for argument type(s) array(int8, 1d, C), int64" in answers["refused"]


TWICE = """
import json, loops.outer
from beamline_server.engine.compiled import make_ready
first, second = make_ready(), make_ready()
print(json.dumps([first.compiled, first.loaded, second.compiled, second.loaded, second.kept]))
"""


def test_what_is_ready_stays_ready(tmp_path: Path) -> None:
    write_loops(tmp_path)

    assert run_loops(tmp_path, TWICE) == [2, 0, 0, 0, True]
    assert run_loops(tmp_path, TWICE) == [0, 2, 0, 0, True]


OFF = """
import json, loops.outer
from beamline_server.engine.compiled import is_off, make_ready
ready = make_ready()
print(json.dumps([is_off(), ready.compiled, ready.loaded, type(loops.outer.pick).__name__]))
"""


def test_switched_off_functions_stay_python(tmp_path: Path) -> None:
    write_loops(tmp_path)

    assert run_loops(tmp_path, OFF, NUMBA_DISABLE_JIT="1") == [True, 0, 0, "function"]
