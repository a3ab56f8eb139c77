"""The `beamline` command: what it lists, loads and reports."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_client.main import BUILT_IN, ENTRY_POINT_GROUP, available_commands, main, run
from beamline_client.testing import FakeServer

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-c", "import sys; from beamline_client.main import main; sys.exit(main())"]
# A child process finds the packages where this one does, installed or not.
# Its output is buffered, as it is for users.
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, EntryPoint]:
    """Sub-commands of a made-up module."""
    module = """
        def succeed(argv): print(*argv); return 0
        def fail(argv): return 3
        def interrupt(argv): raise KeyboardInterrupt
        def import_late(argv): import module_that_does_not_exist
        """
    (tmp_path / "commands_for_test_main.py").write_text("\n".join(line.strip() for line in module.splitlines()))
    (tmp_path / "needs_something.py").write_text("import module_that_does_not_exist")
    monkeypatch.syspath_prepend(tmp_path)
    targets = {name: f"commands_for_test_main:{name}" for name in ["succeed", "fail", "interrupt"]}
    targets |= dict.fromkeys(["export", "inspect", "serve", "load", "foreign"], "needs_something:main")
    targets["translate"] = "commands_for_test_main:import_late"
    return {name: EntryPoint(name, target, ENTRY_POINT_GROUP) for name, target in targets.items()}


def test_the_built_in_commands_are_those_of_the_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["entry-points"][ENTRY_POINT_GROUP]

    assert declared == BUILT_IN


def test_the_built_in_commands_are_there_installed_or_not() -> None:
    available = available_commands()

    assert {name: available[name].value for name in BUILT_IN} == BUILT_IN


def test_help_lists_every_command_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])

    assert caught.value.code == 0
    listed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert BUILT_IN.keys() <= listed.keys()
    assert listed["serve"] == "serve a bundle over gRPC"


def test_a_command_that_is_not_ours_is_listed_by_its_target(
    commands: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(["--help"], commands)

    assert "foreign    needs_something:main" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("beamline ")


def test_no_command_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    err = capsys.readouterr().err
    assert err.startswith("beamline: name a command: compile, export, inspect, load, serve, translate; ")
    assert (err.count("\n"), "--help" in err) == (1, True)


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sevre"]) == 2

    err = capsys.readouterr().err
    assert err.startswith("beamline: unknown command 'sevre'; there are: compile, export, inspect, ")
    assert err.count("\n") == 1


def test_a_command_gets_the_remaining_arguments(
    commands: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["succeed", "--help", "--", "x"], commands) == 0
    assert capsys.readouterr().out == "--help -- x\n"


def test_a_commands_status_is_the_exit_status(commands: dict[str, EntryPoint]) -> None:
    assert run(["fail"], commands) == 3


def test_ctrl_c_is_status_130(commands: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["interrupt"], commands) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "extras"),
    [
        ("export", "[export,server]"),
        ("serve", "[server]"),
        ("inspect", "[server]"),
        ("load", "[load]"),
        pytest.param("translate", "", id="translate-imports-late"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(
    commands: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str], command: str, extras: str
) -> None:
    assert run([command], commands) == 2

    assert capsys.readouterr().err == (
        f"beamline: {command} needs the module 'module_that_does_not_exist', which is not installed; install "
        f"beamline-serving{extras}: pip install '.{extras}' in a checkout of Beamline, or pip install 'FILE{extras}' "
        "with its wheel file\n"
    )


def test_a_missing_module_of_a_foreign_command_is_for_its_own_package(
    commands: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["foreign"], commands) == 2
    assert capsys.readouterr().err == (
        "beamline: foreign needs the module 'module_that_does_not_exist', which is not installed; install what "
        "brings foreign again\n"
    )


def test_ctrl_c_ends_a_running_call(server: FakeServer) -> None:
    """A real process with a real signal: no traceback, and no waiting for the answer."""
    arrived = threading.Event()

    def generate(request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        arrived.set()
        server.hang(request, context)
        raise AssertionError

    server.generate = generate
    arguments = ["translate", "x", "--server", server.target, "--timeout", "100"]
    with subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert arrived.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)

    assert process.returncode == 130
    assert err == ""


def test_a_reader_that_leaves_early_is_no_error(server: FakeServer) -> None:
    arguments = ["translate", "x", "--server", server.target]
    with subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()

    assert process.returncode == 141
    assert err == b""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["translate", "--help"], ["load", "--help"]])
def test_a_reader_that_leaves_before_the_help_is_no_error(arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "wb") as closed:
        done = subprocess.run(
            [*COMMAND, *arguments], env=ENVIRONMENT, stdout=closed, stderr=subprocess.PIPE, check=False
        )

    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("arguments", [["--server", "{}", "x"], ["--help"]])
def test_a_full_disk_is_told_in_one_line(server: FakeServer, arguments: list[str]) -> None:
    command = [*COMMAND, "translate", *[argument.format(server.target) for argument in arguments]]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, check=False)

    told = b"beamline: stdout cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_closed_streams_are_no_crash(server: FakeServer) -> None:
    """As a shell closes them with `<&-` and `>&-`."""
    translate = shlex.join([*COMMAND, "translate", "--server", server.target])

    def run(line: str) -> tuple[int, bytes]:
        done = subprocess.run(["sh", "-c", line], env=ENVIRONMENT, capture_output=True, check=False)
        return done.returncode, done.stderr

    assert run(f"{translate} x >&-") == (0, b"")
    assert run(f"{translate} <&-") == (
        *(2, b"beamline translate: there are no texts, and stdin is closed: give some, or name a file with --file\n"),
    )


def test_the_package_runs_as_the_command(server: FakeServer) -> None:
    command = [sys.executable, "-m", "beamline_client", "translate", "x", "--server", server.target]

    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)

    assert done.stdout == "X\n"


@pytest.mark.parametrize("module", ["beamline_client", "beamline_client.main", "beamline_client.cli"])
def test_the_client_does_not_import_what_only_others_need(module: str) -> None:
    heavy = {"torch", "numpy", "onnxruntime", "prometheus_client", "beamline_server", "beamline_export"}
    script = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"

    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""


def test_everything_public_is_there() -> None:
    import beamline_client

    assert sorted(beamline_client.__all__) == beamline_client.__all__
    assert all(hasattr(beamline_client, name) for name in beamline_client.__all__)
