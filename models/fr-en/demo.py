"""The main job on the embedded model: export, serve, translate, measure, stop. Fails loudly if any step fails.

    python models/fr-en/demo.py            (or: make demo)

Starts the server as a real process and talks to it as a user would: through the command line and the client.
"""

import argparse
import asyncio
import gzip
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import sacrebleu

from beamline_client import AsyncClient, BeamlineError, Result
from beamline_server.process import BEAMLINE, ProcessFailed, ServerProcess

HERE = Path(os.path.relpath(Path(__file__).parent))
BUNDLES = HERE / ".." / ".." / "build"
SENTENCES = ("je suis étudiant", "Où est la gare ?", "Il fait beau, allons nous promener.")
METRICS = ("beamline_requests_total", "beamline_running_rows", "beamline_row_capacity", "beamline_target_tokens_total")
IN_FLIGHT = 64


def say(text: str) -> None:
    """A headline."""
    print(f"\n== {text}", flush=True)


def show(arguments: Sequence[object]) -> None:
    """A command line as it can be typed here: of `beamline` and these arguments."""
    print("$", shlex.join([os.path.relpath(BEAMLINE), *map(str, arguments)]), flush=True)


def command(*arguments: object) -> None:
    """Run `beamline ...`; raises CalledProcessError if it fails."""
    show(arguments)
    subprocess.run([str(BEAMLINE), *map(str, arguments)], check=True)


def export(precision: str) -> Path:
    """Make the bundle, which stays in the folder of what is built; returns where it is."""
    bundle = Path(os.path.normpath(BUNDLES / f"fr-en-{precision}"))
    say("export the checkpoint to ONNX")
    print("--expect: 100 inputs and what PyTorch answers to them; the bundle is asked the same.")
    expect = ["--expect", HERE / "expected.jsonl"]
    calibrate = []
    if precision == "int8":
        print("--calibrate: sentences like those to come, which tell int8 the ranges of its values.")
        calibrate = ["--calibrate", HERE / "calibration.txt"]
    command("export", HERE, "-o", bundle, "--precision", precision, *calibrate, *expect, "--replace")
    return bundle


def tell_next(bundle: Path) -> None:
    """What to do after the demo, as commands that work."""
    say("your turn")
    print(f"$ . {shlex.quote(os.path.relpath(BEAMLINE.with_name('activate')))}")
    print(f"$ beamline serve {shlex.quote(str(bundle))}")
    print(f"$ beamline translate {shlex.quote(SENTENCES[0])}   # in another shell, after the same first line")


def test_file() -> tuple[list[str], list[list[str]]]:
    """Sources, and their references; a source can have several."""
    with gzip.open(HERE / "test.tsv.gz", "rt", encoding="utf-8") as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream]
    return [row[0] for row in rows], [row[1:] for row in rows]


async def translate_all(target: str, sources: Sequence[str]) -> tuple[list[Result], list[float], float]:
    """Every source as a request of its own, IN_FLIGHT at a time; results, latencies and wall time in seconds."""
    results: list[Result | None] = [None] * len(sources)
    latencies = [0.0] * len(sources)
    waiting = iter(range(len(sources)))

    async with AsyncClient(target) as client:

        async def caller() -> None:
            for i in waiting:
                began = time.perf_counter()
                results[i] = await client.generate_one(sources[i])
                latencies[i] = time.perf_counter() - began

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
        wall = time.perf_counter() - began
    return [result for result in results if result is not None], latencies, wall


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(server: ServerProcess) -> None:
    """Send the test file concurrently and print what came of it."""
    sources, references = test_file()
    say(f"translate {len(sources)} test sentences, {IN_FLIGHT} requests in flight")
    results, latencies, wall = asyncio.run(translate_all(server.target, sources))
    if len(results) != len(sources):
        raise RuntimeError(f"{len(sources) - len(results)} sentences have no translation")
    widest = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(widest)]
    # sacrebleu takes None where a sentence has fewer references than others; its types do not say so.
    bleu = sacrebleu.corpus_bleu([result.best.text for result in results], columns)
    p50, p95, p99 = (percentile(latencies, share) * 1e3 for share in (0.50, 0.95, 0.99))
    samples = server.samples()
    steps, rows = (samples[f'beamline_step_rows_{part}{{kind="decode"}}'] for part in ("count", "sum"))
    print(f"throughput   {len(sources) / wall:.0f} sentences/s on this machine")
    print(f"latency      p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")
    print(f"batching     {rows / steps:.1f} hypotheses continued at once, on average over all steps")
    print(f"quality      BLEU {bleu.score:.1f} of 100 against people's translations")
    if bleu.score < 50:
        raise RuntimeError(f"BLEU {bleu.score:.1f} is far below this model's 53: the answers are wrong")
    say("some of the metrics that Prometheus reads")
    print("\n".join(line for line in server.scrape().splitlines() if line.startswith(METRICS)))


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Export, serve and measure the embedded French-English model.")
    parser.add_argument("--precision", default="int8", choices=["fp32", "int8"])
    precision: str = parser.parse_args().precision
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    bundle = export(precision)
    say("start the server, on free ports")
    began = time.monotonic()
    with ServerProcess(bundle) as server:
        arguments = server.process.args
        assert isinstance(arguments, list)
        show(arguments[1:])
        server.wait_until_serving()
        print(f"SERVING after {time.monotonic() - began:.1f} s")
        say("translate a few sentences: three hypotheses each, after their scores (mean log-probability)")
        command("translate", "--server", server.target, "--n-best", 3, "--scores", *SENTENCES)
        measure(server)
        say("stop the server")
        began = time.monotonic()
        status = server.stop()
        if status != 0:
            raise RuntimeError(f"the server stopped with status {status}:\n{server.log.text()}")
        print(f"stopped gracefully in {time.monotonic() - began:.1f} s, exit status 0")
    tell_next(bundle)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ProcessFailed, BeamlineError, subprocess.SubprocessError) as failure:
        print(f"\ndemo FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
