"""The `beamline` command: finds the sub-command, loads it and nothing else, and runs it."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

ENTRY_POINT_GROUP = "beamline.commands"

_DISTRIBUTION = "beamline-serving"
"""What pip calls this project; `beamline` on PyPI is somebody else's."""

BUILT_IN: Mapping[str, str] = {
    "compile": "beamline_server.compile_cli:main",
    "export": "beamline_export.cli:main",
    "inspect": "beamline_server.inspect_cli:main",
    "load": "beamline_client.load.cli:main",
    "serve": "beamline_server.app:main",
    "translate": "beamline_client.cli:main",
}
"""The sub-commands of a source tree that is not installed; the package metadata has the same."""


@dataclass(frozen=True, slots=True)
class _About:
    """What is known of a sub-command without loading it."""

    summary: str
    extras: str
    """Extras of the distribution that it needs, in brackets; empty for none."""


_ABOUT: Mapping[str, _About] = {
    "compile": _About("compile the engine's loops before the first start", "[server]"),
    "export": _About("write a PyTorch checkpoint as a bundle that the server reads", "[export,server]"),
    "inspect": _About("check a bundle and tell what is in it", "[server]"),
    "load": _About("put a server under load and measure it", "[load]"),
    "serve": _About("serve a bundle over gRPC", "[server]"),
    "translate": _About("send texts to a server and print what comes back", ""),
}

_EXIT_BAD_USAGE = 2
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
_EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class _OutputLost(Exception):
    """What a command has printed cannot be written; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `beamline` and returns its exit status."""
    return run(sys.argv[1:] if argv is None else argv, available_commands())


def available_commands() -> dict[str, metadata.EntryPoint]:
    """The sub-commands by name: from the package metadata, or the built-in ones if there is no metadata."""
    installed = metadata.entry_points(group=ENTRY_POINT_GROUP)
    built_in = [metadata.EntryPoint(name, target, ENTRY_POINT_GROUP) for name, target in BUILT_IN.items()]
    return {command.name: command for command in sorted(installed or built_in, key=lambda command: command.name)}


def run(argv: Sequence[str], commands: Mapping[str, metadata.EntryPoint]) -> int:
    """Runs one of these sub-commands.

    Returns:
        What the sub-command returns; 2 if it is unknown or something that it needs is not installed; 130 after Ctrl-C.
    """
    if sys.stdout is None:  # closed by who started us, who so wants no output
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        try:
            return _dispatch(argv, commands)
        finally:
            _flush_stdout()  # also after --help, which raises SystemExit
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        _silence_stdout()
        return _EXIT_BROKEN_PIPE
    except _OutputLost as error:
        _silence_stdout()
        return _refuse(f"stdout cannot be written: {error}")


def _dispatch(argv: Sequence[str], commands: Mapping[str, metadata.EntryPoint]) -> int:
    if not argv or argv[0].startswith("-"):
        parser = _parser(commands)
        parser.parse_args(argv)  # --help, --version and unknown options end here
        return _refuse(f"name a command: {', '.join(commands)}; `beamline --help` tells what they do")
    name, *arguments = argv
    if name not in commands:
        return _refuse(f"unknown command {name!r}; there are: {', '.join(commands)}")
    try:
        status: int = commands[name].load()(arguments)
    except ModuleNotFoundError as error:
        return _refuse(_missing_module(name, error))
    return status


def _parser(commands: Mapping[str, metadata.EntryPoint]) -> argparse.ArgumentParser:
    width = max((len(name) for name in commands), default=0)
    lines = [
        f"  {name:<{width}}  {_ABOUT[name].summary if name in _ABOUT else command.value}"
        for name, command in commands.items()
    ]
    parser = argparse.ArgumentParser(
        prog="beamline",
        usage="beamline [--help] [--version] COMMAND ...",
        description="Serve sequence-to-sequence Transformers.",
        epilog="\n".join(["commands:", *lines, "", "`beamline COMMAND --help` tells more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"beamline {_version()}")
    return parser


def _version() -> str:
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _missing_module(command: str, error: ModuleNotFoundError) -> str:
    missing = f"{command} needs the module {error.name!r}, which is not installed"
    if command not in _ABOUT:
        return f"{missing}; install what brings {command} again"
    extras = _ABOUT[command].extras
    return (
        f"{missing}; install {_DISTRIBUTION}{extras}: pip install '.{extras}' in a checkout of Beamline, "
        f"or pip install 'FILE{extras}' with its wheel file"
    )


def _refuse(message: str) -> int:
    sys.stderr.write(f"beamline: {message}\n")
    return _EXIT_BAD_USAGE


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _OutputLost(error.strerror) from error


def _silence_stdout() -> None:
    # What is still buffered would raise once more when the interpreter flushes it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
