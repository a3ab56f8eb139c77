"""Sessions of a bundle's graphs through onnxruntime's Python interface."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from beamline_server.bundle import Bundle
from beamline_server.engine.ort.settings import CPU, settings
from beamline_server.engine.ort.weights import Weights, shared_arrays, weights_in_turn
from beamline_server.graph_file import read_graph
from beamline_server.graphs import DECODER_STEP, ENCODER
from beamline_server.manifest import WEIGHTS

_SILENT = 4
"""onnxruntime's own lines are plain text among the JSON of the log, and what is wrong comes as an exception as well."""


def session_options(threads: int) -> ort.SessionOptions:
    """How every session through the Python interface runs, on so many threads."""
    ort.set_default_logger_severity(_SILENT)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    # Shapes change from step to step: a pattern of one is no use for the next.
    options.enable_mem_pattern = False
    for key, value in settings(threads).items():
        options.add_session_config_entry(key, value)
    return options


class _Session(ort.InferenceSession):  # type: ignore[misc]  # onnxruntime comes without types
    """A session, with the weights that it reads where they are."""

    shared: Mapping[str, ort.OrtValue]


def _open_session(
    name: str, graph: bytes, weights: Weights, providers: Sequence[Any], threads: int
) -> ort.InferenceSession:
    """A session of one graph of a bundle, which keeps what it needs of the content of the weights' file.

    Given a path, onnxruntime would map that file, and the process would die when somebody cuts it short.
    """
    options = session_options(threads)
    options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights.content], [len(weights.content)])
    session = _session(graph, options, weights.read_for(name), providers)
    weights.drop(name)
    return session


def _session(
    graph: bytes | str, options: ort.SessionOptions, arrays: Mapping[str, NDArray[Any]], providers: Sequence[Any]
) -> ort.InferenceSession:
    """A session of a graph, given by its content or its path, that reads these weights where they are."""
    # A GPU has weights of its own.
    on_cpu = all(provider == CPU for provider in providers)
    shared = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in arrays.items()} if on_cpu else {}
    for key, value in shared.items():
        options.add_initializer(key, value)
    # Without fallback: it would print, and compute on the CPU what was meant for the GPU.
    session = _Session(graph, options, providers=list(providers), enable_fallback=0)
    session.shared = shared
    return session


def _mapped_sessions(
    bundle: Bundle, names: Sequence[str], providers: Sequence[Any], threads: int
) -> Iterator[ort.InferenceSession]:
    """Sessions of graphs of a bundle that map the file of weights: they copy nothing, and trust that it stays.

    Weights are not laid out anew for the kernels either, which would copy them all.
    """
    files = {name: read_graph(bundle.read(name)) for name in names}
    content = np.memmap(bundle.file(WEIGHTS), np.uint8, "r")
    for name in names:
        arrays = shared_arrays(files, name, content)
        options = session_options(threads)
        options.add_session_config_entry("session.disable_prepacking", "1")
        yield _session(str(bundle.file(name)), options, arrays, providers)


class Sessions:
    """The encoder and the decoder step of a bundle.

    Args:
        bundle: Its graphs.
        providers: As `onnxruntime.InferenceSession` takes them.
        threads: To compute a node on.
        mapped: Whether the file of weights is mapped, which takes least memory; it must not change meanwhile.
    """

    def __init__(self, bundle: Bundle, providers: Sequence[Any], threads: int, *, mapped: bool = False) -> None:
        layers = range(bundle.manifest.dimensions.decoder_layers)
        self.width = bundle.manifest.dimensions.attention
        self.relative = bundle.manifest.dimensions.relative_positions is not None
        self.self_names = [f"self_{kind}_{i}" for i in layers for kind in ("k", "v")]
        self.cross_names = [f"cross_{kind}_{i}" for i in layers for kind in ("k", "v")]
        names = (ENCODER, DECODER_STEP)
        if mapped:
            self.encoder, self.decoder = _mapped_sessions(bundle, names, providers, threads)
        else:
            graphs = {name: bundle.read(name) for name in names}
            with weights_in_turn(bundle, graphs) as weights:
                self.encoder, self.decoder = (
                    _open_session(name, graph, weights, providers, threads) for name, graph in graphs.items()
                )
        types = {value.name: value.type for value in self.decoder.get_inputs()}
        self.dtype: type[np.generic] = np.float16 if types[self.self_names[0]] == "tensor(float16)" else np.float32
        self.vocabulary = bundle.manifest.dimensions.target_vocabulary
