"""`beamline compile`: has the engine's loops compiled before a server needs them, as where an image is built."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from beamline_server.engine.compiled import Ready, is_off, keeping_folder, make_ready, to_compile

_COMPILED = ("beamline_server.engine.step", "beamline_server.engine.ort.cpu", "beamline_server.engine.ort.cuda.memory")
"""Modules which, with those that they import, have all entry points."""
EXIT_NOT_COMPILED = 1
EXIT_SETTINGS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run `beamline compile` with these arguments; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="beamline compile",
        description="Compile the engine's loops and keep the machine code, beside the installed source or in the "
        "user's cache folder; otherwise the first start of a server does. Exit status: 0, or 1 if it cannot be kept.",
    )
    parser.add_argument("--check", action="store_true", help="compile nothing; exit status 1 if something is missing")
    arguments = parser.parse_args(argv)
    if is_off():
        return _refuse(EXIT_SETTINGS, "NUMBA_DISABLE_JIT is set, so that nothing is compiled; unset it")
    for module in _COMPILED:
        import_module(module)
    return _check() if arguments.check else _compile()


def _check() -> int:
    if missing := to_compile():
        return _refuse(EXIT_NOT_COMPILED, f"functions without machine code: {missing}; run `beamline compile`")
    sys.stdout.write("all functions have machine code\n")
    return 0


def _compile() -> int:
    ready = make_ready(_tell_compiling)
    if not ready.kept:
        return _refuse(
            EXIT_NOT_COMPILED,
            "the machine code is lost, since no folder for it can be written; run this as a user who may write beside "
            "the installed package, or set NUMBA_CACHE_DIR to a folder, here and for the server",
        )
    sys.stdout.write(_told(ready))
    return 0


def _told(ready: Ready) -> str:
    if not ready.compiled:
        return f"nothing to compile: {ready.loaded} functions have machine code\n"
    return f"compiled in {ready.seconds:.1f} s, kept in {keeping_folder()}\n"


def _tell_compiling(functions: int) -> None:
    sys.stdout.write(f"compiling {functions} functions of the engine; this takes up to a minute\n")
    sys.stdout.flush()


def _refuse(status: int, problem: str) -> int:
    sys.stderr.write(f"beamline compile: {problem}\n")
    return status
