"""onnxruntime ignores what it does not know: every key that is set anywhere must be in the installed binary."""

import ast
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

from beamline_server.engine.ort.c_api import SHARED_ARENA
from beamline_server.engine.ort.settings import settings

REPOSITORY = Path(__file__).parents[4]
SETTERS = ("add_session_config_entry", "add_run_config_entry")
OPTIMIZERS = "optimization.disable_specified_optimizers"
FOLDERS = ("server", "export", "benchmarks", "models")


WHAT_ALL_SESSIONS_HAVE = {**settings(2), SHARED_ARENA: "1"}
SET_BY = "server/beamline_server/engine/ort/sessions.py"
"""Where what all sessions have is set through the Python interface, key by key."""


def entries() -> Iterator[tuple[str, list[ast.expr]]]:
    """Each call that sets a key by its name: where, and its arguments."""
    for where, arguments in calls():
        if not (where.startswith(SET_BY) and isinstance(arguments[0], ast.Name)):
            yield where, arguments


def calls() -> Iterator[tuple[str, list[ast.expr]]]:
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SETTERS:
                    yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", node.args


def text(where: str, argument: ast.expr) -> str:
    assert isinstance(argument, ast.Constant), f"{where}: write it in place, so that it can be looked up"
    assert isinstance(argument.value, str)
    return argument.value


@pytest.fixture(scope="module", params=["onnxruntime_pybind11_state*", "libonnxruntime.so.*"])
def binary(request: pytest.FixtureRequest) -> bytes:
    """The library behind the Python interface, or the one with the C interface."""
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob(request.param)
    return library.read_bytes()


def knows(binary: bytes, name: str) -> bool:
    """Whether it is a string of the binary, or the end of one: linkers store common ends once."""
    return name.encode() + b"\0" in binary


def test_every_key_is_one_that_the_installed_onnxruntime_knows(binary: bytes) -> None:
    keys = {where: text(where, arguments[0]) for where, arguments in entries()}
    keys |= {f"settings: {key}": key for key in WHAT_ALL_SESSIONS_HAVE}
    assert len(set(keys.values())) > 3
    assert not {where: key for where, key in keys.items() if not knows(binary, key)}


def test_every_optimizer_that_is_switched_off_is_one(binary: bytes) -> None:
    assert OPTIMIZERS not in [text(where, arguments[0]) for where, arguments in entries()]
    names = WHAT_ALL_SESSIONS_HAVE[OPTIMIZERS].split(";")
    assert names
    assert all(knows(binary, name) for name in names)


def test_an_unknown_key_would_be_found_out(binary: bytes) -> None:
    assert not knows(binary, "session.intra_op.spin_duration_usec")
