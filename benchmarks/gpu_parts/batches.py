"""Steps of one shape, and a bare decoder step without an engine around it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from beamline_server.bundle import Bundle
from beamline_server.engine.backend import StepResult
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.ort.cuda.buckets import FromEncoder, Origin
from beamline_server.engine.ort.cuda.fixed_run import DeviceBuffer, FixedRun, concrete
from beamline_server.engine.ort.cuda.memory import CudaMemory, pack_run
from beamline_server.engine.ort.cuda.shapes import LEAST_SOURCE_WIDTH, StepShape, batch_size, step_shape
from beamline_server.engine.pack import Extent, extent
from beamline_server.engine.table import IntArray, SequenceTable, Table
from beamline_server.models.load import model_rules
from gpu_parts.setting import Setting, Tokens

SLOTS = 64
"""Of every batch index: those of a short sentence's bucket, all of them in use."""


@dataclass(frozen=True, slots=True)
class BusyStep:
    """A step of sentences that fill their slots.

    Attributes:
        table: The sentences.
        members: Their indices.
        needed: By the step.
        candidates: C.
    """

    table: Table
    members: IntArray
    needed: Extent
    candidates: int

    def run(self, memory: CudaMemory) -> StepResult:
        """Compute it in a memory that has as many sentences."""
        return memory.run(self.table, self.members, self.needed, self.candidates, logprobs=False)

    def bound(self, memory: CudaMemory) -> FixedRun:
        """What it runs as."""
        return memory.run_for(self.needed, self.candidates, logprobs=False)


def busy_step(bundle: Bundle, rows: int, beams: int, source_tokens: int) -> BusyStep:
    """A step of sentences of which every beam descends from a share of the slots."""
    sentences, beams = max(1, rows // beams), min(rows, beams)
    rng = np.random.default_rng(0)
    vocabulary = bundle.manifest.dimensions.target_vocabulary
    running = SequenceTable(sentences, ())
    running.reserve(slots=SLOTS, steps=1)
    table = running.arrays
    ancestors = rng.random((sentences, beams, SLOTS)) < 0.4
    ancestors[..., :beams] = True
    table.ancestors[:, :beams, :SLOTS] = ancestors
    for sequence in table.sequences:
        sequence.rows, sequence.slots_end, sequence.source_length = beams, SLOTS, source_tokens
        sequence.token[:beams] = rng.integers(4, vocabulary, beams)
        sequence.position[:beams], sequence.slot[:beams] = source_tokens, range(beams)
    members = np.arange(sentences)
    candidates = model_rules(bundle.manifest).search.needed_candidates(beams, vocabulary)
    return BusyStep(table, members, extent(table, members), candidates)


def filled(backend: CudaBackend, sources: Sequence[Tokens]) -> CudaMemory:
    """A memory with these sentences in it."""
    width = max(map(len, sources))
    at_once = max(1, backend.encode_tokens // width)
    origins: list[Origin] = []
    for first in range(0, len(sources), at_once):
        part = sources[first : first + at_once]
        encoded = backend.encode(part)
        origins += [FromEncoder(encoded, i) for i in range(len(part))]
    memory = backend.new_memory()
    memory.arrange(origins, slots=SLOTS, source_width=width)
    return memory


def bare_step(setting: Setting, bundle: Bundle, session: Any, rows: int) -> tuple[FixedRun, StepShape, list[Any]]:
    """A decoder step of a session of one's own, with its inputs sent; what must be kept as long as it is used."""
    step = busy_step(bundle, rows, setting.scale.beams, setting.scale.source_tokens)
    sentences = len(step.members)
    shape = step_shape(
        step.needed,
        step.candidates,
        batch=batch_size(sentences),
        slots=SLOTS,
        source_width=LEAST_SOURCE_WIDTH,
        vocabulary=bundle.manifest.dimensions.target_vocabulary,
        logprobs=False,
    )
    buffers, elsewhere = [], {}
    for value in session.get_inputs():
        if value.name.startswith(("self_", "cross_")):
            size = int(np.prod(concrete(value.shape, shape.axes()))) * 2
            buffers.append(DeviceBuffer(size, setting.device))
            elsewhere[value.name] = buffers[-1].address
            if value.name.startswith("self_"):
                elsewhere[f"{value.name}_out"] = buffers[-1].address
    candidates = {"candidates": np.array([shape.candidates], np.int64)}
    run = FixedRun(session, setting.device, shape.axes(), elsewhere=elsewhere, host=candidates, without=("logprob",))
    pack_run(run, step.table, step.members, np.arange(1, sentences + 1))
    run.send()
    return run, shape, buffers
