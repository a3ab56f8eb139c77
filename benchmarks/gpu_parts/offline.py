"""Tokens per second over batches that are there from the start: the engine, and transformers `generate` in fp16."""

import time
from collections.abc import Sequence
from typing import Any

from beamline_server.engine.admission import Capacity
from beamline_server.engine.observer import NullObserver
from beamline_server.engine.ort.cuda.backend import CudaBackend
from beamline_server.engine.ort.cuda.captured_graphs import CAPTURED_FROM_USE
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    GenerationRequest,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.step import EngineCore, ModelRules
from beamline_server.models.load import model_rules
from gpu_parts.setting import FR_EN, Setting, Tokens
from offline.session_clock import TimedBackend

_SLOTS = 1 << 22
FILE_SENTENCES_AT_ONCE = 256
_GENERATE_BATCH = 64
_GENERATE_SENTENCES = 512
_MOST_TOKENS = 128


class Steps(NullObserver):
    """Sums what the engine tells of its steps."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.count = 0
        self.rows = 0
        self.seconds = 0.0
        self.encode_s = 0.0

    def stepped(self, seconds: float, rows: int, sentences: int) -> None:  # noqa: ARG002 - the observer's signature
        """Count a step."""
        self.count += 1
        self.rows += rows
        self.seconds += seconds

    def encoded(self, seconds: float, sentences: int, tokens: int, padding: int) -> None:  # noqa: ARG002 - as above
        """Count an encoder call."""
        self.encode_s += seconds


class Batches:
    """Searches in batches of a size, on one core: what is captured in the first passes is replayed in the next.

    Args:
        backend: Computes.
        rules: Of the model.
        rows: Live hypotheses at a time.
    """

    def __init__(self, backend: CudaBackend, rules: ModelRules, rows: int) -> None:
        self._backend = backend
        self._timed = TimedBackend(backend)
        self._steps = Steps()
        clock = time.perf_counter
        self._core = EngineCore(self._timed, rules, Capacity(rows, _SLOTS), clock=clock, observer=self._steps)

    @property
    def captured(self) -> int:
        """Graphs, of steps and of encoder calls."""
        return len(self._backend.step_graphs) + len(self._backend.encoder_graphs)

    def run(self, searches: Sequence[tuple[Tokens, SearchOptions]]) -> dict[str, Any]:
        """A pass over all searches; it should capture nothing if it is to be compared."""
        steps, captured = self._steps, self.captured
        steps.clear()
        self._timed.clear()
        self._core.accept(GenerationRequest(RequestId(i), *search) for i, search in enumerate(searches))
        tokens, done = 0, 0
        began = time.perf_counter()
        while not self._core.idle:
            for event in self._core.step():
                assert isinstance(event, Completed), event
                tokens += len(event.hypotheses[0].tokens)
                done += 1
        seconds = time.perf_counter() - began
        calls = [*self._timed.encodes, *self._timed.placings, *self._timed.runs]
        return {
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "sentences_per_s": done / seconds,
            "steps": steps.count,
            "rows_per_step": steps.rows / max(steps.count, 1),
            "step_ms": steps.seconds / max(steps.count, 1) * 1e3,
            "encode_share": steps.encode_s / seconds,
            "share_outside_the_backend": 1 - sum(call.seconds for call in calls) / seconds,
            "captured": self.captured - captured,
        }


def offline(setting: Setting) -> dict[str, Any]:
    """The engine: forced lengths on the random model."""
    scale, name = setting.scale, setting.names[1]
    bundle, backend = setting.bundle(name, "fp16"), setting.backend(name)
    rules = model_rules(bundle.manifest)
    forced = SearchOptions(scale.beams, min_new_tokens=scale.new_tokens, max_new_tokens=scale.new_tokens)
    table = []
    for batch in scale.batches:
        sources = setting.random_sources(bundle.manifest.dimensions.source_vocabulary, batch)
        searches = [(source, forced) for source in sources]
        batches = Batches(backend, rules, batch * scale.beams)
        # A pass uses some shapes once, the encoder's for one.
        for _ in range(CAPTURED_FROM_USE):
            batches.run(searches)
        passes = [batches.run(searches) for _ in range(3)]
        table.append({"batch": batch, **min(passes, key=lambda figures: figures["seconds"])})
    return {
        "model": name,
        "new_tokens": scale.new_tokens,
        "beams": scale.beams,
        "batches": table,
        "graphs": len(backend.step_graphs),
        "encoder_graphs": len(backend.encoder_graphs),
    }


def test_file(setting: Setting) -> dict[str, Any]:
    """The engine over the whole test file of the embedded model, many sentences at once."""
    backend = setting.backend(FR_EN)
    rules = model_rules(setting.bundle(FR_EN, "fp16").manifest)
    natural = SearchOptions(setting.scale.beams, max_new_tokens=_MOST_TOKENS, early_stopping=EarlyStopping.WHEN_FULL)
    searches = [(source, natural) for source in setting.sources()]
    batches = Batches(backend, rules, FILE_SENTENCES_AT_ONCE * setting.scale.beams)
    first, second = batches.run(searches), batches.run(searches)
    return {"sentences": len(searches), "first_pass": first, **second, "graphs": len(backend.step_graphs)}


def transformers_generate(setting: Setting) -> dict[str, Any]:
    """`generate` with the same weights, lengths and beams on the same device, in fp16 on a GPU."""
    scale, name = setting.scale, setting.names[1]
    model = _load(setting, name)
    table = []
    for batch in scale.batches:
        vocabulary = model.config.vocab_size
        sources = setting.random_sources(vocabulary, batch)
        options = {"num_beams": scale.beams, "min_new_tokens": scale.new_tokens, "max_new_tokens": scale.new_tokens}
        seconds = min(_generate(setting, model, sources, options)[0] for _ in range(2))
        table.append({"batch": batch, "seconds": seconds, "tokens_per_s": batch * scale.new_tokens / seconds})
    return {"model": name, "dtype": str(model.dtype), "batches": table}


def transformers_test_file(setting: Setting) -> dict[str, Any]:
    """`generate` over a part of the test file, sorted by length, in batches."""
    model = _load(setting, FR_EN)
    every = setting.sources()
    sources = sorted(every[:: max(1, len(every) // _GENERATE_SENTENCES)], key=len)
    options = {"num_beams": setting.scale.beams, "max_new_tokens": _MOST_TOKENS, "early_stopping": True}
    batches = [sources[i : i + _GENERATE_BATCH] for i in range(0, len(sources), _GENERATE_BATCH)]
    _generate(setting, model, batches[0], options)
    results = [_generate(setting, model, batch, options) for batch in batches]
    seconds, tokens = sum(s for s, _ in results), sum(t for _, t in results)
    return {
        "sentences": len(sources),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "sentences_per_s": len(sources) / seconds,
    }


def _load(setting: Setting, name: str) -> Any:
    import torch
    import transformers

    from beamline_export.reference import quiet_transformers

    dtype = torch.float16 if setting.device == "cuda" else torch.float32
    with quiet_transformers():
        model = transformers.MarianMTModel.from_pretrained(setting.checkpoint(name), dtype=dtype)
    return model.to(setting.device).eval()


def _generate(setting: Setting, model: Any, sources: Sequence[Tokens], options: dict[str, Any]) -> tuple[float, int]:
    """Seconds, and tokens but for padding."""
    import torch

    from beamline_export.reference import quiet_transformers

    pad, longest = model.config.pad_token_id, max(map(len, sources))
    ids = torch.tensor([[*source, *[pad] * (longest - len(source))] for source in sources], device=setting.device)
    mask = torch.tensor(
        [[1] * len(source) + [0] * (longest - len(source)) for source in sources], device=setting.device
    )
    setting.synchronize()
    began = time.perf_counter()
    with torch.inference_mode(), quiet_transformers():
        output = model.generate(input_ids=ids, attention_mask=mask, **options)
    setting.synchronize()
    seconds = time.perf_counter() - began
    return seconds, int((output[:, 1:] != pad).sum())
