"""Who takes part, and in which settings. A further contender is one row of CONTENDERS."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offline.task import Setting

BEAMLINE_INT8 = "Beamline int8"
BEAMLINE_CALIBRATED = "Beamline int8 calibrated"
BEAMLINE_FP32 = "Beamline fp32"
SERVED = "Beamline int8 over gRPC"
CTRANSLATE2_INT8 = "CTranslate2 int8"
CTRANSLATE2_INT8_AVX512 = "CTranslate2 int8 AVX-512"
CTRANSLATE2_FP32 = "CTranslate2 fp32"
TRANSFORMERS = "transformers"
OPTIMUM = "optimum-onnx"


@dataclass(frozen=True, slots=True)
class Contender:
    """One of those who are compared.

    Attributes:
        name: In tables and in the JSON.
        kind: Of its worker, one of `worker.KINDS`.
        precision: int8 or fp32.
        slow: Whether it gets less to do where the amount is free.
        latency_only: Whether it takes part in single sentences of the embedded model alone.
        export: Beamline's: fields of ExportOptions for its bundle.
        variables: Of its process's environment.
        instruction: That it needs of the processor, as /proc/cpuinfo names it; None: nothing special.
    """

    name: str
    kind: str
    precision: str
    slow: bool = False
    latency_only: bool = False
    export: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is Beamline."""
        return self.kind.startswith("beamline")


CONTENDERS = (
    Contender(BEAMLINE_INT8, "beamline", "int8", export={"precision": "int8"}),
    Contender(
        BEAMLINE_CALIBRATED,
        "beamline",
        "int8",
        export={"precision": "int8", "calibrate": "models/fr-en/calibration.txt"},
    ),
    Contender(CTRANSLATE2_INT8, "ctranslate2", "int8"),
    # Left alone it takes AVX2 for what is not a product on some processors that have more; in fp32 it makes no odds.
    Contender(
        CTRANSLATE2_INT8_AVX512,
        "ctranslate2",
        "int8",
        variables={"CT2_FORCE_CPU_ISA": "AVX512"},
        instruction="avx512f",
    ),
    Contender(BEAMLINE_FP32, "beamline", "fp32", export={"precision": "fp32"}),
    Contender(CTRANSLATE2_FP32, "ctranslate2", "fp32"),
    Contender(TRANSFORMERS, "transformers", "fp32", slow=True),
    Contender(OPTIMUM, "optimum", "fp32", slow=True),
    Contender(SERVED, "beamline-served", "int8", latency_only=True, export={"precision": "int8"}),
)


def settings(kind: str, batch: int | None) -> list[Setting]:
    """The settings to choose the best of, on two cores.

    Args:
        kind: Of the contender.
        batch: Sentences that come at a time; None: all of them.
    """
    return {
        "beamline": _beamline,
        "beamline-served": _served,
        "ctranslate2": _ctranslate2,
        "transformers": _generating,
        "optimum": _generating,
    }[kind](batch)


def _beamline(batch: int | None) -> list[Setting]:
    if batch is None:
        splits, rows, orders = [(2, 1), (1, 2)], [128, 256, 384], ["file", "longest"]
    elif batch == 1:
        splits, rows, orders = [(1, 2), (1, 1)], [128], ["file"]
    else:
        splits, rows, orders = [(2, 1), (1, 2)], [128], ["longest"]
    return [
        {"workers": workers, "threads": threads, "rows": rows, "order": order}
        for (workers, threads), rows, order in itertools.product(splits, rows, orders)
    ]


def _served(_: int | None) -> list[Setting]:
    return [
        {"workers": workers, "threads_per_worker": threads, "log_level": "info"}
        for workers, threads in [(1, 2), (2, 1)]
    ]


def _ctranslate2(batch: int | None) -> list[Setting]:
    if batch is None:
        sizes = [*(("examples", size) for size in (16, 32, 64, 128)), *(("tokens", size) for size in (512, 1024))]
        return [
            {"workers": workers, "threads": threads, "batch": size, "batch_type": kind, "sorted": all_at_once}
            for (workers, threads), (kind, size), all_at_once in itertools.product(
                [(2, 1), (1, 2)], sizes, [True, False]
            )
            # Who gets batches as they come counts sentences.
            if all_at_once or kind == "examples"
        ]
    # A batch is either cut in two, a worker each, or computed whole by both threads of one worker.
    splits = [(1, 2, 1), (1, 1, 1)] if batch == 1 else [(2, 1, -(-batch // 2)), (1, 2, batch)]
    return [
        {"workers": workers, "threads": threads, "batch": size, "batch_type": "examples", "sorted": True}
        for workers, threads, size in splits
    ]


def _generating(batch: int | None) -> list[Setting]:
    if batch is None:
        return [{"threads": 2, "batch": size, "sorted": True} for size in (32, 64)]
    return [{"threads": threads, "batch": batch, "sorted": True} for threads in ((2, 1) if batch == 1 else (2,))]
