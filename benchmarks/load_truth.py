"""Does `beamline load` tell the truth? Against a queue whose every latency can be computed.

    python benchmarks/load_truth.py [--rate 13] [--duration 180] [--service-ms 50] [--stall-ms 200] [--stall-every-s 30]

The server (fixed_server.py) has one worker, a fixed service time and a stall now and then. The latencies that an open
loop must report follow from the moments at which requests were sent, by the Lindley recursion (D. V. Lindley, 1952):
W' = max(0, W + S - A), with W the wait, S the service and A the time to the next request. The same load in a closed
loop hides the stall: while the server stands still, nobody sends. Exits with 1 if a percentile is off by more than 3 %.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BEAMLINE = Path(sys.executable).with_name("beamline")
PERCENTILES = ("50", "99", "99.9")
ALLOWED = 0.03


def load(folder: Path, port: str, *arguments: str) -> dict[str, Any]:
    """Run `beamline load` against the server and return its report; an INVALID run is an error."""
    command = [str(BEAMLINE), "load", "--server", f"127.0.0.1:{port}", "--metrics", "off", "--warm-up", "0s", "--quiet"]
    done = subprocess.run([*command, "-o", str(folder), *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"beamline load ended with {done.returncode}:\n{done.stdout}")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def sent_times(log: Path) -> npt.NDArray[np.float64]:
    """When each request was sent and when it was meant to be, ascending by the first, shape [n, 2], in seconds."""
    with log.open() as file:
        rows = sorted((float(row["sent_s"]), float(row["intended_s"])) for row in csv.DictReader(file))
    return np.array(rows)


def lindley(
    sent_s: npt.NDArray[np.float64], service_s: float, stall_s: float, every_s: float
) -> npt.NDArray[np.float64]:
    """Time from the send to the answer of every request, shape [n], in seconds.

    A request that starts its service when a stall is due waits for it as well.
    """
    times = np.zeros(len(sent_s))
    wait_s, stall_at = 0.0, sent_s[0] + every_s
    for i, now in enumerate(sent_s):
        stalled = stall_s > 0 and now + wait_s >= stall_at
        stall_at += every_s if stalled else 0.0
        times[i] = wait_s + service_s + (stall_s if stalled else 0.0)
        if i + 1 < len(sent_s):
            wait_s = max(0.0, times[i] - (sent_s[i + 1] - now))
    return times


def percentiles(values: npt.NDArray[np.float64]) -> list[float]:
    """Of times in seconds, in milliseconds: the smallest value that is not exceeded by so many percent."""
    return [float(np.percentile(values, float(p), method="inverted_cdf")) * 1000 for p in PERCENTILES]


def told(report: dict[str, Any], name: str = "latency") -> list[float]:
    """The same percentiles as reported."""
    return [report[name]["percentiles_ms"][p] for p in PERCENTILES]


def row(name: str, values: Sequence[float]) -> None:
    """A line of the table."""
    print(f"{name:<34}" + "".join(f"{value:12.2f}" for value in values), flush=True)


def main() -> int:
    """Compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=13.0)
    parser.add_argument("--duration", type=float, default=180.0)
    parser.add_argument("--service-ms", type=float, default=50.0)
    parser.add_argument("--stall-ms", type=float, default=200.0)
    parser.add_argument("--stall-every-s", type=float, default=30.0)
    arguments = parser.parse_args()
    flags = [
        f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in ("service_ms", "stall_ms", "stall_every_s")
    ]
    script = Path(__file__).with_name("fixed_server.py")
    with (
        tempfile.TemporaryDirectory() as name,
        subprocess.Popen([sys.executable, str(script), *flags], stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            port, folder = server.stdout.readline().strip(), Path(name)
            length = f"{arguments.duration}s"
            opened = load(
                folder,
                port,
                "--rate",
                str(arguments.rate),
                "--duration",
                length,
                "--request-log",
                str(folder / "log.csv"),
            )
            times = sent_times(folder / "log.csv")
            closed = load(folder, port, "--concurrency", "1", "--duration", length)
        finally:
            server.kill()
    computed_s = lindley(times[:, 0], arguments.service_ms / 1000, arguments.stall_ms / 1000, arguments.stall_every_s)
    truth = percentiles(computed_s + times[:, 0] - times[:, 1])
    off = [reported / true - 1 for reported, true in zip(told(opened), truth, strict=True)]
    print(
        f"{len(times)} requests at {arguments.rate:g}/s, service {arguments.service_ms:g} ms, a stall of "
        f"{arguments.stall_ms:g} ms every {arguments.stall_every_s:g} s\n"
    )
    print(f"{'latency, ms':<34}" + "".join(f"{'p' + p:>12}" for p in PERCENTILES))
    row("Lindley recursion", truth)
    row("open loop, reported", told(opened))
    row("  off by, %", [100 * share for share in off])
    row(f"closed loop, {closed['latency']['count']} requests", told(closed))
    return 1 if max(map(abs, off)) > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
