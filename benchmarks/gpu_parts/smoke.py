"""Whether the device computes at all, in less than two minutes and before anything is measured: one line per check."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from beamline_export.parity import all_logprobs, random_sources
from beamline_server.bundle import Bundle
from beamline_server.engine.backend import StepResult
from beamline_server.engine.ort.cuda.backend import CudaBackend, providers
from beamline_server.engine.ort.cuda.captured_graphs import CAPTURED_FROM_USE
from beamline_server.engine.ort.cuda.fixed_run import DeviceBuffer
from beamline_server.engine.ort.cuda.provider import what_is_missing
from beamline_server.engine.ort.cuda.row_mover import RowMover
from beamline_server.engine.ort.sessions import session_options
from beamline_server.engine.ort.settings import CPU, CUDA
from beamline_server.graphs import DECODER_STEP, ENCODER, Precision
from gpu_parts.batches import busy_step, filled
from gpu_parts.bundles import make
from gpu_parts.parity import TOLERANCE
from gpu_parts.setting import FR_EN, Setting

PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")
TOLERANCES = {"fp16": TOLERANCE, "fp32": 1e-3}
"""How far log-probabilities may be from those of fp32 on the CPU; those of TF32 are further away than fp32's may be."""
_SENTENCES, _STEPS = 4, 8


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer."""

    name: str
    ok: bool
    found: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'} {self.name}: {self.found}"


class SmokeFailed(Exception):
    """Some checks failed; the text names them."""


def smoke(setting: Setting) -> dict[str, Any]:
    """Every check, and as lines; written after each of them, so that one that hangs does not take the others along.

    Raises:
        SmokeFailed: one or more failed.
    """
    checks: list[Check] = []
    told: dict[str, Any] = {}
    for check in run_checks(_questions(setting)):
        checks.append(check)
        told = {"lines": [str(each) for each in checks], "checks": [asdict(each) for each in checks]}
        (setting.out / "smoke.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    if failed := [check.name for check in checks if not check.ok]:
        raise SmokeFailed(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    return told


Question = Callable[[], tuple[bool, str]]


def run_checks(questions: Mapping[str, Question]) -> Iterator[Check]:
    """Ask one question after the other; one that raises has failed, and does not keep the others from being asked."""
    for name, ask in questions.items():
        began = time.perf_counter()
        try:
            ok, found = ask()
        except Exception as error:  # whatever it was, it is the answer
            ok, found = False, f"{type(error).__name__}: {str(error).strip()[:500]}"
        yield Check(name, ok, f"{found} ({time.perf_counter() - began:.1f} s)")


def _questions(setting: Setting) -> dict[str, Question]:
    """All of them, in the order in which they build on each other."""
    questions: dict[str, Question] = {
        "a device answers": lambda: _device(setting),
        "bundles are exported": lambda: _bundles(setting),
        "rows are moved": lambda: _rows(setting),
    }
    for precision in PRECISIONS:
        questions[f"{precision} nodes are on the device"] = partial(_placed, setting, precision)
        questions[f"{precision} agrees with fp32 on the CPU"] = partial(_agrees, setting, precision)
    questions["fp16 runs are captured, and replays are the plain run's bits"] = lambda: _replayed(setting)
    return questions


def _device(setting: Setting) -> tuple[bool, str]:
    if setting.device == "cpu":
        return True, "the CPU, for a dry run"
    missing = what_is_missing()
    return missing is None, missing or "provider, driver and GPU are there"


def _bundles(setting: Setting) -> tuple[bool, str]:
    """What other parts measure as well; an export checks itself on the device."""
    made = {name: entry for p in PRECISIONS for name, entry in make(setting, FR_EN, p).items()}
    problems = [f"{name}: {entry['failed_on_the_device']}" for name, entry in made.items()]
    failed = any(entry["failed_on_the_device"] for entry in made.values())
    return not failed, "; ".join(problems) if failed else ", ".join(made)


def _rows(setting: Setting) -> tuple[bool, str]:
    """Rows of one buffer get into another, and its other rows stay."""
    rows, width, take, put = 8, 64, np.array([1, 5]), np.array([0, 7])
    moved_by = providers(setting.device, "fp16", graphs=False)
    mover = RowMover(moved_by, device=setting.device, width=width, dtype=np.float16)
    content = np.random.default_rng(0).random((2, rows, width)).astype(np.float16)
    source, target = (DeviceBuffer(rows * width * 2, setting.device) for _ in content)
    for buffer, part in zip((source, target), content, strict=True):
        buffer.write(part.view(np.uint8).ravel())
    mover.move((source.address, rows), (target.address, rows), take, put)
    expected = content[1].copy()
    expected[put] = content[0][take]
    wrong = (target.read().view(np.float16).reshape(rows, width) != expected).any(axis=1)
    return not wrong.any(), f"{rows - wrong.sum()} of {rows} rows are right"


def _placed(setting: Setting, precision: Precision) -> tuple[bool, str]:
    bundle = setting.bundle(FR_EN, precision)
    return judged_placement(
        setting.device, {name: placement(setting, bundle, name) for name in (ENCODER, DECODER_STEP)}
    )


def placement(setting: Setting, bundle: Bundle, name: str) -> Counter[tuple[str, str]]:
    """Nodes of a graph by (execution provider, operator), as onnxruntime has divided them."""
    options = session_options(1)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = providers(setting.device, bundle.manifest.precision, graphs=False)
    session = ort.InferenceSession(str(bundle.file(name)), options, providers=chosen, enable_fallback=0)
    parts = session.get_provider_graph_assignment_info()
    return Counter((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())


def judged_placement(device: str, by_graph: Mapping[str, Counter[tuple[str, str]]]) -> tuple[bool, str]:
    """Whether no node is left to another provider than the device's; how many there are, or which are left."""
    own = {"cuda": CUDA, "cpu": CPU}[device]
    left = [f"{name}: {kind} on {where}" for name, nodes in by_graph.items() for where, kind in nodes if where != own]
    return not left, "; ".join(left) or ", ".join(f"{name}: all {n.total()}" for name, n in by_graph.items())


def _agrees(setting: Setting, precision: Precision) -> tuple[bool, str]:
    """Log-probabilities of all tokens along a path of random ones, compared where they are largest."""
    manifest = setting.bundle(FR_EN, "fp32").manifest
    source_ids, eos = manifest.dimensions.source_vocabulary, manifest.special_tokens.source_eos
    sources = random_sources(source_ids, eos, 12, count=_SENTENCES)
    vocabulary = manifest.dimensions.target_vocabulary
    path = np.random.default_rng(0).integers(4, vocabulary, (len(sources), _STEPS))
    path[:, 0] = manifest.special_tokens.decoder_start
    backend = CudaBackend(setting.bundle(FR_EN, precision), device=setting.device)
    expected, found = (all_logprobs(each, sources, path, vocabulary) for each in (setting.reference(), backend))
    best = expected.argmax(2)[..., None]
    difference = float(np.abs(np.take_along_axis(expected, best, 2) - np.take_along_axis(found, best, 2)).max())
    allowed = TOLERANCES[precision]
    return difference <= allowed, f"best log-probabilities differ by at most {difference:.1e} (allowed: {allowed:g})"


def _replayed(setting: Setting) -> tuple[bool, str]:
    """The same encoder call and the same step as often as it takes to capture and replay them, and once without."""
    plain, captured = (setting.backend(FR_EN, graphs=graphs) for graphs in (False, True))
    (expected,) = _results(setting, plain, 1)
    results = _results(setting, captured, CAPTURED_FROM_USE + 2)
    same = sum(
        np.array_equal(result.top_logprob, expected.top_logprob)
        and np.array_equal(result.top_token, expected.top_token)
        for result in results
    )
    graphs = len(captured.encoder_graphs), len(captured.step_graphs)
    found = f"{graphs[0]} + {graphs[1]} graphs; {same} of {len(results)} steps give the plain run's bits"
    return graphs == (1, 1) and same == len(results), found


def _results(setting: Setting, backend: CudaBackend, times: int) -> list[StepResult]:
    """A step, computed several times after its sentences were encoded several times."""
    bundle, scale = setting.bundle(FR_EN, "fp16"), setting.scale
    step = busy_step(bundle, scale.rows[1], scale.beams, scale.source_tokens)
    sources = setting.random_sources(bundle.manifest.dimensions.source_vocabulary, len(step.members))
    for _ in range(times - 1):
        backend.encode(sources)
    memory = filled(backend, sources)
    return [step.run(memory) for _ in range(times)]
