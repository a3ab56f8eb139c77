"""What the machine is, and what it can do at best: memory bandwidth, and the time of one launch."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from gpu_parts.setting import Setting, median

_LAUNCHES = 1000


def machine(setting: Setting) -> dict[str, Any]:
    """Names and versions."""
    import onnxruntime
    import torch
    import transformers

    figures: dict[str, Any] = {
        "gpu": None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "onnxruntime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "nvidia_smi": _nvidia_smi(),
        }
    return figures


def _nvidia_smi() -> str:
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, check=False, timeout=30
        )
    except OSError as error:
        return str(error)
    return done.stdout.strip()


def limits(setting: Setting) -> dict[str, Any]:
    """Bytes per second of a copy, read and written ones both counted; microseconds of a kernel that does nothing."""
    import torch

    size = setting.scale.copy_mib * 2**20
    source = torch.zeros(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        setting.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        setting.synchronize()
        times.append(time.perf_counter() - began)
    figures = {"copy_bytes_per_s": 2 * size / min(times[2:])}
    return figures | _launches(setting)


def _launches(setting: Setting) -> dict[str, Any]:
    import torch

    value = torch.zeros(1, device=setting.device)

    def launch_all() -> None:
        for _ in range(_LAUNCHES):
            value.add_(1)

    def timed(run: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            setting.synchronize()
            began = time.perf_counter()
            run()
            setting.synchronize()
            times.append(time.perf_counter() - began)
        return median(times) / _LAUNCHES * 1e6

    figures: dict[str, Any] = {"launch_us": timed(launch_all), "graph_launch_us": None}
    if setting.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch_all()
        figures["graph_launch_us"] = timed(graph.replay)
    return figures
