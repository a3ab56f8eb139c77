"""`benchmarks/gpu.py` runs: its dry run goes the same ways with tiny sizes on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROOTS = ("server", "export", "client", "protos")


def test_every_part_of_the_dry_run_is_done(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--device", "cpu", "--in-process"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(REPOSITORY / root) for root in ROOTS)}

    done = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True, check=False, timeout=240
    )

    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert len(results) == 15
    assert [line[:6] for line in results["smoke"]["result"]["lines"]] == ["ok    "] * 8
    parity = results["parity"]["result"]
    assert parity["graphs"]["same_bits_again"] == parity["searches"]
    assert parity["graphs"]["captured"] > 0
    assert parity["beyond_near_ties"] == 0
    assert results["profile"]["result"]["no_memcpy_nodes"]
    assert all(row["captured"] for row in results["steps"]["result"]["steps"] if row["graphs"])
    assert [row["batch"] for row in results["offline"]["result"]["batches"]] == [1, 2]
    assert results["online"]["result"]["throughput"]["answered_per_s"] > 0
    table = (tmp_path / "results.md").read_text("utf-8")
    assert "figures mean nothing" in table
    assert "| 16 |" in table
