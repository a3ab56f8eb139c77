"""Rotary positions (Su et al. 2021): what a config says of them, and the tables of cosines and sines."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beamline_export.checkpoint import Fields
from beamline_export.renamer import MOST_COMPUTED
from beamline_export.spec import Array, ExportError, RotaryPositions

_THETA = 10_000.0
_KINDS = ("default", "linear", "llama3")
_KNOWN = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
)  # fmt: skip
_MOST = 1 << 24
Tables = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Rotary:
    """How queries and keys are turned.

    Attributes:
        width: Numbers of a head that are turned, the first ones.
        theta: Base of the wavelengths.
        factor: What wavelengths are stretched by; all of them, or by `bounds` the long ones.
        bounds: Wavelengths up to the first are not stretched, from the second on they are by all of it (Llama 3).
    """

    width: int
    theta: float
    factor: float = 1.0
    bounds: tuple[float, float] | None = None

    @property
    def spec(self) -> RotaryPositions:
        """What graphs need to know."""
        return RotaryPositions(self.width)

    def tables(self, positions: int) -> Tables:
        """Cosines and sines of each position, (positions, width / 2), by PyTorch's own arithmetic in fp32.

        Raises:
            ExportError: they would have more numbers than any model's: a config could ask for any size.
        """
        import torch

        if positions * self.width > MOST_COMPUTED:
            raise ExportError(
                f"the config asks for {positions} positions of {self.width} numbers, more than any model has "
                f"({MOST_COMPUTED:,} numbers); correct it"
            )
        frequency = 1.0 / (self.theta ** (torch.arange(0, self.width, 2, dtype=torch.float) / self.width))
        angles = torch.arange(positions, dtype=torch.float)[:, None] * self._stretched(frequency)
        return {"rotary_cosine_positions": angles.cos().numpy(), "rotary_sine_positions": angles.sin().numpy()}

    def _stretched(self, frequency: Any) -> Any:
        import torch

        if self.bounds is None:
            return frequency / self.factor
        short, long = self.bounds
        length = 2 * math.pi / frequency
        stretched = torch.where(length > long, frequency / self.factor, frequency)
        # In between, from one to the other as the number of turns goes.
        part = (short * long / length - short) / (long - short)
        between = (1 - part) * stretched / self.factor + part * stretched
        return torch.where((length >= short) & (length <= long), between, stretched)


def read_rotary(
    fields: Fields, head_size: int, *, part: float = 1.0, theta_name: str = "rope_theta", part_name: str = ""
) -> Rotary:
    """What a config says: in `rope_parameters`, or as configs of before did, in `rope_scaling` and beside it.

    Args:
        fields: Of config.json; what is wrong is noted there.
        head_size: Numbers of a head.
        part: Which part of a head is turned, if nothing else is said.
        theta_name: The base's name outside of `rope_parameters`.
        part_name: The same of the part; empty if the family has none.
    """
    given: Mapping[str, Any] = fields.mapping("rope_scaling") or fields.mapping("rope_parameters")
    inner = Fields(given, "rope_parameters")
    usual_theta = fields.number(theta_name, _THETA, least=1.0)
    usual_part = fields.number(part_name, part, least=0.0, most=1.0) if part_name else part
    theta = inner.number("rope_theta", usual_theta, least=1.0)
    turned = inner.number("partial_rotary_factor", usual_part, least=0.0, most=1.0)
    turned = turned if part_name else fields.number("partial_rotary_factor", turned, least=0.0, most=1.0)
    if not part_name and turned != part:
        inner.problems.append(f"partial_rotary_factor {turned:g} is not supported here (only {part:g} is)")
    width = int(head_size * turned)
    kinds = {kind: kind for kind in _KINDS}
    kind = inner.choice("rope_type" if given.get("rope_type") is not None else "type", kinds, "default")
    factor = 1.0 if kind == "default" else inner.number("factor", 0.0, least=1.0)
    bounds = None
    if kind == "llama3":
        usual = fields.integer("max_position_embeddings", 2048, most=_MOST)
        before = inner.integer("original_max_position_embeddings", usual, most=_MOST)
        # As transformers, which prefer what stands outside.
        before = fields.integer("original_max_position_embeddings", before, most=_MOST)
        low = inner.number("low_freq_factor", 0.0, least=1e-6)
        high = inner.number("high_freq_factor", 0.0, least=1e-6)
        if low >= high and not inner.problems:
            inner.problems.append(f"low_freq_factor {low:g} is not less than high_freq_factor {high:g}")
        bounds = None if inner.problems else (before / high, before / low)
    inner.refuse_unasked(_KNOWN)
    if width < 2 or width % 2:
        inner.problems.append(f"{width} of the {head_size} numbers of a head are turned, which must be even and not 0")
    fields.problems += [f"rope_parameters: {problem}" for problem in inner.problems]
    return Rotary(width, theta, factor, bounds)
