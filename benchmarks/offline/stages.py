"""The stages of a run, each of which adds to the results."""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from beamline_server.bundle import Bundle, load_bundle
from beamline_server.engine.admission import SHARED_WIDTH
from beamline_server.manifest import WEIGHTS
from beamline_server.models.load import usable_cores
from beamline_server.process import ServerProcess
from offline.bench import Bench
from offline.contenders import BEAMLINE_FP32, BEAMLINE_INT8, TRANSFORMERS
from offline.models import BASE_16K, BASE_58K, FR_EN
from offline.plan import BATCHES
from offline.prepared import fr_en_lines, tokenizer_of
from offline.results import Figure
from offline.task import Search
from offline.worker import resident_bytes

MEGABYTE = 1e6
ONE_THREAD_WORKERS = {"workers": 2, "threads": 1, "rows": 128, "order": "file"}
BEAM, FEW_TOKENS, MANY_TOKENS = 4, 20, 200
SERVER_ROWS = 128
"""The server's default, per worker."""


def fr_en(bench: Bench) -> None:
    """The embedded model: the whole test file, and batches of it; one sentence at a time is the idle latency."""
    with bench.together(FR_EN, bench.names(latency_only=True)) as processes:
        for batch in (None, *BATCHES):
            taking_part = bench.names(latency_only=batch == 1)
            bench.compare(FR_EN, batch, {name: processes[name] for name in taking_part if name in processes})


def transformer_base(model: str) -> Callable[[Bench], None]:
    """A stage: a random model, with forced output."""

    def stage(bench: Bench) -> None:
        with bench.together(model, bench.names()) as processes:
            for batch in BATCHES:
                bench.compare(model, batch, processes)

    return stage


def starts(bench: Bench) -> None:
    """From the start of a process to its first translation, and what memory it takes to do the rest."""
    for model, batch in ((FR_EN, None), (BASE_16K, 32)):
        names = bench.names()
        seconds = bench.in_turns(names, partial(_first_s, bench, model), f"{model}: first result, s")
        for name, values in seconds.items():
            bench.results.figures[f"first result, {model}, {name}"] = Figure(tuple(values))
        count = bench.plan.file_sentences if batch is None else batch
        for name in seconds:
            with bench.excused(name), bench.process(bench.contenders[name], model) as process:
                bench.run(process, bench.best(name, model, batch), bench.task(model, batch, count))
                peak = process.ask("memory")["peak"]
                bench.say(f"{model}: {name}: at most {peak / MEGABYTE:.0f} MB resident")
                bench.results.figures[f"peak memory, {model}, {name}"] = Figure((peak,))


def _first_s(bench: Bench, model: str, name: str) -> float:
    task = bench.task(model, 1, 1)
    setting = bench.best(name, model, 1)
    bench.prepared.spec(bench.contenders[name], model)  # what has to be made for it first takes no part
    began = time.perf_counter()
    with bench.process(bench.contenders[name], model) as process:
        process.ask("first", setting=setting, task=task.as_json())
        return time.perf_counter() - began


def engine(bench: Bench) -> None:
    """Beamline alone: where a step's time goes, what long sentences cost."""
    for model in (FR_EN, BASE_16K):
        name = f"{model}, {BEAMLINE_INT8}"
        with bench.process(bench.contenders[BEAMLINE_INT8], model) as process:
            sentences = bench.task(model, None, None).sentences
            if model == FR_EN:
                found = _profiles(bench, process, "outside_sessions", sentences=sentences, workers=2)
                _add(bench, f"outside session.run, {name}", found, lambda f: float(f["outside_and_waiting"]))
            found = _profiles(bench, process, "company", sentences=sentences)
            _add(bench, f"beside a long sentence, {name}", found, lambda f: float(f["beside_s"] / f["alone_s"]))
            found = [_token_times(bench, process, model) for _ in range(bench.plan.repetitions)]
            _add(bench, f"per token, {MANY_TOKENS} over {FEW_TOKENS}, {name}", found, lambda f: float(f["ratio"]))
    for model, name in itertools.product((BASE_16K, BASE_58K), (BEAMLINE_INT8, BEAMLINE_FP32)):
        with bench.process(bench.contenders[name], model) as process:
            sentences = bench.task(model, None, None).sentences
            found = _profiles(bench, process, "step_over_floor", sentences=sentences)
            _add(bench, f"step over its floor, {model}, {name}", found, lambda f: float(f["step_ms"] / f["floor_ms"]))


def _profiles(bench: Bench, process: Any, profile: str, **arguments: Any) -> list[dict[str, Any]]:
    return [process.ask("profile", name=profile, **arguments) for _ in range(bench.plan.repetitions)]


def _token_times(bench: Bench, process: Any, model: str) -> dict[str, Any]:
    per_token_ms = {}
    for tokens in (FEW_TOKENS, MANY_TOKENS):
        run = bench.run(process, ONE_THREAD_WORKERS, bench.task(model, 32, 32, Search.forced(tokens)))
        per_token_ms[tokens] = run.seconds / run.tokens * 1e3
    return {
        "few_ms": per_token_ms[FEW_TOKENS],
        "many_ms": per_token_ms[MANY_TOKENS],
        "ratio": per_token_ms[MANY_TOKENS] / per_token_ms[FEW_TOKENS],
    }


def _add(bench: Bench, name: str, found: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> None:
    """A figure with one value per repetition; of what else is known, the medians."""
    facts = {
        key: median(f[key] for f in found) if isinstance(first, int | float) else first
        for key, first in found[0].items()
    }
    figure = bench.results.figures[name] = Figure(tuple(map(value, found)), facts)
    bench.say(f"{name}: {figure.spread.median:.3f}")


def serve(bench: Bench) -> None:
    """From the start of `beamline serve` to SERVING, and the memory that it then has."""
    path = bench.bundle(BEAMLINE_INT8, BASE_16K)
    bundle = load_bundle(path)
    seconds, resident = [], []
    for _ in range(bench.plan.repetitions):
        time.sleep(bench.plan.settle_s)
        began = time.perf_counter()
        with ServerProcess(path) as server:
            server.wait_until_serving()
            seconds.append(time.perf_counter() - began)
            resident.append(float(resident_bytes(server.process.pid)["now"]))
            server.stop()
    facts = {
        "weights_bytes": bundle.manifest.files[WEIGHTS].bytes,
        "pools_bytes": warm_up_pool_bytes(bundle, workers=usable_cores()),
    }
    bench.results.figures[f"start to SERVING, {BASE_16K}, {BEAMLINE_INT8}"] = Figure(tuple(seconds))
    bench.results.figures[f"resident when SERVING, {BASE_16K}, {BEAMLINE_INT8}"] = Figure(tuple(resident), facts)
    bench.say(f"SERVING after {median(seconds):.2f} s with {median(resident) / MEGABYTE:.0f} MB")


def warm_up_pool_bytes(bundle: Bundle, *, workers: int) -> int:
    """Bytes of the caches that a server's warm-up fills: every worker's rows, in the bucket that all share."""
    dimensions = bundle.manifest.dimensions
    sentences = SERVER_ROWS // bundle.manifest.generation_defaults.beam_size
    of_a_token = 4 * dimensions.d_model * dimensions.decoder_layers * 2 * 2  # fp32; keys and values, of both attentions
    return int(workers * sentences * SHARED_WIDTH * of_a_token)


def quality(bench: Bench) -> None:
    """BLEU of everybody's answers to the test file, and whether Beamline's are the same alone."""
    import sacrebleu

    lines = fr_en_lines()[: bench.plan.file_sentences]
    references = list(itertools.zip_longest(*(references for _, *references in lines)))
    tokenizer = tokenizer_of(bench.bundle(BEAMLINE_INT8, FR_EN))
    answers: dict[str, list[list[int]]] = {}
    for name in bench.names():
        with bench.excused(name), bench.process(bench.contenders[name], FR_EN) as process:
            task, setting = bench.task(FR_EN, None, bench.plan.file_sentences), bench.best(name, FR_EN, None)
            answers[name] = process.ask("answers", setting=setting, task=task.as_json())["ids"]
            if bench.contenders[name].ours:
                alone = bench.task(FR_EN, 1, bench.plan.batch_sentences[1])
                found = process.ask("answers", setting=bench.best(name, FR_EN, 1), task=alone.as_json())["ids"]
                share = _same(found, answers[name][: len(found)])
                bench.results.figures[f"alone as among all, {name}"] = Figure((share,), {"sentences": len(found)})
    for name, found in answers.items():
        bleu = float(sacrebleu.corpus_bleu([tokenizer.decode(ids) for ids in found], references).score)
        facts = {"as_transformers": _same(found, answers[TRANSFORMERS])} if TRANSFORMERS in answers else {}
        bench.results.figures[f"BLEU, {name}"] = Figure((bleu,), facts)
        bench.say(f"BLEU, {name}: {bleu:.2f}")


def _same(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """The share of equal ones."""
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(found)


STAGES: dict[str, Callable[[Bench], None]] = {
    "fr-en": fr_en,
    "base-16k": transformer_base(BASE_16K),
    "base-58k": transformer_base(BASE_58K),
    "starts": starts,
    "engine": engine,
    "serve": serve,
    "quality": quality,
}
