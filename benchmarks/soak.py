"""Does a server lose anything over many requests? Memory, file descriptors, threads, rows, or count.

    python benchmarks/soak.py [--requests 20000] [--in-flight 64] [--bundle BUNDLE]

Sends the test sentences to a real server process, so many in flight: beams 1-8, some as streams, some left half-way,
some with too little time. Exits with status 1 if, after the first requests, memory grows by more than 1 % and 10 MiB or
file descriptors or threads stay; if rows are held at the end; if an answer changes from one time to the next; or if the
server has counted other outcomes than the callers have seen.
"""

import argparse
import asyncio
import contextlib
import gzip
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_client.channel import channel_options
from beamline_server.process import ProcessFailed, Samples, ServerProcess, is_idle

MODEL = Path(__file__).parent.parent / "models" / "fr-en"
MIB = 1024 * 1024

SHARE_CANCELLED = 0.05
SHARE_LATE = 0.02
SHARE_STREAMED = 0.2
LONGEST_PATIENCE_S = 0.3
"""Callers who give up do so at a random moment before this."""
SHORTEST_DEADLINE_S, LONGEST_DEADLINE_S = 0.001, 0.05
GROWTH_ALLOWED = 0.01
GROWTH_ALLOWED_BYTES = 10 * MIB
SPARE_HANDLES = 2
REPORT_EVERY = 1000

OUTCOMES = {
    grpc.StatusCode.OK: "ok",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "queue_full",
    grpc.StatusCode.CANCELLED: "cancelled",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
}
GIVEN_UP = ("cancelled", "deadline")


@dataclass(frozen=True, slots=True)
class Plan:
    """One request and how its caller behaves; None for patience and deadline is as long as it takes."""

    sentence: int
    streamed: bool
    patience_s: float | None
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds."""

    rss: int
    files: int
    threads: int

    def __str__(self) -> str:
        return f"RSS {self.rss / MIB:.1f} MiB, {self.files} file descriptors, {self.threads} threads"


@dataclass
class Tally:
    """What the callers have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    answers: dict[int, tuple[str, float]] = field(default_factory=dict)
    changed: int = 0
    """Answers that differ from the first one to the same request."""


def plans(count: int, sentences: int, seed: int) -> Iterator[Plan]:
    """The requests in their order: the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        fate, patience_s, deadline_s = rng.random(), None, None
        if fate < SHARE_CANCELLED:
            patience_s = rng.uniform(0, LONGEST_PATIENCE_S)
        elif fate < SHARE_CANCELLED + SHARE_LATE:
            deadline_s = rng.uniform(SHORTEST_DEADLINE_S, LONGEST_DEADLINE_S)
        yield Plan(rng.randrange(sentences), rng.random() < SHARE_STREAMED, patience_s, deadline_s)


def beam_size(sentence: int) -> int:
    """1 to 8, the same for every request with this sentence, so that its answer is the same."""
    return 1 + sentence % 8


class Callers:
    """Send requests and keep count."""

    def __init__(self, stub: Any, sentences: Sequence[str], server: ServerProcess) -> None:
        self._stub = stub
        self._sentences = sentences
        self._server = server
        self._began = time.perf_counter()
        self.tally = Tally()

    async def send_all(self, requests: Iterator[Plan], in_flight: int) -> None:
        """Send all of them, so many at a time."""

        async def caller() -> None:
            for plan in requests:
                await self._send(plan)

        await asyncio.gather(*(caller() for _ in range(in_flight)))

    async def _send(self, plan: Plan) -> None:
        call = self._call(plan)
        result = asyncio.ensure_future(self._last_result(call) if plan.streamed else self._only_result(call))
        if plan.patience_s is not None:
            done, _ = await asyncio.wait([result], timeout=plan.patience_s)
            if not done:
                call.cancel()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            self._note(plan, await result)
        code = await call.code()
        self.tally.outcomes[OUTCOMES.get(code, code.name)] += 1
        self._report()

    def _call(self, plan: Plan) -> Any:
        source = pb.Input(text=self._sentences[plan.sentence])
        search = pb.SearchOptions(beam_size=beam_size(plan.sentence))
        if plan.streamed:
            return self._stub.GenerateStream(
                pb.GenerateStreamRequest(input=source, search=search), timeout=plan.deadline_s
            )
        return self._stub.Generate(pb.GenerateRequest(inputs=[source], search=search), timeout=plan.deadline_s)

    async def _only_result(self, call: Any) -> pb.Result:
        response: pb.GenerateResponse = await call
        return response.results[0]

    async def _last_result(self, call: Any) -> pb.Result:
        result = pb.Result()
        async for message in call:
            result = message.result
        return result

    def _note(self, plan: Plan, result: pb.Result) -> None:
        answer = (result.hypotheses[0].text, result.hypotheses[0].score)
        self.tally.changed += self.tally.answers.setdefault(plan.sentence, answer) != answer

    def _report(self) -> None:
        done = self.tally.outcomes.total()
        if done % REPORT_EVERY == 0:
            rate = done / (time.perf_counter() - self._began)
            print(f"{done:7} requests, {rate:4.0f}/s; server: {footprint(self._server.process.pid)}", flush=True)


def footprint(pid: int) -> Footprint:
    """What a process holds now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kib = int(status["VmRSS"].split()[0])
    return Footprint(kib * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]))


def counted(samples: Samples) -> Counter[str]:
    """The server's outcomes, without those that never came."""
    name = "beamline_requests_total"
    return +Counter({series.split('"')[1]: int(samples[series]) for series in samples if series.startswith(name)})


def book_problems(seen: Counter[str], samples: Samples) -> Iterator[str]:
    """Where the callers' count and the server's disagree.

    Who gives up cannot know whether the server has noticed, or had its answer already on the way, or has never heard of
    the request; so those may be anything on the other side. Everything else is exact.
    """
    server, given_up = counted(samples), sum(seen[outcome] for outcome in GIVEN_UP)
    for outcome in sorted(seen.keys() | server.keys()):
        least = 0 if outcome in GIVEN_UP else seen[outcome]
        most = given_up if outcome in GIVEN_UP else seen[outcome] + (given_up if outcome == "ok" else 0)
        if not least <= server[outcome] <= most:
            yield f"{outcome}: the server has {server[outcome]}, the callers {seen[outcome]}"
    if not seen.total() - given_up <= server.total() <= seen.total():
        yield f"in total: the server has {server.total()}, the callers {seen.total()}"
    for name in ("started", "handled"):
        series = f"grpc_server_{name}_total"
        rpcs = sum(samples[s] for s in samples if s.startswith(series) and 'grpc_method="Generate' in s)
        if rpcs != server.total():
            yield f"{rpcs:.0f} calls {name}, {server.total()} outcomes"


def problems(first: Footprint, last: Footprint, tally: Tally, samples: Samples) -> Iterator[str]:
    """What the server has lost."""
    growth = last.rss - first.rss
    if growth > max(GROWTH_ALLOWED * first.rss, GROWTH_ALLOWED_BYTES):
        yield f"memory has grown by {growth / MIB:.1f} MiB"
    if last.files > first.files + SPARE_HANDLES:
        yield f"file descriptors have grown from {first.files} to {last.files}"
    if last.threads > first.threads + SPARE_HANDLES:
        yield f"threads have grown from {first.threads} to {last.threads}"
    if not is_idle(samples):
        yield "rows are held although nothing is in flight"
    if tally.changed:
        yield f"{tally.changed} answers differ from earlier ones to the same request"
    if unexpected := tally.outcomes.keys() - OUTCOMES.values():
        yield f"calls ended with {', '.join(sorted(unexpected))}"
    yield from book_problems(tally.outcomes, samples)


async def settled(server: ServerProcess) -> tuple[Footprint, Samples]:
    """What the server holds when it has nothing to do."""
    with contextlib.suppress(ProcessFailed):  # if rows stay, that is for `problems` to tell
        await asyncio.to_thread(server.samples_when_idle, within_s=10)
    return footprint(server.process.pid), server.samples()


async def soak(server: ServerProcess, arguments: argparse.Namespace) -> list[str]:
    """Send everything and print what came of it; returns the problems."""
    with gzip.open(MODEL / "test.tsv.gz", "rt", encoding="utf-8") as stream:
        sentences = [line.split("\t")[0] for line in stream]
    requests = plans(arguments.requests, len(sentences), arguments.seed)
    warming = min(arguments.warm_up, arguments.requests)
    print(f"      0 requests; server: {footprint(server.process.pid)}")
    options = channel_options(server.target, retries=False)
    async with grpc.aio.insecure_channel(server.target, options=options) as channel:
        callers = Callers(GenerationServiceStub(channel), sentences, server)  # type: ignore[no-untyped-call]  # generated
        began = time.perf_counter()
        await callers.send_all((next(requests) for _ in range(warming)), arguments.in_flight)
        first, _ = await settled(server)
        await callers.send_all(requests, arguments.in_flight)
        wall = time.perf_counter() - began
        last, samples = await settled(server)
    print(f"\nafter {warming}: {first}\nafter {arguments.requests}: {last}")
    print(f"growth: {(last.rss - first.rss) / MIB:+.1f} MiB ({last.rss / first.rss - 1:+.1%})")
    print(f"callers: {_words(callers.tally.outcomes)}\nserver:  {_words(counted(samples))}")
    print(f"rows held: {samples['beamline_running_rows']:.0f} running, {samples['beamline_queued_rows']:.0f} queued")
    print(f"{arguments.requests / wall:.0f} requests/s")
    return list(problems(first, last, callers.tally, samples))


def _words(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))


def main() -> int:
    """Export, serve, soak; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=2_000, help="requests before growth counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, help="use this bundle instead of exporting the embedded model")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.bundle or _exported(Path(folder) / "bundle")
        with ServerProcess(path, *flags) as server:
            server.wait_until_serving()
            found = asyncio.run(soak(server, arguments))
            if (status := server.stop()) != 0:
                found.append(f"the server stopped with status {status}")
            found += [f"logged: {r}" for r in server.log.records() if r["level"] in ("warning", "error")]
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0


def _exported(path: Path) -> Path:
    from beamline_export.bundle_writer import ExportOptions, export
    from beamline_export.progress import Progress

    return export(MODEL, path, ExportOptions("int8"), Progress()).path


if __name__ == "__main__":
    sys.exit(main())
