"""A real server process, and what calls it."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest

from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_client import Client
from beamline_server.bundle import Bundle
from beamline_server.manifest import MANIFEST
from beamline_server.process import ServerProcess
from doubles.service import write_manifest

HERE = Path(__file__).parent
TEST_FILE = HERE.parents[1] / "models" / "fr-en" / "test.tsv.gz"

Serve: TypeAlias = Callable[..., ServerProcess]

# One attempt per call, and no proxy between: what a test sees is what the server said.
ONE_ATTEMPT = [("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """The source sentences of the embedded model's test file."""
    with gzip.open(TEST_FILE, "rt", encoding="utf-8") as stream:
        return [line.split("\t")[0] for line in stream]


@pytest.fixture(scope="session")
def server(fr_en_int8: Bundle, sentences: list[str]) -> Iterator[ServerProcess]:
    """A serving process with default limits that tests share and leave idle; its log has everything."""
    with ServerProcess(fr_en_int8.path, "--log-level", "debug") as running:
        running.wait_until_serving()
        yield running
        assert running.stop() == 0
        # Whatever the tests have done: the log is JSON without a word of theirs.
        log = running.log.text()
        assert [line for line in log.splitlines() if not line.startswith("{")] == []
        assert [text for text in sentences if len(text) > 8 and (text in log or json.dumps(text)[1:-1] in log)] == []


@pytest.fixture
def serve(fr_en_int8: Bundle) -> Iterator[Serve]:
    """Starts processes of the test's own, with these flags, and waits until they serve."""
    with ExitStack() as running:

        def start(*flags: str) -> ServerProcess:
            process = running.enter_context(ServerProcess(fr_en_int8.path, *flags))
            process.wait_until_serving()
            return process

        yield start


@pytest.fixture(scope="session")
def slow_bundle(fr_en_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose warm-up takes a second or so: it has its golden inputs many times."""
    folder = tmp_path_factory.mktemp("slow") / "bundle"
    shutil.copytree(fr_en_int8.path, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["golden"] *= 40
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    """The client library, connected to the shared server."""
    with Client(server.target) as opened:
        yield opened


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[Any]:
    """A bare channel to the shared server, whose calls are one attempt each."""
    with grpc.insecure_channel(server.target, options=ONE_ATTEMPT) as opened:
        yield opened


@pytest.fixture
def stub(channel: Any) -> Any:
    """The methods of the service on that channel, without the client library."""
    return GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
