"""The figures to reach, and what was measured of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from offline.contenders import (
    BEAMLINE_CALIBRATED,
    BEAMLINE_FP32,
    BEAMLINE_INT8,
    CTRANSLATE2_FP32,
    CTRANSLATE2_INT8,
    CTRANSLATE2_INT8_AVX512,
    TRANSFORMERS,
)
from offline.models import BASE_16K, BASE_58K, FR_EN
from offline.ratios import Spread, spread
from offline.results import Results, comparison_key

Online = Mapping[str, Spread]
"""Figures of the service, which another script measures: by the name that a target has for them."""


class Verdict(Enum):
    """How a measured figure stands to its target."""

    STRETCH = "met, stretch too"
    MET = "met"
    SHORT = "short"
    MISSING = "not measured"


@dataclass(frozen=True, slots=True)
class Target:
    """One figure to reach.

    Attributes:
        title: What is measured.
        limit: At least (or at most) this.
        measured: Finds it in the results; None if it was not measured.
        unit: Behind a number, with the space that it wants.
        at_most: Whether less is better.
        stretch: A limit beyond the limit.
        digits: After the point.
    """

    title: str
    limit: float
    measured: Callable[[Results, Online], Spread | None]
    unit: str = " ×"
    at_most: bool = False
    stretch: float | None = None
    digits: int = 2

    def verdict(self, value: Spread | None) -> Verdict:
        """By the median."""
        if value is None:
            return Verdict.MISSING
        if self.stretch is not None and self._reaches(value.median, self.stretch):
            return Verdict.STRETCH
        return Verdict.MET if self._reaches(value.median, self.limit) else Verdict.SHORT

    def _reaches(self, value: float, limit: float) -> bool:
        return value <= limit if self.at_most else value >= limit

    @property
    def wanted(self) -> str:
        """The limit in words."""
        sign = "≤" if self.at_most else "≥"
        beyond = "" if self.stretch is None else f", stretch {self.stretch:g}{self.unit}"
        return f"{sign} {self.limit:g}{self.unit}{beyond}"

    def told(self, value: Spread | None) -> str:
        """The median, the least and the greatest in words."""
        if value is None:
            return "–"
        middle, low, high = (f"{v:.{self.digits}f}" for v in (value.median, value.low, value.high))
        return f"{middle}{self.unit}" + ("" if low == high else f" ({low}–{high})")


_INT8 = (("int8", BEAMLINE_INT8), ("int8 calibrated", BEAMLINE_CALIBRATED))
_CTRANSLATE2_INT8 = (CTRANSLATE2_INT8, CTRANSLATE2_INT8_AVX512)
"""At its best: whichever of these is faster."""


def _speedup(model: str, batch: int | None, ours: str, *theirs: str) -> Callable[[Results, Online], Spread | None]:
    """Over the fastest of some peers."""

    def find(results: Results, _: Online) -> Spread | None:
        comparison = results.comparisons.get(comparison_key(model, batch))
        found = [comparison.speedup(ours, name) for name in theirs] if comparison else []
        return min((value for value in found if value), key=lambda value: value.median, default=None)

    return find


def _latency(model: str, ours: str, *theirs: str) -> Callable[[Results, Online], Spread | None]:
    """Over the fastest of some peers."""

    def find(results: Results, _: Online) -> Spread | None:
        comparison = results.comparisons.get(comparison_key(model, 1))
        found = [comparison.latency_ratio(ours, name) for name in theirs] if comparison else []
        return max((value for value in found if value), key=lambda value: value.median, default=None)

    return find


def _figure(name: str, factor: float = 1.0) -> Callable[[Results, Online], Spread | None]:
    def find(results: Results, _: Online) -> Spread | None:
        figure = results.figures.get(name)
        return None if figure is None else spread([factor * value for value in figure.values])

    return find


def _online(name: str) -> Callable[[Results, Online], Spread | None]:
    return lambda _, online: online.get(name)


def _bleu_loss(name: str) -> Callable[[Results, Online], Spread | None]:
    def find(results: Results, _: Online) -> Spread | None:
        fp32, int8 = (results.figures.get(f"BLEU, {each}") for each in (BEAMLINE_FP32, name))
        return None if fp32 is None or int8 is None else spread([fp32.spread.median - int8.spread.median])

    return find


SERVER_BASE_BYTES, SERVER_PER_WEIGHT = 120e6, 1.5
RESIDENT = f"resident when SERVING, {BASE_16K}, {BEAMLINE_INT8}"


def _resident_share(results: Results, _: Online) -> Spread | None:
    figure = results.figures.get(RESIDENT)
    if figure is None:
        return None
    allowed = SERVER_BASE_BYTES + SERVER_PER_WEIGHT * figure.facts["weights_bytes"] + figure.facts["pools_bytes"]
    return spread([value / allowed for value in figure.values])


_SIZES = {BASE_16K: "16k", BASE_58K: "58k"}
_AT = {1: 1.5, 8: 1.4, 32: 1.3}
_PER_TOKEN = "per token, 200 over 20"

TARGETS: tuple[Target, ...] = (
    *(
        Target(f"fr-en test file, {ours} / CTranslate2 int8", 1.5, _speedup(FR_EN, None, name, *_CTRANSLATE2_INT8))
        for ours, name in _INT8
    ),
    Target(
        "fr-en test file, fp32 / CTranslate2 fp32",
        1.15,
        _speedup(FR_EN, None, BEAMLINE_FP32, CTRANSLATE2_FP32),
        stretch=1.3,
    ),
    *(
        Target(
            f"{model}, batch {batch}, {ours} / CTranslate2 int8",
            limit,
            _speedup(model, batch, name, *_CTRANSLATE2_INT8),
        )
        for ours, name in _INT8
        for model in _SIZES
        for batch, limit in _AT.items()
    ),
    *(
        Target(f"{model}, batch 8, {ours} / transformers fp32", limit, _speedup(model, 8, name, TRANSFORMERS), digits=1)
        for model in _SIZES
        for ours, name, limit in (("int8", BEAMLINE_INT8, 5.0), ("fp32", BEAMLINE_FP32, 1.9))
    ),
    *(
        Target(f"online rate at p99 ≤ 500 ms, {workload} / {peer}", limit, _online(f"{key}, {workload}"))
        for key, peer, limits in (
            ("request-level batching", "request-level batching", (1.3, 2.0)),
            ("CTranslate2 with dynamic batching", "CTranslate2 with dynamic batching", (1.5, 2.0)),
        )
        for workload, limit in zip(("test sentences", "mixed"), limits, strict=True)
    ),
    *(
        Target(
            f"fr-en, one idle request, p50, {ours} / CTranslate2 int8",
            0.7,
            _latency(FR_EN, name, *_CTRANSLATE2_INT8),
            at_most=True,
        )
        for ours, name in _INT8
    ),
    *(
        Target(
            f"{model}, 32 × 4-row step over its GEMM floor, {precision}",
            limit,
            _figure(f"step over its floor, {model}, {name}"),
            at_most=True,
        )
        for model in _SIZES
        for precision, name, limit in (("int8", BEAMLINE_INT8, 1.6), ("fp32", BEAMLINE_FP32, 1.25))
    ),
    Target(
        "fr-en int8, 32 × 4 rows, time outside session.run",
        8,
        _figure(f"outside session.run, {FR_EN}, {BEAMLINE_INT8}", 100),
        unit=" %",
        at_most=True,
        digits=1,
    ),
    *(
        Target(
            f"{model} int8, time per token at 200 tokens / at 20",
            1.4,
            _figure(f"{_PER_TOKEN}, {model}, {BEAMLINE_INT8}"),
            at_most=True,
        )
        for model in (FR_EN, BASE_16K)
    ),
    *(
        Target(
            f"{model} int8, 31 short sentences beside one of 200 tokens / without it",
            1.2,
            _figure(f"beside a long sentence, {model}, {BEAMLINE_INT8}"),
            at_most=True,
        )
        for model in (FR_EN, BASE_16K)
    ),
    Target(
        f"{BASE_16K} int8, start to SERVING",
        2,
        _figure(f"start to SERVING, {BASE_16K}, {BEAMLINE_INT8}"),
        unit=" s",
        at_most=True,
    ),
    Target(
        f"{BASE_16K} int8, resident when SERVING / (120 MB + 1.5 × weights + pools)", 1, _resident_share, at_most=True
    ),
    *(
        Target(f"fr-en, BLEU of fp32 - BLEU of {ours}", 0.2, _bleu_loss(name), unit="", at_most=True)
        for ours, name in _INT8
    ),
    *(
        Target(
            f"fr-en {precision}, answers alone the same as among all",
            100,
            _figure(f"alone as among all, {name}", 100),
            unit=" %",
        )
        for precision, name in (("int8", BEAMLINE_INT8), ("fp32", BEAMLINE_FP32))
    ),
)
