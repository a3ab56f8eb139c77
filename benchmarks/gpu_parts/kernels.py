"""What a step is made of on the device: attention kernels, launches, copies between host and device."""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from beamline_server.bundle import Bundle
from beamline_server.engine.ort.cuda.backend import providers
from beamline_server.graphs import DECODER_STEP
from gpu_parts.batches import bare_step
from gpu_parts.setting import Setting

_DEBUG = "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"
_STEPS = 3


def profile(setting: Setting) -> dict[str, Any]:
    """Nodes of the step by operator and provider, from onnxruntime's profile and the graph that it runs."""
    import onnx
    import onnxruntime as ort

    bundle = setting.bundle(setting.names[1], "fp16")
    optimized = setting.work / "optimized.onnx"
    options = ort.SessionOptions()
    # Warnings: one of them tells of copies that the session had to add.
    options.log_severity_level = 2
    options.enable_mem_pattern = False
    options.enable_profiling = True
    options.profile_file_prefix = str(setting.work / "profile")
    options.optimized_model_filepath = str(optimized)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.bin")
    chosen = providers(setting.device, "fp16", graphs=False)
    session = ort.InferenceSession(str(bundle.file(DECODER_STEP)), options, providers=chosen, enable_fallback=0)
    run, shape, _kept = bare_step(setting, bundle, session, setting.scale.profile_rows)
    for _ in range(_STEPS):
        run.run(ort.RunOptions())
    trace = Path(session.end_profiling())
    nodes, kernels = _events(json.loads(trace.read_text("utf-8")))
    graph = onnx.load(str(optimized), load_external_data=False).graph
    operators = collections.Counter(node.op_type for node in graph.node)
    copies = sum(count for name, count in operators.items() if name.startswith("Memcpy"))
    not_on_device = {name: count for name, count in nodes.items() if setting.device == "cuda" and "CUDA" not in name}
    return {
        "rows": setting.scale.profile_rows,
        "shape": shape.axes(),
        "operators": dict(operators),
        "memcpy_nodes": copies,
        "no_memcpy_nodes": copies == 0,
        "nodes_not_on_the_device": not_on_device,
        "nodes_per_step": {name: count / _STEPS for name, count in nodes.most_common()},
        "device_kernels_in_trace": kernels,
    }


def _events(events: list[dict[str, Any]]) -> tuple[collections.Counter[str], int]:
    nodes: collections.Counter[str] = collections.Counter()
    kernels = 0
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[f"{arguments.get('op_name')} on {arguments.get('provider')}"] += 1
        elif event.get("cat") == "Kernel":
            kernels += 1
    return nodes, kernels


def kernels(setting: Setting) -> dict[str, Any]:
    """Attention kernels by node, as onnxruntime prints them when it is asked to before it starts; and all launches."""
    target = setting.out / "kernels-child.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).parents[1] / "gpu.py"), "--device", setting.device]
    command += ["--out", str(setting.out), "--work", str(setting.work), "--only", "kernels-child", "--in-process"]
    done = subprocess.run(
        command, env={**os.environ, _DEBUG: "1"}, capture_output=True, text=True, check=False, timeout=120
    )
    printed = done.stdout + done.stderr
    (setting.out / "kernels-child.log").write_text(printed, "utf-8")
    if not target.exists():
        raise RuntimeError(f"the process ended with {done.returncode}: {printed[-2000:]}")
    return {
        "attention": attention_kernels(printed),
        "attention_lines": sorted({line for line in printed.splitlines() if "SdpaKernel=" in line})[:60],
        **json.loads(target.read_text("utf-8")),
    }


def attention_kernels(printed: str) -> dict[str, str]:
    """Kernel by node, from lines such as `Operator=Attention Node=Attention_9 DataType=fp16 SdpaKernel=…`."""
    pattern = re.compile(r"Node=(\S+).*?SdpaKernel=(\S+)")
    return {match[1]: match[2] for match in map(pattern.search, printed.splitlines()) if match}


def kernels_child(setting: Setting) -> dict[str, Any]:
    """Runs some steps under PyTorch's profiler, which sees every launch of the process."""
    import onnxruntime as ort
    import torch

    bundle: Bundle = setting.bundle(setting.names[1], "fp16")
    options = ort.SessionOptions()
    options.enable_mem_pattern = False
    chosen = providers(setting.device, "fp16", graphs=False)
    session = ort.InferenceSession(str(bundle.file(DECODER_STEP)), options, providers=chosen, enable_fallback=0)
    run, _, _kept = bare_step(setting, bundle, session, setting.scale.profile_rows)
    for _ in range(_STEPS):
        run.run(ort.RunOptions())
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_STEPS):
            run.run(ort.RunOptions())
        setting.synchronize()
    on_device = [event for event in profiler.events() if "CUDA" in str(event.device_type)]
    names = collections.Counter(event.name for event in on_device)
    times: collections.Counter[str] = collections.Counter()
    for event in on_device:
        times[event.name] += event.time_range.elapsed_us()
    return {
        "launches_per_step": sum(names.values()) / _STEPS,
        "device_us_per_step": sum(times.values()) / _STEPS,
        "kernels": [
            {"name": name[:160], "per_step": names[name] / _STEPS, "us_per_step": us / _STEPS}
            for name, us in times.most_common(40)
        ],
    }
