"""onnxruntime ignores what it does not know: every key that is set anywhere must be in the installed binary."""

import ast
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

REPOSITORY = Path(__file__).parents[4]
SETTERS = ("add_session_config_entry", "add_run_config_entry")
OPTIMIZERS = "optimization.disable_specified_optimizers"
FOLDERS = ("server", "export", "benchmarks", "models")


def entries() -> Iterator[tuple[str, list[ast.expr]]]:
    """Each call that sets a key: where, and its arguments."""
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SETTERS:
                    yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", node.args


def text(where: str, argument: ast.expr) -> str:
    assert isinstance(argument, ast.Constant), f"{where}: write it in place, so that it can be looked up"
    assert isinstance(argument.value, str)
    return argument.value


@pytest.fixture(scope="module")
def binary() -> bytes:
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*")
    return library.read_bytes()


def knows(binary: bytes, name: str) -> bool:
    """Whether it is a string of the binary, or the end of one: linkers store common ends once."""
    return name.encode() + b"\0" in binary


def test_every_key_is_one_that_the_installed_onnxruntime_knows(binary: bytes) -> None:
    keys = {where: text(where, arguments[0]) for where, arguments in entries()}
    assert len(set(keys.values())) > 3
    assert not {where: key for where, key in keys.items() if not knows(binary, key)}


def test_every_optimizer_that_is_switched_off_is_one(binary: bytes) -> None:
    found = [(where, arguments) for where, arguments in entries() if text(where, arguments[0]) == OPTIMIZERS]
    assert found
    for where, (_, names) in found:
        assert all(knows(binary, name) for name in text(where, names).split(";"))


def test_an_unknown_key_would_be_found_out(binary: bytes) -> None:
    assert not knows(binary, "session.intra_op.spin_duration_usec")
