"""Batches of one shape, and a bare decoder step without an engine around it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from beamline_server.engine.batch import LEAST_QUERIES, encoder_batch, layout, step_batch
from beamline_server.engine.ort.padding import fill_step

from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Backend, Cache, FromEncoder, StepBatch
from beamline_server.engine.ort.cuda.fixed_run import DeviceBuffer, FixedRun, concrete
from beamline_server.engine.ort.cuda.shapes import LEAST_SOURCE_WIDTH, StepShape, seat_count, step_shape
from beamline_server.engine.step import ENCODE_TOKENS
from beamline_server.models.load import model_rules
from gpu_parts.setting import Setting, Tokens

SLOTS = 64
"""Of every seat: those of a short sentence's lane, all of them in use."""


def busy_batch(bundle: Bundle, rows: int, beams: int, source_tokens: int) -> StepBatch:
    """A step of sentences that fill their slots: every beam descends from a share of them."""
    sentences, beams = max(1, rows // beams), min(rows, beams)
    rng = np.random.default_rng(0)
    vocabulary = bundle.manifest.dimensions.target_vocabulary
    ancestors = rng.random((sentences, 1, max(beams, LEAST_QUERIES), SLOTS)) < 0.4
    ancestors[..., :beams] = True
    return step_batch(
        layout(np.ones((sentences, beams), np.bool_)),
        token=rng.integers(4, vocabulary, (sentences, beams)),
        step=np.full(sentences, source_tokens),
        slot=np.tile(np.arange(beams), (sentences, 1)),
        ancestors=ancestors,
        source_length=np.full(sentences, source_tokens),
        candidates=model_rules(bundle.manifest).search.needed_candidates(beams, vocabulary),
    )


def seated(runner: Backend, sources: Sequence[Tokens]) -> Cache:
    """A cache with these sentences in it."""
    width = max(map(len, sources))
    at_once = max(1, ENCODE_TOKENS // width)
    origins = []
    for first in range(0, len(sources), at_once):
        part = sources[first : first + at_once]
        encoded = runner.encode(encoder_batch(part, source_width=width))
        origins += [FromEncoder(encoded, i) for i in range(len(part))]
    cache = runner.new_cache()
    cache.arrange(origins, slots=SLOTS, source_width=width)
    return cache


def bare_step(setting: Setting, bundle: Bundle, session: Any, rows: int) -> tuple[FixedRun, StepShape, list[Any]]:
    """A decoder step of a session of one's own, with its inputs sent; what must be kept as long as it is used."""
    batch = busy_batch(bundle, rows, setting.scale.beams, setting.scale.source_tokens)
    sentences = len(batch.source_length)
    shape = step_shape(
        batch,
        seats=seat_count(sentences),
        slots=SLOTS,
        source_width=LEAST_SOURCE_WIDTH,
        vocabulary=bundle.manifest.dimensions.target_vocabulary,
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
    run = FixedRun(session, setting.device, shape.axes(), elsewhere=elsewhere, host=candidates)
    fill_step(run.inputs, batch, np.arange(1, sentences + 1))
    run.send()
    return run, shape, buffers
