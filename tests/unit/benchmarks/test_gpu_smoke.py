"""The smoke test of `benchmarks/gpu.py`, on the CPU: the same code but for the provider."""

import json
from collections import Counter
from pathlib import Path

import pytest
from gpu_parts.setting import TINY, Setting
from gpu_parts.smoke import Check, SmokeFailed, judged_placement, run_checks, smoke

from beamline_server.engine.ort.settings import CPU, CUDA


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    return Setting("cpu", tmp_path / "out", tmp_path / "work", TINY)


def test_everything_is_asked_and_right_on_a_cpu(setting: Setting) -> None:
    told = smoke(setting)

    assert [check["ok"] for check in told["checks"]] == [True] * 8
    assert json.loads((setting.out / "smoke.json").read_text("utf-8")) == told
    assert [line.startswith("ok ") for line in told["lines"]] == [True] * 8
    assert "1 + 1 graphs; 6 of 6 steps give the plain run's bits" in told["lines"][-1]


def test_what_fails_is_named_and_does_not_keep_the_rest_from_being_asked(setting: Setting) -> None:
    """A damaged graph."""
    smoke(setting)
    graph = setting.work / "fr-en-fp16" / "decoder_step.onnx"
    graph.write_bytes(graph.read_bytes()[::-1])

    with pytest.raises(SmokeFailed, match="4 of 8 checks failed: bundles are exported, fp16 nodes are on the device, "):
        smoke(setting)

    told = json.loads((setting.out / "smoke.json").read_text("utf-8"))
    assert [check["name"] for check in told["checks"] if check["ok"]] == [
        *("a device answers", "rows are moved", "fp32 nodes are on the device", "fp32 agrees with fp32 on the CPU")
    ]


def test_a_check_that_raises_has_failed() -> None:
    def broken() -> tuple[bool, str]:
        raise ValueError("no kernel image")

    first, second = run_checks({"one": broken, "two": lambda: (True, "fine")})
    assert (first.name, first.ok) == ("one", False)
    assert str(first).startswith("FAILED one: ValueError: no kernel image (")
    assert str(second).startswith("ok     two: fine (")


@pytest.mark.parametrize(
    ("device", "nodes", "ok", "found"),
    [
        ("cuda", {(CUDA, "MatMul"): 3, (CUDA, "TopK"): 1}, True, "step: all 4"),
        ("cuda", {(CUDA, "MatMul"): 3, (CPU, "Clip"): 1}, False, f"step: Clip on {CPU}"),
        ("cpu", {(CPU, "MatMul"): 2}, True, "step: all 2"),
    ],
)
def test_a_node_elsewhere_is_named(device: str, nodes: dict[tuple[str, str], int], ok: bool, found: str) -> None:
    assert judged_placement(device, {"step": Counter(nodes)}) == (ok, found)


def test_a_check_reads_as_one_line() -> None:
    assert str(Check("a", True, "b")) == "ok     a: b"
