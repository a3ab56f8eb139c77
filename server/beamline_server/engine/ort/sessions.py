"""Sessions of a bundle's graphs, and the names of what is fed to them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from beamline_server.bundle import DECODER_STEP, ENCODER, WEIGHTS, Bundle

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
SPIN_US = 300
"""How long a thread without work stays awake, in microseconds: about as long as the host takes between two steps
(docs/performance.md)."""
ENCODER_INPUTS = ("ids", "positions", "row_of", "back", "source_length")
"""What the graph calls the fields of `pack.EncoderInputs`, in their order."""
STEP_INPUTS = ("ids", "positions", "slot", "row_of", "back", "ancestors", "source_length")
"""What the graph calls the fields of `pack.StepInputs`, in their order."""
_VNNI = frozenset({"avx_vnni", "avx512_vnni"})
_SILENT = 4
"""onnxruntime's own lines are plain text among the JSON of the log, and what is wrong comes as an exception as well."""


def available_providers() -> list[str]:
    """Execution providers that this build of onnxruntime has."""
    return list(ort.get_available_providers())


def session_options(threads: int) -> ort.SessionOptions:
    """How every session of the engine runs, on so many threads.

    Of the options that could change numbers on a CPU, `session.set_denormal_as_zero` stays off, and
    `session.x64quantprecision` is on where int8 products would be summed wrongly. cuda.py has those of a GPU.
    """
    ort.set_default_logger_severity(_SILENT)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    # Shapes change from step to step: a pattern of one is no use for the next.
    options.enable_mem_pattern = False
    # Nodes take microseconds, and so does waking a thread: while steps follow each other it stays awake. For longer it
    # must not, since the front end has the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    exact = sums_int8_exactly(_processor())
    # Unsigned weights, which are summed in 32 bits everywhere; where signed ones are as well, those are twice as fast.
    options.add_session_config_entry("session.x64quantprecision", "0" if exact else "1")
    return options


def sums_int8_exactly(processor: str) -> bool:
    """Whether an x86 processor sums products of unsigned and signed bytes in 32 bits; without VNNI, 16 saturate.

    Args:
        processor: As /proc/cpuinfo describes it.
    """
    return not _VNNI.isdisjoint(processor.split())


@cache
def _processor() -> str:
    """What is known of it: nothing where there is no such file. Being exact then comes before being fast."""
    file = Path("/proc/cpuinfo")
    return file.read_text("utf-8", errors="replace") if file.exists() else ""


def open_session(
    bundle: Bundle, name: str, weights: bytes, providers: Sequence[Any], threads: int
) -> ort.InferenceSession:
    """A session of one graph of a bundle, which keeps what it needs of the content of the weights' file.

    Given a path, onnxruntime would map that file, and the process would die when somebody cuts it short.
    """
    options = session_options(threads)
    options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
    # On CPU the fused kernel is several times slower than its parts (onnxruntime 1.31).
    options.add_session_config_entry(
        "optimization.disable_specified_optimizers", "SkipLayerNormFusion;BiasSkipLayerNormFusion"
    )
    # Without fallback: it would print, and compute on the CPU what was meant for the GPU.
    return ort.InferenceSession(bundle.read(name), options, providers=list(providers), enable_fallback=0)


_ELEMENT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}

Values = dict[str, tuple[str, list[str | int]]]
"""Inputs or outputs of a graph: element type and axes by name."""


def read_values(bundle: Bundle, name: str) -> tuple[Values, Values]:
    """Inputs and outputs of one graph of a bundle, as onnxruntime reads them before it changes anything."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(bundle.file(name)), options, providers=[CPU])
    sides = (session.get_inputs(), session.get_outputs())
    inputs, outputs = ({v.name: (_ELEMENT_TYPES[v.type], list(v.shape)) for v in values} for values in sides)
    return inputs, outputs


class Sessions:
    """The encoder and the decoder step of a bundle."""

    def __init__(self, bundle: Bundle, providers: Sequence[Any], threads: int) -> None:
        layers = range(bundle.manifest.dimensions.decoder_layers)
        self.width = bundle.manifest.dimensions.d_model
        self.self_names = [f"self_{kind}_{i}" for i in layers for kind in ("k", "v")]
        self.cross_names = [f"cross_{kind}_{i}" for i in layers for kind in ("k", "v")]
        weights = bundle.read(WEIGHTS)
        self.encoder = open_session(bundle, ENCODER, weights, providers, threads)
        self.decoder = open_session(bundle, DECODER_STEP, weights, providers, threads)
        types = {value.name: value.type for value in self.decoder.get_inputs()}
        self.dtype: type[np.generic] = np.float16 if types[self.self_names[0]] == "tensor(float16)" else np.float32
        self.vocabulary = bundle.manifest.dimensions.target_vocabulary
