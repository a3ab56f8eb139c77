"""A contender as the bench sees it: a process that is asked and answers."""

import contextlib
import json
import os
import re
import select
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BENCHMARKS = Path(__file__).parents[1]
ANSWER_WITHIN_S = 900
QUIET = {
    "GRPC_VERBOSITY": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""As Beamline's image has it (docs/performance.md), and then for everybody. It also makes processes more alike: which
pages of 4 KB the weights come to lie in is a matter of luck."""


class ContenderFailed(Exception):
    """A contender ended, or did not answer in time; the text has the last line of what it said."""


def environment() -> dict[str, str]:
    """The variables of a worker's process: this package can be imported, libraries keep quiet, pages are huge."""
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **QUIET, **HUGE_PAGES, "PYTHONPATH": path}


class ContenderProcess:
    """A worker (worker.py). Leaving its `with` block ends it.

    Args:
        python: Interpreter of the contender's environment.
        spec: For `worker.make_translator`.
        variables: To add to its environment.
    """

    def __init__(self, python: Path, spec: Mapping[str, Any], variables: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close
        self.process = subprocess.Popen(
            [str(python), "-m", "offline.worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**environment(), **variables},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something and wait for the answer.

        Raises:
            ContenderFailed: there is none.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise ContenderFailed(self._last_words()) from error
        if not select.select([self.process.stdout], [], [], ANSWER_WITHIN_S)[0]:
            raise ContenderFailed(f"no answer to {command} within {ANSWER_WITHIN_S} s")
        line = self.process.stdout.readline()
        if not line:
            raise ContenderFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end; kill it if it does not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        self.process.wait(30)
        self._errors.seek(0)
        return last_words(self._errors.read()) or f"ended with status {self.process.returncode}"


def last_words(text: str) -> str:
    """The last line that says something, without addresses and without the folders of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"(?<![\w.])/(?:[^\s/'\",:]+/)+", "", re.sub(r"\w+://\S+", "…", lines[-1])) if lines else ""
