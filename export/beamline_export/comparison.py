"""An export beside PyTorch: the two are in memory one after the other, so that either may need the machine's memory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_export.expectation_check import ExpectedOutputs
from beamline_export.parity import (
    Probe,
    check_contract,
    check_parity,
    exported_answers,
    forced_decodes,
    random_sources,
)
from beamline_export.progress import Progress
from beamline_export.reference import Reference
from beamline_export.spec import ExportError
from beamline_server.allocator import give_back_freed
from beamline_server.bundle import Bundle, BundleError
from beamline_server.engine.backend import Backend
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.graphs import GraphSpec
from beamline_server.models.forced import forced_decode
from beamline_server.models.load import DeviceError, build_backend, choose_device, usable_cores

_GOLDEN_INPUTS = 3
_GOLDEN_STEPS = 8
_LONGEST_PROBE = 40


def compare(
    bundle: Bundle,
    contracts: dict[str, GraphSpec],
    load_reference: Callable[[], Reference],
    expected: ExpectedOutputs | None,
    in_fp32: dict[str, Any] | None,
    progress: Progress,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare a bundle with the PyTorch model and with expected outputs.

    What the graphs give is kept, and the graphs are gone before the PyTorch model is loaded.

    Args:
        bundle: Its files are there; its manifest is a draft.
        contracts: Of its graphs.
        load_reference: Loads the PyTorch model.
        expected: Outputs that the bundle has to give, if any are given.
        in_fp32: How they compare in fp32; None where the bundle is fp32 itself.
        progress: Shows how far it is.

    Returns:
        Figures, and golden inputs, both for the manifest.

    Raises:
        ExportError: what is exported does not agree, or cannot be loaded.
    """
    with progress.step("load the exported model"):
        check_contract(bundle, contracts)
        probe = _probe(bundle)
        whole_step = _by_whole_step(bundle, probe)
        give_back_freed()
        backend = load_backend(bundle)
    with progress.step("run the exported model"):
        answers = exported_answers(bundle, backend, whole_step, probe)
        usable = answers.are_numbers
        golden = [_golden(bundle, backend, number) for number in range(_GOLDEN_INPUTS)] if usable else []
    told = _told(expected, in_fp32, backend, bundle.manifest.precision, progress) if expected and usable else _Told()
    del backend
    give_back_freed()
    with progress.step("load the PyTorch model"):
        reference = load_reference()
    figures = check_parity(bundle, answers, reference, probe, progress.iterate)
    if told.error is not None:
        raise told.error
    return figures | told.figures, golden


@dataclass(frozen=True, slots=True)
class _Told:
    """What comes of expected outputs: figures for the manifest, or an error, which counts if PyTorch agrees."""

    figures: dict[str, Any] = field(default_factory=dict)
    error: ExportError | None = None


def _told(
    expected: ExpectedOutputs,
    in_fp32: dict[str, Any] | None,
    backend: Backend,
    precision: str,
    progress: Progress,
) -> _Told:
    try:
        if in_fp32 is None:
            return _Told({"expected": expected.check(backend, progress.iterate)})
        same = expected.count_same(backend, progress.iterate)
    except ExportError as error:
        return _Told(error=error)
    return _Told({"expected": {**in_fp32, f"same_in_{precision}": same}})


def load_backend(bundle: Bundle) -> Backend:
    """fp16 is compared on the GPU it is meant for where there is one, else through the CPU's casts."""
    precision = bundle.manifest.precision
    device = choose_device("auto", precision) if precision == "fp16" else "cpu"
    try:
        return build_backend(bundle, device, threads=usable_cores(), mapped=True)
    except (BundleError, DeviceError) as error:
        raise ExportError(f"the exported model cannot be loaded: {error}") from error


def _by_whole_step(bundle: Bundle, probe: Probe) -> NDArray[np.float32] | None:
    """Of a bundle that has the decoder in pieces and whole: what a GPU would compute, on the CPU.

    Nothing of it stays loaded, so that the weights are in memory once at a time.
    """
    if bundle.manifest.precision != "fp32" or bundle.manifest.dimensions.decoder_only:
        return None
    return forced_decodes(bundle, CudaBackend(bundle, device="cpu", threads=usable_cores(), mapped=True), probe)


def _probe(bundle: Bundle) -> Probe:
    dimensions, usual = bundle.manifest.dimensions, Probe(())
    longest = min(_LONGEST_PROBE, dimensions.max_source_tokens)
    if not dimensions.decoder_only:
        return Probe(random_sources(dimensions.source_vocabulary, bundle.manifest.special_tokens.source_eos, longest))
    # Of few positions, half are for what follows the prompt.
    longest = min(longest, max(1, dimensions.max_target_tokens // 2))
    rest = dimensions.max_target_tokens - longest
    prompts = random_sources(dimensions.source_vocabulary, None, longest)
    lengths = min(usual.forced_length, rest), min(usual.search_length, rest)
    return Probe(prompts, forced_length=lengths[0], search_length=lengths[1])


def _golden(bundle: Bundle, backend: Backend, seed: int) -> dict[str, Any]:
    """A forced decode along the model's own greedy path, as this machine computes it."""
    dimensions, tokens = bundle.manifest.dimensions, bundle.manifest.special_tokens
    longest, steps = min(8 + 8 * seed, dimensions.max_source_tokens), min(_GOLDEN_STEPS, dimensions.max_target_tokens)
    if dimensions.decoder_only:
        longest = min(longest, max(1, dimensions.max_target_tokens // 2))
        steps = min(steps, dimensions.max_target_tokens - longest)
    source = random_sources(dimensions.source_vocabulary, tokens.source_eos, longest, count=4, seed=seed)[-1]
    forced = [tokens.decoder_start]
    for _ in range(steps - 1):
        forced.append(forced_decode(backend, source, tuple(forced))[0][-1])
    _, top_logprob = forced_decode(backend, source, tuple(forced))
    return {
        "source": list(source),
        "forced": forced,
        "top_logprob": [float(np.float32(value)) for value in top_logprob],
    }
