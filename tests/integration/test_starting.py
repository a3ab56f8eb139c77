"""What cannot be served: one line for each reason on stderr, and an exit status that says whose fault it is."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from beamline_client import Client
from beamline_server.bundle import Bundle
from beamline_server.engine.ort.c_api import available_providers
from beamline_server.engine.ort.settings import CUDA
from beamline_server.manifest import MANIFEST
from beamline_server.process import BEAMLINE, ServerProcess
from doubles.service import write_manifest

EXIT_SETTINGS = 2
EXIT_BUNDLE = 3


@dataclass(frozen=True)
class Ended:
    """How `beamline serve` ended that did not start."""

    status: int
    problems: list[str]
    """What it told the operator, without the name of the command."""
    logged: list[str]
    """The other lines on stderr."""


def serve_in_vain(*arguments: object, **variables: str) -> Ended:
    """Run `beamline serve`, which is to end by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BEAMLINE_")}
    done = subprocess.run(
        [BEAMLINE, "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment | variables,
    )
    assert done.stdout == ""
    lines, prefix = done.stderr.splitlines(), "beamline serve: "
    problems = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return Ended(done.returncode, problems, [line for line in lines if not line.startswith(prefix)])


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of 127.0.0.1 that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.fixture
def damaged(fr_en_int8: Bundle, tmp_path: Path) -> Callable[[Callable[[Path], object]], Path]:
    """Makes a copy of the bundle and damages it."""

    def make(damage: Callable[[Path], object]) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(fr_en_int8.path, folder)
        damage(folder)
        return folder

    return make


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_manifest(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param("weights.bin", lambda folder: flip_a_byte(folder / "weights.bin"), id="a byte of the weights"),
        pytest.param("encoder.onnx", lambda folder: flip_a_byte(folder / "encoder.onnx"), id="a byte of a graph"),
        pytest.param("source.spm", lambda folder: (folder / "source.spm").unlink(), id="no tokenizer"),
        pytest.param(MANIFEST, lambda folder: (folder / MANIFEST).unlink(), id="no manifest"),
        pytest.param(MANIFEST, lambda folder: (folder / MANIFEST).write_text('{"a": 1'), id="half a manifest"),
        pytest.param(
            MANIFEST,
            lambda folder: change_manifest(folder, lambda manifest: manifest.update(format_version=5)),
            id="a newer format",
        ),
    ],
)
def test_a_damaged_bundle_is_refused_by_the_name_of_the_file(
    damaged: Callable[[Callable[[Path], object]], Path], name: str, damage: Callable[[Path], object]
) -> None:
    folder = damaged(damage)

    ended = serve_in_vain(folder, "--grpc-port", 0, "--metrics-port", 0)

    assert ended.status == EXIT_BUNDLE
    assert len(ended.problems) == 1
    assert ended.problems[0].startswith(f"{folder / name}: ")
    assert ended.logged == []


def test_a_processor_that_computes_something_else_is_refused(
    damaged: Callable[[Callable[[Path], object]], Path],
) -> None:
    def expect_otherwise(manifest: Mapping[str, object]) -> None:
        golden = manifest["golden"]
        assert isinstance(golden, list)
        golden[0]["top_logprob"][0] -= 1

    folder = damaged(lambda folder: change_manifest(folder, expect_otherwise))

    ended = serve_in_vain(folder, "--grpc-port", 0, "--metrics-port", 0)

    assert ended.status == EXIT_BUNDLE
    assert len(ended.problems) == 1
    assert "golden input 0 differs by 1" in ended.problems[0]


def test_wrong_settings_are_told_all_at_once(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text('workers = "two"\nmax_row = 3\n')

    ended = serve_in_vain(
        *("--grpc-port", 65536, "--max-beam-size", 17, "--turbo", "--config", config),
        BEAMLINE_DRAIN_TIMEOUT_S="-1",
        BEAMLINE_METRIC_PORT="1",
    )

    assert ended.status == EXIT_SETTINGS
    for told in (
        f"{config}: workers: 'two' is not valid; expected a whole number of at least 1 or auto",
        f"{config}: max_row: unknown; did you mean max_rows?",
        "BEAMLINE_DRAIN_TIMEOUT_S: '-1' is not valid; expected a number from 0 to 86400",
        "BEAMLINE_METRIC_PORT: unknown; did you mean metrics_port?",
        "--grpc-port: '65536' is not valid; expected a whole number from 0 to 65535",
        "--max-beam-size: '17' is not valid; expected a whole number from 1 to 16",
        "--turbo: unknown argument",
        "BUNDLE: missing; expected the folder that `beamline export` has written",
    ):
        assert told in ended.problems
    assert len(ended.problems) == 8
    assert ended.logged == []


@pytest.mark.parametrize("flag", ["--grpc-port", "--metrics-port"])
def test_a_taken_port_is_told_in_one_line(fr_en_int8: Bundle, taken_port: int, flag: str) -> None:
    other = "--metrics-port" if flag == "--grpc-port" else "--grpc-port"

    ended = serve_in_vain(fr_en_int8.path, "--host", "127.0.0.1", flag, taken_port, other, 0)

    assert ended.status == EXIT_SETTINGS
    assert len(ended.problems) == 1
    assert ended.problems[0].startswith(f"127.0.0.1:{taken_port} cannot be listened on")
    assert all(line.startswith("{") for line in ended.logged), "a line that is no JSON"


@pytest.mark.parametrize(
    ("host", "target"),
    [
        pytest.param("[::1]", "[::1]:", marks=pytest.mark.ipv6),
        pytest.param("::", "[::1]:", marks=pytest.mark.ipv6),
        ("localhost", "localhost:"),
    ],
)
def test_both_ports_answer_where_they_are_told_to(fr_en_int8: Bundle, host: str, target: str) -> None:
    with ServerProcess(fr_en_int8.path, "--host", host) as server, Client(server.target) as client:
        server.wait_until_serving()

        assert server.target.startswith(target)
        assert client.generate_one("Bonjour.").hypotheses
        assert server.samples()["beamline_ready"] == 1


def test_a_second_server_on_the_same_port_is_refused(server: ServerProcess, fr_en_int8: Bundle) -> None:
    port = server.target.rpartition(":")[2]

    ended = serve_in_vain(fr_en_int8.path, "--host", "127.0.0.1", "--grpc-port", port, "--metrics-port", 0)

    assert ended.status == EXIT_SETTINGS
    assert len(ended.problems) == 1
    assert "is another server running?" in ended.problems[0]


def test_a_server_on_the_cpu_does_without_onnxruntimes_python_interface(server: ServerProcess) -> None:
    """It takes memory and time at every start; a step calls the C interface."""
    mapped = Path("/proc", str(server.process.pid), "maps").read_text()

    assert "libonnxruntime.so" in mapped
    assert "onnxruntime_pybind11_state" not in mapped


@pytest.mark.skipif(CUDA in available_providers(), reason="this onnxruntime has CUDA")
def test_a_device_that_is_not_there_is_told_in_one_line(fr_en_fp32: Bundle) -> None:
    ended = serve_in_vain(fr_en_fp32.path, "--device", "cuda", "--grpc-port", 0, "--metrics-port", 0)

    assert ended.status == EXIT_SETTINGS
    assert ended.problems == [
        "device cuda cannot be used: this onnxruntime has no CUDA provider; "
        "install the extra server-gpu in place of server"
    ]
    assert ended.logged == []


def test_a_bundle_for_the_cpu_is_not_served_on_a_gpu(fr_en_int8: Bundle) -> None:
    ended = serve_in_vain(fr_en_int8.path, "--device", "cuda", "--grpc-port", 0, "--metrics-port", 0)

    assert ended.status == EXIT_SETTINGS
    assert ended.problems == [
        "device cuda cannot be used: the bundle is int8, which runs on the CPU; export it with --precision fp16"
    ]


def test_settings_that_promise_more_than_the_model_has_are_refused(fr_en_int8: Bundle) -> None:
    ended = serve_in_vain(fr_en_int8.path, "--max-new-tokens", 257, "--grpc-port", 0, "--metrics-port", 0)

    assert ended.status == EXIT_SETTINGS
    assert ended.problems == ["max_new_tokens: 257 is more than the model can generate; expected at most 256"]


def test_settings_from_all_sources_reach_the_server(
    fr_en_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "server.toml"
    config.write_text('model_name = "from-file"\nmax_rows = 23\nmax_queue_rows = 5\nworkers = 1\n')
    monkeypatch.setenv("BEAMLINE_CONFIG", str(config))
    monkeypatch.setenv("BEAMLINE_MAX_ROWS", "24")
    monkeypatch.setenv("BEAMLINE_MAX_QUEUE_ROWS", "6")
    with ServerProcess(fr_en_int8.path, "--max-queue-rows", "7") as server:
        server.wait_until_serving()
        samples = server.samples()

        assert server.log.wait_for("serving")["model"] == "from-file"
        assert samples["beamline_row_capacity"] == 24
        assert samples["beamline_queue_limit_rows"] == 7


def test_a_server_that_may_need_more_than_it_is_granted_does_not_start(fr_en_int8: Bundle) -> None:
    ended = serve_in_vain(fr_en_int8.path, "--memory-limit", 500_000_000, "--grpc-port", 0, "--metrics-port", 0)
    [problem] = ended.problems
    assert ended.status == EXIT_SETTINGS
    assert problem.startswith("memory_limit: at its most the server takes ")
    assert "MB, of which there are 500: when warm " in problem
    assert "lower max_rows, kv_slots, max_message_bytes, max_queue_rows or max_connections" in problem
