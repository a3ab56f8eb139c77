"""Everything that has to be measured on a GPU, in one run of less than eight minutes.

    PYTHONPATH=server:export:client:protos python benchmarks/gpu.py --out results [--budget-s 450]

First comes a smoke test (`--only smoke`: at most two minutes, a line per check): whether sessions open, all nodes are
on the device, rows are moved, replays are the plain run's bits, and fp16 and fp32 agree with fp32 on the CPU. Then it
makes the bundles it needs, searches with fp16 on the GPU and fp32 on the CPU, tells which kernels run, and measures
steps, throughput offline and online, and transformers' `generate` beside it. Writes results.json and results.md after
every part; the exit status is how many parts failed or were skipped. Each part is a process of its own, so that one
that fails, hangs or breaks the GPU's context does not take the rest along.

`--device cpu` is a dry run of the same code with tiny sizes: its figures mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement.

    Attributes:
        name: Of the part and of its files.
        function: module:function below gpu_parts.
        limit_s: When it is ended.
        least_s: It does not start with less time left.
    """

    name: str
    function: str
    limit_s: float = 90
    least_s: float = 15


PARTS = (
    Part("smoke", "smoke:smoke", 120, 20),
    Part("machine", "machine:machine", 60, 5),
    Part("limits", "machine:limits", 60, 10),
    Part("bundles", "bundles:bundles", 200, 60),
    Part("parity", "parity:parity", 90, 30),
    Part("kernels", "kernels:kernels", 90, 25),
    Part("steps", "steps:steps", 90, 25),
    Part("offline", "offline:offline", 90, 25),
    Part("transformers", "offline:transformers_generate", 90, 25),
    Part("test_file", "offline:test_file", 60, 20),
    Part("profile", "kernels:profile", 60, 20),
    Part("online", "online:online", 120, 45),
    Part("transformers_test_file", "offline:transformers_test_file", 60, 25),
    Part("large_bundle", "bundles:large_bundle", 120, 60),
    Part("large_steps", "steps:large_steps", 90, 30),
)
# Started by the part `kernels` with another environment.
_CHILD = Part("kernels-child", "kernels:kernels_child")


def main(argv: Sequence[str]) -> int:
    """Run; returns how many parts failed or were skipped."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out.absolute()
    work: Path = (arguments.work or out / "work").absolute()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in (*PARTS, _CHILD) if part.name in arguments.only] if arguments.only else PARTS
    ends_at = time.monotonic() + arguments.budget_s
    # Some parts again: the others keep what they had.
    results: dict[str, Any] = _read(out) if arguments.only else {}
    for part in chosen:
        left = ends_at - time.monotonic()
        print(f"{part.name} … ({left:.0f} s left)", flush=True)
        began = time.monotonic()
        if arguments.in_process:
            outcome = _here(part, arguments.device, out, work)
        elif left < part.least_s:
            outcome = {"ok": False, "error": f"skipped: {left:.0f} s were left"}
        else:
            outcome = _apart(part, arguments.device, out, work, limit_s=min(part.limit_s, left))
        results[part.name] = {**outcome, "seconds": time.monotonic() - began}
        for line in outcome.get("result", {}).get("lines", ()):
            print(f"  {line}")
        print(f"  {'done' if outcome['ok'] else outcome['error'].strip()[-600:]}", flush=True)
        if part is not _CHILD and not (arguments.in_process and arguments.only):
            _write(out, results)
    return sum(not results[part.name]["ok"] for part in chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and bundles, used again if they are there")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    parser.add_argument("--budget-s", type=float, default=450, help="start no part later (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--in-process", action="store_true", help="all parts in this process, without time limits")
    return parser


def _here(part: Part, device: str, out: Path, work: Path) -> dict[str, Any]:
    """Run a part in this process."""
    try:
        result = _measure(part, device, out, work)
    except Exception:  # whatever it was, the other parts go on
        return {"ok": False, "error": traceback.format_exc()}
    return {"ok": True, "result": result}


def _apart(part: Part, device: str, out: Path, work: Path, *, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own."""
    result = out / f"{part.name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--device", device, "--out", str(out), "--work", str(work)]
    command += ["--only", part.name, "--in-process"]
    log = out / f"{part.name}.log"
    with log.open("w", encoding="utf-8") as stream:
        # A session of its own, so that what it has started can be ended with it.
        child = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return {"ok": False, "error": f"ended after {limit_s:.0f} s; {_tail(log)}", **_written(result)}
    if status or not result.exists():
        return {"ok": False, "error": f"exit status {status}: {_tail(log)}", **_written(result)}
    return {"ok": True, **_written(result)}


def _written(result: Path) -> dict[str, Any]:
    """What a part has measured, be it all or some."""
    return {"result": json.loads(result.read_text("utf-8"))} if result.exists() else {}


def _tail(log: Path) -> str:
    return log.read_text("utf-8", errors="replace")[-1500:]


def _measure(part: Part, device: str, out: Path, work: Path) -> Any:
    """Run a part and write what it measured."""
    if device == "cuda":
        import torch  # noqa: F401 - before onnxruntime: it brings the CUDA libraries along
    from gpu_parts.setting import FULL, TINY, Setting

    module, _, function = part.function.partition(":")
    measure: Callable[[Setting], Any] = getattr(import_module(f"gpu_parts.{module}"), function)
    result = measure(Setting(device, out, work, FULL if device == "cuda" else TINY))
    (out / f"{part.name}.json").write_text(json.dumps(result, indent=1, default=float) + "\n", "utf-8")
    return result


def _read(out: Path) -> dict[str, Any]:
    file = out / "results.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found


def _write(out: Path, results: dict[str, Any]) -> None:
    from gpu_parts.tables import markdown

    (out / "results.json").write_text(json.dumps(results, indent=1, default=float) + "\n", "utf-8")
    (out / "results.md").write_text(markdown(results), "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
