"""How users write numbers, durations, shares and mixes on the command line; each error is one line."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")

_DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_DURATION = re.compile(rf"(?P<value>{_DECIMAL})(?P<unit>us|ms|s|m|h)?")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LARGEST_INTEGER = 10**9


class NotationUnusable(ValueError):
    """A text does not say what it should; one line that says how to write it."""


@dataclass(frozen=True, slots=True)
class Mix(Generic[ValueT]):
    """Values, and how often to draw each."""

    values: tuple[ValueT, ...]
    """Different from each other, at least one."""
    shares: tuple[float, ...]
    """Of each value, above 0, with sum 1."""


def parse_number(text: str) -> float:
    """A finite number, which may be negative.

    Raises:
        NotationUnusable: It is none.
    """
    if not re.fullmatch(rf"[+-]?(?:{_DECIMAL})", text.strip()) or not math.isfinite(float(text)):
        raise NotationUnusable(f"{text.strip()!r} is no number")
    return float(text)


def parse_positive_integer(text: str) -> int:
    """An integer from 1 to a thousand million.

    Raises:
        NotationUnusable: It is none.
    """
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 10 and 1 <= int(digits) <= _LARGEST_INTEGER):
        raise NotationUnusable(f"{digits!r} is no whole number above 0")
    return int(digits)


def parse_duration_s(text: str, *, unit: str | None = None) -> float:
    """A duration such as 500ms, 30s or 2m, in seconds; 0 is one.

    Args:
        text: What the user wrote.
        unit: The unit of a bare number: us, ms, s, m or h; with None, a bare number is an error unless it is 0.

    Raises:
        NotationUnusable: It is none, or has no end.
    """
    match = _DURATION.fullmatch(text.strip())
    written = (match["unit"] or unit) if match else None
    if match is not None and written is None and float(match["value"]) == 0:
        return 0.0
    if match is None or written is None or not math.isfinite(seconds := float(match["value"]) * _SECONDS[written]):
        raise NotationUnusable(f"{text.strip()!r} is no duration: write one such as 500ms, 30s or 2m")
    return seconds


def parse_duration_range_s(text: str) -> tuple[float, float]:
    """A range of durations such as 0-200ms, in seconds: least and greatest. The second's unit holds for a bare first.

    Raises:
        NotationUnusable: It is none, or its end lies before its start.
    """
    first, dash, last = text.partition("-")
    try:
        if not dash:
            raise NotationUnusable(f"{text.strip()!r} is no range of durations")
        highest_s = parse_duration_s(last)
        unit = _DURATION.fullmatch(last.strip())
        lowest_s = parse_duration_s(first, unit=unit["unit"] if unit else None)
    except NotationUnusable as error:
        raise NotationUnusable(f"{text.strip()!r} is no range of durations: write one such as 0-200ms") from error
    if lowest_s > highest_s:
        raise NotationUnusable(f"{text.strip()!r} ends before it starts: write the shorter duration first")
    return lowest_s, highest_s


def parse_share(text: str) -> float:
    """A share such as 20% or 0.2, as a number from 0 to 1.

    Raises:
        NotationUnusable: It is none.
    """
    try:
        value = _weight(text)
    except NotationUnusable:
        value = math.nan
    if not 0 <= value <= 1:
        raise NotationUnusable(f"{text.strip()!r} is no share: write one such as 20% or 0.2")
    return value


def parse_mix(text: str, parse: Callable[[str], ValueT]) -> Mix[ValueT]:
    """Values with their weights, such as "4" or "1:20%,4:80%"; only the weights' proportions count, 0 is left out.

    Args:
        text: What the user wrote.
        parse: Reads one value; raises NotationUnusable.

    Raises:
        NotationUnusable: A value or a weight is none, only some values have weights, or a value occurs twice.
    """
    parts = [part.rpartition(":") if ":" in part else (part, "", "") for part in text.split(",")]
    values = [parse(value) for value, _, _ in parts]
    written = [weight.strip() for _, colon, weight in parts if colon]
    if len(set(values)) < len(values):
        raise NotationUnusable(f"{text!r} names a value twice: name each once")
    if written and len(written) < len(parts):
        raise NotationUnusable(f"{text!r} weighs only some of its values: weigh all of them or none")
    if len({weight.endswith("%") for weight in written}) > 1:
        raise NotationUnusable(f"{text!r} has weights with and without %: write all in one way")
    weights = [_weight(weight) for weight in written] or [1.0] * len(values)
    total = sum(weights)
    if total <= 0 or not math.isfinite(total):
        raise NotationUnusable(f"{text!r} has weights of no use: at least one must be above 0")
    kept = [(value, weight / total) for value, weight in zip(values, weights, strict=True) if weight / total > 0]
    return Mix(tuple(value for value, _ in kept), tuple(weight for _, weight in kept))


def _weight(text: str) -> float:
    digits = text.strip()
    try:
        weight = parse_number(digits.removesuffix("%")) / (100 if digits.endswith("%") else 1)
    except NotationUnusable:
        weight = math.nan
    if not weight >= 0:
        raise NotationUnusable(f"{digits!r} is no weight: write one such as 80% or 0.8")
    return weight
