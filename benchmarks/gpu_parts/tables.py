"""The results as Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

GOAL_TRANSFORMERS = 10.0
GOAL_FLOOR = 3.0
GOAL_BATCH = 64

Results = Mapping[str, Mapping[str, Any]]


def markdown(results: Results) -> str:
    """All tables; parts that failed or did not run say why."""
    return "\n".join([*_head(results), *_goals(results), *_steps(results), *_throughput(results), *_rest(results), ""])


def figures(results: Results, part: str) -> Any:
    """What a part has measured, or an empty mapping."""
    return results.get(part, {}).get("result") or {}


def _head(results: Results) -> Iterator[str]:
    machine, limits = figures(results, "machine"), figures(results, "limits")
    yield f"# {machine.get('gpu') or 'dry run on a CPU: figures mean nothing'}"
    yield ""
    yield (
        f"onnxruntime {machine.get('onnxruntime')}, PyTorch {machine.get('torch')}, "
        f"transformers {machine.get('transformers')}, Python {machine.get('python')}, {machine.get('cores')} cores."
    )
    if limits:
        graph = limits["graph_launch_us"]
        yield (
            f"Memory: {limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s (a copy, read and written bytes). An empty kernel: "
            f"{limits['launch_us']:.2f} µs, in a CUDA graph {'-' if graph is None else f'{graph:.2f}'} µs."
        )
    yield ""
    yield "| part | |"
    yield "|---|---|"
    for name, outcome in results.items():
        told = "done" if outcome["ok"] else str(outcome["error"]).strip().splitlines()[-1][:300]
        yield f"| {name} | {told}, {outcome['seconds']:.0f} s |"
    yield ""


def _goals(results: Results) -> Iterator[str]:
    ratio, over = speedup(results, GOAL_BATCH), best_over_floor(results)
    yield "| goal | | measured |"
    yield "|---|---|---|"
    yield f"| transformers fp16 `generate`, batch {GOAL_BATCH} × beam 4 | ≥ {GOAL_TRANSFORMERS:g} × | {_cell(ratio)} |"
    yield f"| step over its floor, {GOAL_BATCH * 4} rows, graphs | ≤ {GOAL_FLOOR:g} | {_cell(over)} |"
    yield ""


def speedup(results: Results, batch: int) -> float | None:
    """Engine over transformers in tokens per second at a batch size."""
    ours, theirs = (
        {row["batch"]: row["tokens_per_s"] for row in figures(results, part).get("batches", [])}
        for part in ("offline", "transformers")
    )
    return ours[batch] / theirs[batch] if batch in ours and batch in theirs else None


def best_over_floor(results: Results) -> float | None:
    """Step over floor at the goal's rows with graphs."""
    rows = figures(results, "steps").get("steps", [])
    found = [
        row["over_floor"] for row in rows if row["graphs"] and row["rows"] == GOAL_BATCH * 4 and "over_floor" in row
    ]
    return found[0] if found else None


def _steps(results: Results) -> Iterator[str]:
    for part in ("steps", "large_steps"):
        found = figures(results, part)
        if not found:
            continue
        yield f"## Decoder step, {found['model']}, {found['weight_bytes'] / 1e6:.0f} MB of weights"
        yield ""
        yield "| rows | kernel by kernel | graph | of it run | floor: bytes | floor: launches | graph over floor |"
        yield "|---|---|---|---|---|---|---|"
        by_rows: dict[int, dict[bool, Any]] = {}
        for row in found["steps"]:
            by_rows.setdefault(row["rows"], {})[row["graphs"]] = row
        for rows, pair in by_rows.items():
            plain, graph = pair.get(False, {}), pair.get(True, {})
            cells = [plain.get("step_us"), graph.get("step_us"), graph.get("run_us")]
            cells += [graph.get("floor_memory_us"), graph.get("floor_launches_us")]
            times = " | ".join(_cell(cell, " µs") for cell in cells)
            yield f"| {rows} | {times} | {_cell(graph.get('over_floor'))} |"
        yield ""


def _throughput(results: Results) -> Iterator[str]:
    ours = {row["batch"]: row for row in figures(results, "offline").get("batches", [])}
    theirs = {row["batch"]: row for row in figures(results, "transformers").get("batches", [])}
    if ours or theirs:
        yield "## Output tokens per second, beam 4, forced length"
        yield ""
        yield "| batch | engine | transformers fp16 | ratio | engine's step |"
        yield "|---|---|---|---|---|"
        for batch in sorted(ours.keys() | theirs.keys()):
            a, b = ours.get(batch, {}), theirs.get(batch, {})
            cells = [_cell(row.get("tokens_per_s")) for row in (a, b)]
            cells += [_cell(speedup(results, batch)), _cell(a.get("step_ms"), " ms")]
            yield f"| {batch} | {' | '.join(cells)} |"
        yield ""
    for part, name in (("test_file", "engine"), ("transformers_test_file", "transformers fp16")):
        found = figures(results, part)
        if found:
            rates = f"{found['sentences_per_s']:.0f} sentences/s, {found['tokens_per_s']:.0f} tokens/s"
            yield f"Test file, {name}: {rates}."
    found = figures(results, "online")
    if found:
        through = found["throughput"]
        yield (
            f"Service, {found['callers']} callers in a closed loop: {through['answered_per_s']:.0f} answers/s, "
            f"{through['tokens_per_s']:.0f} tokens/s; start to SERVING {found['start_s']:.1f} s."
        )
    yield ""


def _rest(results: Results) -> Iterator[str]:
    parity, kernels, profile = (figures(results, part) for part in ("parity", "kernels", "profile"))
    yield "## Checks"
    yield ""
    if parity:
        yield (
            f"- fp16 against fp32 on the CPU: {parity['same_tokens']} of {parity['searches']} best hypotheses are the "
            f"same tokens; scores of those differ by at most {parity['largest_score_difference']:.1e}; "
            f"{parity['beyond_near_ties']} of the others are beyond near-ties."
        )
        graphs = parity["graphs"]
        yield (
            f"- {graphs['captured']} + {graphs['captured_encoder']} graphs captured; {graphs['same_bits_again']} of "
            f"{parity['searches']} searches give the same bits with graphs as without."
        )
    if profile:
        elsewhere = profile["nodes_not_on_the_device"] or "none"
        yield f"- Memcpy nodes in the step: {profile['memcpy_nodes']}; nodes that are not on the device: {elsewhere}."
    if kernels:
        used = ", ".join(sorted(set(kernels["attention"].values()))) or "not told"
        yield f"- Launches per step: {kernels['launches_per_step']:.0f}; attention kernels: {used}."


def _cell(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.2f}{unit}"
