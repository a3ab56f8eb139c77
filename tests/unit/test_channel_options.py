"""Options of gRPC channels and servers: gRPC ignores those that it does not know, so a slip of the pen is silent."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc._cython import cygrpc

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("server", "client", "export", "benchmarks", "models", "tests")
OPTION = re.compile(r"grpc(\.(?!v\d)[a-z0-9_]+)+")
CORE = Path(cygrpc.__file__).read_bytes()


def is_known(option: str) -> bool:
    """Whether the gRPC that is installed has this name among its strings."""
    return f"{option}\0".encode() in CORE


def options_of(path: Path) -> Iterator[str]:
    """Every string of a file that reads like an option; names of services have capitals, those of packages versions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OPTION.fullmatch(node.value):
            yield node.value


SOURCES = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py")) if path != Path(__file__)]
USES = [(path.relative_to(REPOSITORY).as_posix(), option) for path in SOURCES for option in sorted({*options_of(path)})]


@pytest.mark.parametrize(("path", "option"), USES)
def test_the_installed_grpc_knows_every_option_that_is_used(path: str, option: str) -> None:
    assert is_known(option), f"{path}: gRPC knows no {option}, and would ignore it"


def test_server_and_client_are_among_the_files_with_options() -> None:
    with_options = {path for path, _ in USES}
    assert {"server/beamline_server/rpc/server.py", "client/beamline_client/channel.py"} <= with_options


@pytest.mark.parametrize("option", ["grpc.http2.min_recv_ping_interval_without_data_ms", "grpc.max", "grpc.no_such"])
def test_a_name_that_grpc_lacks_is_found_out(option: str) -> None:
    assert not is_known(option)
