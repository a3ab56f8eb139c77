"""The backend for the CPU: what runs together gets what it would get alone, wherever its slots are."""

import gc
import io
import time
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.testing import write_hugging_face
from beamline_server.bundle import Bundle
from beamline_server.engine.admission import Capacity
from beamline_server.engine.backend import StepResult
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.ort import pieces
from beamline_server.engine.ort.c_api import Binding, NativeError
from beamline_server.engine.ort.cpu import CpuBackend, CpuCache, most_bytes_of_a_worker
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.ort.pages import PAGE
from beamline_server.engine.request import MAX_BEAMS, GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.step import EngineCore
from beamline_server.engine.table import FloatArray
from beamline_server.graphs import decoder_pieces
from beamline_server.models.forced import forced_decode
from beamline_server.models.load import model_rules
from doubles.engine import run_until_idle
from doubles.fed import FedSequences, Tokens, logprobs_alone

SOURCES: list[Tokens] = [(5, 6, 7, 1), (8, 1), tuple(range(3, 3 + 2 * PAGE)), (6, 6, 1)]
TARGETS: list[Tokens] = [(2, *(3 + (7 * number + i) % 40 for i in range(3 * PAGE - 2))) for number in range(4)]


@pytest.fixture(scope="module")
def backend(tiny: Callable[[str], Bundle]) -> CpuBackend:
    return CpuBackend(tiny("fp32"), threads=1)


@pytest.fixture(scope="module")
def alone(backend: CpuBackend) -> list[FloatArray]:
    """Log-probabilities after every token of each target, fed alone, (T, V)."""
    return [logprobs_alone(backend, source, target) for source, target in zip(SOURCES, TARGETS, strict=True)]


class Fed:
    """Sequences that are fed their targets through a cache, and what each has been fed."""

    def __init__(self, backend: CpuBackend, *, part: int = 1) -> None:
        self.backend = backend
        self.table = FedSequences(SOURCES, TARGETS, part=part)
        self.cache = backend.new_cache()
        assert isinstance(self.cache, CpuCache)
        self.fed: dict[int, int] = {}

    def enter(self, *indices: int) -> None:
        encoded = self.backend.encode([SOURCES[index] for index in indices])
        for number, index in enumerate(indices):
            self.table.restart(index)
            self.cache.enter(index, encoded, number)
            self.fed[index] = 0

    def leave(self, index: int) -> None:
        self.cache.leave(index)
        del self.fed[index]

    def step(
        self,
        alone: Sequence[FloatArray],
        *,
        going: Sequence[int] | None = None,
        candidates: int = 3,
        logprobs: bool = False,
    ) -> StepResult:
        """A step of all that are there, or of some, each of whose rows is as alone."""
        (bucket,) = self.cache.place(self.table.arrays, going)
        found = bucket.run(self.table.arrays, candidates, logprobs=logprobs)
        expected = np.stack([alone[index][self.fed[index]] for index in bucket.members.tolist()])
        best = np.argsort(-expected, axis=1, kind="stable")[:, :candidates]
        assert np.array_equal(found.top_token, best)
        assert np.array_equal(found.top_logprob, np.take_along_axis(expected, best, axis=1))
        assert (found.logprob is not None) == logprobs
        assert found.logprob is None or np.array_equal(found.logprob, expected)
        assert set(bucket.members.tolist()) == set(self.fed if going is None else going)
        for index in bucket.members.tolist():
            self.fed[index] += 1
        self.table.feed(bucket.members.tolist())
        return found


def test_what_runs_together_gets_what_it_would_get_alone(backend: CpuBackend, alone: list[FloatArray]) -> None:
    fed = Fed(backend)
    fed.enter(0, 1, 2, 3)
    for _ in range(2 * PAGE + 1):
        fed.step(alone)


def test_a_sequence_keeps_its_past_when_others_come_and_go(backend: CpuBackend, alone: list[FloatArray]) -> None:
    """And an index that is taken again has none; pages that were given back are taken by others."""
    fed = Fed(backend)
    fed.enter(2)
    fed.enter(0, 1)
    for _ in range(PAGE + 2):
        fed.step(alone)
    fed.leave(0)
    fed.step(alone)
    fed.enter(3, 0)
    fed.leave(2)
    fed.step(alone)
    fed.enter(2)
    for _ in range(PAGE + 2):
        fed.step(alone)


def test_some_go_while_others_stay_where_they_are(backend: CpuBackend, alone: list[FloatArray]) -> None:
    """Also past the end of a page, and beside one that comes and does not go at once."""
    fed = Fed(backend)
    fed.enter(0, 1, 2)
    for _ in range(PAGE + 2):
        fed.step(alone, going=[1])
    fed.step(alone)
    fed.enter(3)
    for _ in range(PAGE):
        fed.step(alone, going=[2, 0])
    fed.step(alone, going=[3])
    fed.leave(2)
    for _ in range(PAGE - 4):
        fed.step(alone)


def test_no_more_memory_is_taken_than_was_foreseen(tiny: Callable[[str], Bundle]) -> None:
    """By the widest and longest searches that fit, beside what runs the graphs."""
    check_memory(tiny("fp32"))


def test_no_more_memory_is_taken_with_relative_positions(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "checkpoint", "t5", {}, {})
    check_memory(export(folder, tmp_path / "bundle", ExportOptions(), Progress(io.StringIO())))


def check_memory(bundle: Bundle) -> None:
    sizes, room = bundle.manifest.dimensions, Capacity(48, 1 << 14)
    backend, rules = CpuBackend(bundle, threads=1), model_rules(bundle.manifest)
    longest = SearchOptions(
        beam_size=MAX_BEAMS, min_new_tokens=sizes.max_target_tokens, max_new_tokens=sizes.max_target_tokens
    )
    source = (5,) * sizes.max_source_tokens
    tracemalloc.start()
    try:
        core = EngineCore(backend, rules, room, clock=time.monotonic, observer=NullObserver())
        core.accept(GenerationRequest(RequestId(number), source, longest) for number in range(6))
        run_until_idle(core)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most_bytes_of_a_worker(sizes, room)


def test_who_leaves_before_it_has_run_leaves_nothing(backend: CpuBackend, alone: list[FloatArray]) -> None:
    fed = Fed(backend)
    fed.enter(0, 1)
    fed.leave(0)
    fed.step(alone)
    fed.leave(1)
    assert fed.cache.place(fed.table.arrays) == []


def test_pasts_survive_that_there_are_more_pages(backend: CpuBackend, alone: list[FloatArray]) -> None:
    fed = Fed(backend)
    assert isinstance(fed.cache, CpuCache)
    fed.enter(0, 2)
    fed.step(alone)
    for memory in (fed.cache._own, fed.cache._cross):
        before = memory.pages.keys.shape[1]
        memory._grow()
        assert memory.pages.keys.shape[1] == 2 * before
    fed.enter(1)
    for _ in range(PAGE + 1):
        fed.step(alone)


def test_every_page_is_free_or_held_by_one(backend: CpuBackend, alone: list[FloatArray]) -> None:
    fed = Fed(backend)
    assert isinstance(fed.cache, CpuCache)

    def check(expected: Sequence[int]) -> None:
        assert isinstance(fed.cache, CpuCache)
        for memory in (fed.cache._own, fed.cache._cross):
            held = [page for i, n in enumerate(memory.pages.held) for page in memory.pages.pages[i, :n].tolist()]
            assert sorted([*held, *memory._free]) == list(range(memory.pages.keys.shape[1] // PAGE))
        assert [int(n) for n in fed.cache._own.pages.held] == list(expected)

    fed.enter(0, 2)
    fed.step(alone)
    check([1, 0, 1])
    for _ in range(PAGE):
        fed.step(alone)
    check([2, 0, 2])
    fed.leave(0)
    check([0, 0, 2])


def test_all_logprobs_are_there_in_the_steps_that_ask_for_them(backend: CpuBackend, alone: list[FloatArray]) -> None:
    fed = Fed(backend)
    fed.enter(0, 1)
    for logprobs, candidates in [(False, 3), (True, 3), (True, 5), (False, 5), (True, 1), (False, 30)]:
        fed.step(alone, candidates=candidates, logprobs=logprobs)


def test_steps_of_as_many_rows_are_bound_once(
    backend: CpuBackend, alone: list[FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Binding] = []

    def counted(*arguments: Any) -> Binding:
        made.append(Binding(*arguments))
        return made[-1]

    monkeypatch.setattr(pieces, "Binding", counted)
    fed = Fed(backend)
    every = len(decoder_pieces(backend._sizes.graphs))
    fed.enter(0, 1, 2)
    fed.step(alone)
    fed.leave(2)
    fed.step(alone)
    assert len(made) == 2 * every
    fed.step(alone, candidates=4, logprobs=True)
    fed.enter(2)
    fed.step(alone)
    assert len(made) == 2 * every


def test_a_part_of_a_prefix_is_what_its_tokens_are_one_by_one(backend: CpuBackend, alone: list[FloatArray]) -> None:
    """Several rows of a sequence: of the same attention, in the same order, so with the same bits."""
    fed = Fed(backend, part=5)
    encoded = backend.encode(SOURCES[:1])
    fed.cache.enter(0, encoded, 0)
    for begin in range(0, 4 * 5, 5):
        (bucket,) = fed.cache.place(fed.table.arrays)
        found = bucket.run(fed.table.arrays, 3, logprobs=True)
        assert found.logprob is not None
        assert np.array_equal(found.logprob, alone[0][begin : begin + 5])
        fed.table.feed([0])


def test_the_whole_graph_says_the_same_but_for_rounding(tiny: Callable[[str], Bundle], alone: list[FloatArray]) -> None:
    """The one that a GPU runs, run on the CPU."""
    whole = CudaBackend(tiny("fp32"), device="cpu")
    for source, target, ours in zip(SOURCES, TARGETS, alone, strict=True):
        assert logprobs_alone(whole, source, target) == pytest.approx(ours, abs=2e-5)


def test_a_step_fails_with_onnxruntimes_words_and_the_next_one_computes(
    backend: CpuBackend, alone: list[FloatArray]
) -> None:
    """A token that the model does not have is one that nobody can ask for."""
    wrong, cache = FedSequences(SOURCES[:1], [(10**6,)]), backend.new_cache()
    cache.enter(0, backend.encode(SOURCES[:1]), 0)
    (bucket,) = cache.place(wrong.arrays)
    with pytest.raises(NativeError, match="out of data bounds"):
        bucket.run(wrong.arrays, 3)
    cache.leave(0)
    fed = Fed(backend)
    fed.cache = cache
    fed.enter(0)
    fed.step(alone)


def test_sources_of_no_length_in_common_are_encoded_alike_alone(backend: CpuBackend) -> None:
    together = backend.encode(SOURCES).tensors
    for number, source in enumerate(SOURCES):
        lone = backend.encode([source]).tensors
        assert np.array_equal(together[:, :, number, : len(source)], lone[:, :, 0, : len(source)])


def test_rows_are_filled_up_to_a_multiple(tiny: Callable[[str], Bundle]) -> None:
    """With 4-bit weights: an odd number of rows gives what the same rows give beside others, bit for bit."""
    backend = CpuBackend(tiny("int4"), threads=1)
    assert backend.new_pieces()._rows_multiple == 2
    together = backend.encode([(1,), *SOURCES]).tensors
    for number, source in enumerate([(1,), *SOURCES]):
        lone = backend.encode([source]).tensors
        assert np.array_equal(together[:, :, number, : len(source)], lone[:, :, 0, : len(source)])
    lone_steps = [logprobs_alone(backend, source, target) for source, target in zip(SOURCES, TARGETS, strict=True)]
    fed = Fed(backend)
    fed.enter(0, 2, 3)
    for _ in range(3):
        fed.step(lone_steps, logprobs=True)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_mapped_weights_give_the_same_bits(precision: str, tiny: Callable[[str], Bundle]) -> None:
    bundle = tiny(precision)
    read, mapped = (CpuBackend(bundle, threads=1, mapped=mapped) for mapped in (False, True))
    for source in ((5, 7, 0), tuple(range(20))):
        forced = (bundle.manifest.special_tokens.decoder_start, 3, 5, 8)
        assert forced_decode(read, source, forced) == forced_decode(mapped, source, forced)


def test_a_backend_that_nobody_holds_is_gone(tiny: Callable[[str], Bundle]) -> None:
    """With its sessions: nothing refers to itself."""
    backend = CpuBackend(tiny("int8"), threads=1)
    logprobs_alone(backend, SOURCES[0], TARGETS[0][:2])
    gone = weakref.ref(backend._decoder[0])
    del backend
    gc.collect()
    assert gone() is None
