"""The service under a closed loop: a real `beamline serve`, asked by `beamline load`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gpu_parts.setting import FR_EN, REPOSITORY, Setting

_START_S = 120.0
_LEAST_ROWS = 64
_GOLDEN = REPOSITORY / "tests" / "golden"


def online(setting: Setting) -> dict[str, Any]:
    """As many callers as fill the rows, all asking for the embedded model's test sentences with beam 4."""
    scale = setting.scale
    bundle, sentences = _what_to_serve(setting)
    rows = str(max(scale.callers * scale.beams, _LEAST_ROWS))
    serve = ["serve", str(bundle), "--device", setting.device, "--host", "127.0.0.1", "--grpc-port", "0"]
    serve += ["--metrics-port", "0", "--max-rows", rows, "--max-queue-rows", rows]
    log = setting.out / "serve.log"
    with log.open("w", encoding="utf-8") as stream:
        began = time.perf_counter()
        server = subprocess.Popen(_command(setting, serve), stdout=stream, stderr=stream, env=_environment())
        try:
            target, metrics = _wait_until_serving(server, log)
            start_s = time.perf_counter() - began
            status, made = _load(setting, target, metrics, sentences)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    samples = [sample for sample in made["server_samples"] if sample["rows_per_step"]]
    return {
        "start_s": start_s,
        "load_exit_status": status,
        "callers": scale.callers,
        "valid": made["verdict"]["valid"],
        "invalid_because": made["verdict"]["invalid_because"],
        "throughput": made["throughput"],
        "latency": {k: v for k, v in (made["latency"] or {}).items() if not isinstance(v, str)},
        "outcomes": made["outcomes"],
        "phases": {k: v.get("p50_ms") for k, v in made["phases"].items()},
        "rows_per_step": [sample["rows_per_step"] for sample in samples],
        "step_ms": [sample["step_ms"] for sample in samples],
    }


def _load(setting: Setting, target: str, metrics: str, sentences: Sequence[str]) -> tuple[int, Any]:
    """The exit status of `beamline load`, and its report."""
    scale, folder = setting.scale, setting.work / "load"
    load = ["load", "--server", target, "--metrics", metrics, "--quiet", "-o", str(folder), *sentences]
    load += ["--concurrency", str(scale.callers), "--beam", str(scale.beams)]
    load += ["--duration", f"{scale.online_s}s", "--warm-up", f"{scale.online_s // 4}s"]
    if setting.device == "cuda":
        load += ["--workers", "4", "--channels", "4"]
    done = subprocess.run(
        _command(setting, load, torch=False),
        capture_output=True,
        text=True,
        check=False,
        timeout=scale.online_s + 60,
        env=_environment(),
    )
    (setting.out / "load.log").write_text(done.stdout + done.stderr, "utf-8")
    return done.returncode, json.loads((folder / "report.json").read_text("utf-8"))


def _what_to_serve(setting: Setting) -> tuple[Path, list[str]]:
    """The bundle, and where its sentences are; a random model has no tokenizer, so an old small bundle stands in."""
    if setting.scale.embedded:
        return setting.bundle(FR_EN, "fp16").path, []
    texts = json.loads((_GOLDEN / "format4.json").read_text("utf-8"))["format4-fp32"]["texts"]
    file = setting.work / "sentences.txt"
    file.write_text("\n".join(case["text"] for case in texts if case["text"].strip()), "utf-8")
    return _GOLDEN / "format4-fp32", ["--sentences", str(file)]


def _command(setting: Setting, arguments: Sequence[str], *, torch: bool = True) -> list[str]:
    """The `beamline` command of this source tree; PyTorch first, since it brings the CUDA libraries along."""
    first = "import torch; " if torch and setting.device == "cuda" else ""
    code = f"{first}import sys; from beamline_client.main import main; sys.exit(main())"
    return [sys.executable, "-c", code, *arguments]


def _environment() -> dict[str, str]:
    """With the modules that this process found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _wait_until_serving(server: "subprocess.Popen[bytes]", log: Path) -> tuple[str, str]:
    """Where it answers calls, and where it tells its metrics."""
    ends_at = time.monotonic() + _START_S
    while time.monotonic() < ends_at and server.poll() is None:
        ports = _ports(log)
        if ports is not None and _serves(ports[0]):
            return ports
        time.sleep(0.1)
    raise RuntimeError(f"the server does not serve: {log.read_text('utf-8')[-2000:]}")


def _ports(log: Path) -> tuple[str, str] | None:
    for line in log.read_text("utf-8").splitlines():
        record = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
        if record.get("event") == "listening":
            return f"127.0.0.1:{record['grpc_port']}", f"http://127.0.0.1:{record['metrics_port']}/metrics"
    return None


def _serves(target: str) -> bool:
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
