"""Who may import whom. `docs/architecture.md` draws it; this keeps it true."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("protos/beamline", "server/beamline_server", "export/beamline_export", "client/beamline_client")
SOURCES = sorted(
    path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py") if "_pb2" not in path.name
)
ENGINE = "server/beamline_server/engine"


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, and every name that it imports from one."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively; write the whole name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def is_stub(module: str) -> bool:
    return any(part.endswith(("_pb2", "_pb2_grpc")) for part in module.split("."))


CODE_CACHE = "server/beamline_server/engine/code_cache.py"


@dataclass(frozen=True)
class Ban:
    """What the files below a folder must not import, but for some."""

    folder: str
    banned: tuple[str, ...]
    reason: str
    but: tuple[str, ...] = ()


BANS = [
    Ban(
        "server",
        ("torch", "transformers", "onnx", "safetensors", "beamline_export", "beamline_client"),
        "a server computes with onnxruntime alone, and knows nobody who uses it",
    ),
    Ban(
        ENGINE,
        ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "beamline", "prometheus_client", "asyncio"),
        "the engine knows no transport and no metrics library",
    ),
    Ban(
        ENGINE,
        tuple(f"beamline_server.{name}" for name in ("models", "rpc", "app", "process", "settings", "metrics", "logs")),
        "inside the server, imports point from rpc to models to engine",
    ),
    Ban(
        "server",
        ("onnxruntime",),
        "what computes stands behind the Backend protocol",
        but=(
            f"{ENGINE}/ort/sessions.py",
            *(
                f"{ENGINE}/ort/cuda/{name}.py"
                for name in ("provider", "fixed_run", "captured_graphs", "encoder", "row_mover")
            ),
        ),
    ),
    Ban(
        "server",
        ("numba", "llvmlite"),
        "functions are compiled by engine/compiled.py, which chooses the processor before numba is imported",
        but=("server/beamline_server/engine/compiled.py", CODE_CACHE, f"{ENGINE}/ort/vectors.py"),
    ),
    Ban(
        "server",
        (CODE_CACHE.removeprefix("server/").removesuffix(".py").replace("/", "."),),
        "imported before engine/compiled.py, it would bring numba without the choice of the processor",
        but=("server/beamline_server/engine/compiled.py",),
    ),
    Ban(
        ENGINE,
        ("beamline_server.engine.ort",),
        "the engine knows no backend by name",
        but=tuple(relative(path) for path in SOURCES if "/engine/ort/" in relative(path)),
    ),
    Ban(
        "server/beamline_server/models",
        tuple(f"beamline_server.{name}" for name in ("rpc", "app", "process", "settings", "metrics", "logs")),
        "inside the server, imports point from rpc to models to engine",
    ),
    Ban("export", ("beamline_client", "beamline.v1", "grpc"), "an export needs no service"),
    Ban("export", ("onnxruntime",), "the server's engine/ort prepares for it before the first import"),
    Ban("protos", ("beamline_server", "beamline_export", "beamline_client"), "everybody imports the protos"),
]


@pytest.mark.parametrize("ban", BANS, ids=lambda ban: f"{ban.folder} without {ban.banned[0]}")
def test_imports_point_one_way(ban: Ban) -> None:
    found = [
        f"{relative(path)} imports {module}"
        for path in SOURCES
        if relative(path).startswith(f"{ban.folder}/") and relative(path) not in ban.but
        for module in imports(path)
        if is_in(module, ban.banned)
    ]
    assert not found, f"{ban.reason}: {', '.join(found)}"


@pytest.mark.parametrize("name", ["search", "processors", "pack", "table"])
def test_what_computes_on_the_table_computes_alone(name: str) -> None:
    """Arrays in, arrays out: no clock, no thread, no log, no backend."""
    engine = (
        f"beamline_server.engine.{module}" for module in ("admission", "compiled", "processors", "request", "table")
    )
    allowed = ("typing", "collections.abc", "dataclasses", "math", "numpy", "numba", *engine)
    found = [module for module in imports(REPOSITORY / ENGINE / f"{name}.py") if not is_in(module, allowed)]
    assert not found, f"{name}.py imports {', '.join(found)}"


def test_the_client_needs_grpc_alone() -> None:
    """Who only calls Beamline installs neither a model runtime nor the server's dependencies."""
    core = (*sys.stdlib_module_names, "grpc", "grpc_status", "google", "beamline", "beamline_client")
    load = (*core, "hdrh", "numpy", "pydantic", "rich", "matplotlib", "sacrebleu", "prometheus_client")
    found = [
        f"{relative(path)} imports {module}"
        for path in SOURCES
        if relative(path).startswith("client/")
        for module in imports(path)
        if not is_in(module, load if "/load/" in relative(path) else core)
    ]
    assert not found, ", ".join(found)


def test_protobuf_stops_at_the_door() -> None:
    """Generated messages are for those who speak on the wire: the server's rpc folder and its wiring, the client."""
    doors = (
        "server/beamline_server/rpc/",
        "server/beamline_server/process.py",  # asks the server process that it starts whether it serves
        "client/",
    )
    found = [
        f"{relative(path)} imports {module}"
        for path in SOURCES
        if not relative(path).startswith(doors)
        for module in imports(path)
        if is_stub(module)
    ]
    assert not found, ", ".join(found)


@pytest.mark.parametrize("name", ["utils", "util", "helpers", "common", "misc", "manager", "base"])
def test_modules_are_named_after_what_they_answer(name: str) -> None:
    assert not [relative(path) for path in SOURCES if path.stem.strip("_") == name or path.parent.name == name]


def test_no_module_is_named_after_one_of_pythons() -> None:
    """Legal, and confusing in every traceback; a queue of requests is called nothing else."""
    found = [relative(path) for path in SOURCES if path.stem in sys.stdlib_module_names]
    assert found == [f"{ENGINE}/queue.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_source_roots_are_no_packages_and_packages_are_typed(package: str) -> None:
    root = REPOSITORY / package
    assert not (root.parent / "__init__.py").exists()
    assert (root / "__init__.py").exists()
    typed = root / "v1" if package == "protos/beamline" else root
    assert (typed / "py.typed").exists() or (root / "py.typed").exists()


def test_the_rules_are_about_files_that_exist() -> None:
    """A folder that is renamed must not leave its rules behind, satisfied for ever."""
    names = [relative(path) for path in SOURCES]
    for folder in {ban.folder for ban in BANS}:
        assert any(name.startswith(f"{folder}/") for name in names)
    for ban in BANS:
        assert set(ban.but) <= set(names)
    assert any("onnxruntime" in set(imports(REPOSITORY / path)) for ban in BANS for path in ban.but)
