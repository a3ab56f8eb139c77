"""Time of a decoder step over its rows, by single kernels and by captured graphs, beside its floor."""

import math
import time
from typing import Any

from beamline_server.bundle import Bundle
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.ort.cuda.buckets import FromBatch, FromEncoder, Origin
from beamline_server.engine.ort.cuda.captured_graphs import CAPTURED_FROM_USE
from beamline_server.graphs import DECODER_STEP
from gpu_parts.batches import SLOTS, busy_step, filled
from gpu_parts.setting import Setting, median


def steps(setting: Setting) -> dict[str, Any]:
    """Of the first random model."""
    return _steps(setting, setting.names[1])


def large_steps(setting: Setting) -> dict[str, Any]:
    """Of the random model with the large vocabulary."""
    return _steps(setting, setting.names[2])


def _steps(setting: Setting, name: str) -> dict[str, Any]:
    bundle = setting.bundle(name, "fp16")
    weights = weight_bytes(bundle)
    limits, kernels = setting.result("limits"), setting.result("kernels")
    table = []
    for graphs in (False, True):
        backend = setting.backend(name, graphs=graphs)
        for rows in setting.scale.rows:
            row = {"rows": rows, "graphs": graphs, **_time(setting, backend, bundle, rows)}
            row["kv_bytes"] = kv_bytes(bundle, rows, setting)
            table.append({**row, **(floor(row, weights, limits, kernels) if limits else {})})
    admission = _admission(setting, setting.backend(name), bundle)
    return {"model": name, "weight_bytes": weights, "steps": table, "admission": admission}


def _time(setting: Setting, backend: CudaBackend, bundle: Bundle, rows: int) -> dict[str, Any]:
    step = busy_step(bundle, rows, setting.scale.beams, setting.scale.source_tokens)
    vocabulary = bundle.manifest.dimensions.source_vocabulary
    memory = filled(backend, setting.random_sources(vocabulary, len(step.members)))
    for _ in range(CAPTURED_FROM_USE + 2):
        step.run(memory)
    whole, device_alone = [], []
    run = step.bound(memory)
    for _ in range(setting.scale.repetitions):
        began = time.perf_counter()
        step.run(memory)
        whole.append(time.perf_counter() - began)
        began = time.perf_counter()
        backend.step_graphs.run(run)
        device_alone.append(time.perf_counter() - began)
    return {
        "step_us": median(whole) * 1e6,
        "step_p90_us": sorted(whole)[len(whole) * 9 // 10] * 1e6,
        "run_us": median(device_alone) * 1e6,
        "captured": run.graph is not None,
    }


def _admission(setting: Setting, backend: CudaBackend, bundle: Bundle) -> dict[str, Any]:
    """Encoding a few newcomers, and arranging them among many."""
    vocabulary = bundle.manifest.dimensions.source_vocabulary
    there = max(setting.scale.batches)
    newcomers = min(4, there)
    sources = setting.random_sources(vocabulary, there)
    width = setting.scale.source_tokens
    memory = filled(backend, sources)
    encode, arrange = [], []
    for _ in range(setting.scale.repetitions):
        began = time.perf_counter()
        encoded = backend.encode(sources[:newcomers])
        encode.append(time.perf_counter() - began)
        origins: list[Origin] = [FromEncoder(encoded, i) for i in range(newcomers)]
        origins += [FromBatch(number) for number in range(newcomers, there)]
        began = time.perf_counter()
        memory.arrange(origins, slots=SLOTS, source_width=width)
        arrange.append(time.perf_counter() - began)
        del encoded, origins
    return {
        "sentences": there,
        "newcomers": newcomers,
        "encode_us": median(encode) * 1e6,
        "arrange_us": median(arrange) * 1e6,
    }


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of weights that a decoder step reads: embedding and position tables by their rows, so not at all.

    The head is kept in fp32 on the device, twice what the file has.
    """
    import onnx

    graph = onnx.load(str(bundle.file(DECODER_STEP)), load_external_data=False).graph
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}
    total = 0
    for tensor in graph.initializer:
        size = int(math.prod(tensor.dims)) * (2 if tensor.data_type == onnx.TensorProto.FLOAT16 else 4)
        if tensor.name in cast:
            total += 2 * size
        elif tensor.name not in gathered:
            total += size
    return total


def kv_bytes(bundle: Bundle, rows: int, setting: Setting) -> int:
    """Bytes of keys and values that a step of `busy_step` has to read."""
    dimensions = bundle.manifest.dimensions
    sentences = max(1, rows // setting.scale.beams)
    return 2 * 2 * dimensions.decoder_layers * dimensions.d_model * sentences * (SLOTS + setting.scale.source_tokens)


def floor(row: dict[str, Any], weights: int, limits: dict[str, Any], kernels: dict[str, Any] | None) -> dict[str, Any]:
    """What the step's bytes and its launches take at least, and how far it is above that.

    Bytes over the measured bandwidth; launches times what an empty kernel takes in a graph, or alone without one. The
    two overlap at best, so the floor is the larger one.
    """
    memory_us = (weights + row["kv_bytes"]) / limits["copy_bytes_per_s"] * 1e6
    each_us = (limits["graph_launch_us"] if row["graphs"] else None) or limits["launch_us"]
    launches = kernels["launches_per_step"] if kernels else 0
    launches_us = launches * each_us
    return {
        "floor_memory_us": memory_us,
        "floor_launches_us": launches_us,
        "over_memory_floor": row["step_us"] / memory_us,
        "over_floor": row["step_us"] / max(memory_us, launches_us),
    }
