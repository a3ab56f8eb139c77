"""The three servers of the online comparison: made of the same weights, started alike, on the same cores."""

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from online_tuning import Batching

from beamline_server.process import ServerProcess

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "models" / "fr-en"
BEAM = 4
MAX_NEW_TOKENS = 128
"""More than the translation of the longest text needs. Of joined sentences, which it was not trained on, the model
leaves some out, and of others it repeats a part until it is stopped."""

# Run by this interpreter, whose environment may not be the one that has the `beamline` command.
_SERVE = (sys.executable, "-c", "import sys; from beamline_server.app import main; sys.exit(main())")
_EXPORT = (sys.executable, "-c", "import sys; from beamline_export.cli import main; sys.exit(main(sys.argv[1:]))")
_CONVERT = (sys.executable, str(HERE / "ct2_convert.py"))


class System(StrEnum):
    """What is compared."""

    CONTINUOUS = "continuous"
    REQUEST_LEVEL = "request-level"
    CTRANSLATE2 = "ctranslate2"


LABELS = {
    System.CONTINUOUS: "Beamline",
    System.REQUEST_LEVEL: "Beamline, request-level batching",
    System.CTRANSLATE2: "CTranslate2, dynamic batching",
}


@dataclass(frozen=True, slots=True)
class Models:
    """The same checkpoint for both engines.

    Attributes:
        bundle: Beamline's.
        ct2: CTranslate2's.
    """

    bundle: Path
    ct2: Path


def export_bundle(target: Path, precision: str) -> Path:
    """Export the embedded model; returns the bundle's folder. CalledProcessError if it fails."""
    command = [*_EXPORT, str(CHECKPOINT), "--output", str(target), "--precision", precision]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def convert_for_ct2(target: Path, precision: str) -> Path:
    """Convert the embedded model; returns the folder. CalledProcessError if it fails. Needs torch and transformers."""
    command = [*_CONVERT, str(CHECKPOINT), str(target), "--precision", precision]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def command(system: System, batching: Batching, models: Models) -> tuple[list[str], list[str]]:
    """The program of a server, and its flags.

    Args:
        system: Which one.
        batching: As it was tuned.
        models: What to serve.
    """
    # Rows for a whole batch; `max_rows` is also the widest beam's bound.
    flags = ["--workers", str(batching.workers), "--threads-per-worker", "1"]
    flags += ["--max-rows", str(BEAM * batching.max_batch)]
    if batching.max_delay_ms is None:
        return [*_SERVE], flags
    flags += ["--request-batch", str(batching.max_batch), "--request-batch-delay-ms", f"{batching.max_delay_ms:g}"]
    if system is System.REQUEST_LEVEL:
        return [*_SERVE], flags
    flags += ["--ct2-model", str(models.ct2)]
    flags += ["--part", str(batching.part)] if batching.part else []
    flags += ["--isa", batching.isa] if batching.isa else []
    return [sys.executable, str(HERE / "ct2_service.py")], flags


@contextmanager
def serving(system: System, batching: Batching, models: Models, cores: Collection[int]) -> Iterator[ServerProcess]:
    """A server on these cores, from its first moment on, that serves."""
    program, flags = command(system, batching, models)
    with on_cores(cores):
        server = ServerProcess(models.bundle, *flags, program=program)
    with server:
        server.wait_until_serving()
        yield server


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Keep this thread, and the processes that it starts, on these cores while the context lasts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def instruction_sets(cpuinfo: str) -> Sequence[str]:
    """Those to try with CTranslate2, which does not choose the widest one everywhere."""
    return ["AVX512"] if "avx512f" in cpuinfo.split() else []
