"""Buffers in a state dict that are no weights: position tables, masks and numberings, known by their values."""

import re
from collections.abc import Collection
from itertools import product

import numpy as np
from numpy.typing import NDArray

from beamline_export.families.nn_layouts import SHARED_POSITIONS, SOURCE_POSITIONS, TARGET_POSITIONS
from beamline_export.families.positions import FORMULAS, interleaved_positions
from beamline_export.renamer import Renamer
from beamline_export.spec import Array, TransformerSpec

_LIKE_A_TABLE = r"pe|pos|(.*_)?positions?|.*pos(ition(al|s)?)?_?(enc|emb|table).*|.*sinusoid.*"
_SIDES = {
    SOURCE_POSITIONS: r"(^|[._])(src|source|encoder)([._]|$)|(^|\.)enc[._]",  # an "enc" at an end is an encoding
    TARGET_POSITIONS: r"(^|[._])(tgt|trg|target|decoder)([._]|$)|(^|\.)dec[._]",
}
_FIRST_POSITIONS = (0, 1, 2)
_ROWS_TO_TELL_BY = 64


def take_sinusoids(names: Renamer, spec: TransformerSpec) -> None:
    """The paper's position table for both stacks: what the file holds of it, and the rest computed.

    A buffer that holds something else although it is called like a table gets a remark.
    """
    tables = [
        names.origin(n)
        for n, a in names.left().items()
        if _is_like_a_table(n) and as_table(a, spec.d_model) is not None
    ]
    names.compute_positions(spec.max_source_positions, spec.d_model, interleaved_positions)
    expected = names.weights.get("source_positions")
    for name, array in names.left().items():
        table = as_table(array, spec.d_model)
        # Without an embedding there is nothing to compute, and the file is refused; the table is still no reason.
        paper = expected if table is None or expected is not None else interleaved_positions(*table.shape)
        if table is not None and paper is not None and _same(table, paper):
            # A file in half precision, say, has its own rounding.
            rows = min(len(table), len(paper))
            paper[:rows] = table[:rows]
            names.leave_out(name)
        elif _is_like_a_table(name):
            names.remark(name, _no_sinusoids(table, _how_to_use(names.origin(name), tables)))


def leave_out_masks(names: Renamer) -> None:
    """Causal masks and numberings of positions, which the graphs make themselves; counters get a remark."""
    for name, array in names.left().items():
        if _is_causal_mask(array):
            names.leave_out(name)
            names.notices.append(f"{names.origin(name)} is a causal mask, which every decoder has; it is left out")
        elif array.size > 1 and array.size == max(array.shape) and (array.ravel() == np.arange(array.size)).all():
            names.leave_out(name)
            names.notices.append(f"{names.origin(name)} only numbers positions; it is left out")
        elif not array.ndim:
            names.remark(name, "a single number, as counters are")


def as_table(array: Array, width: int) -> Array | None:
    """A table as (P, width) that was given as that, as (1, P, width) or as (P, 1, width); None if it is none."""
    rows = max(array.shape[:-1], default=0)
    if array.ndim < 2 or array.shape[-1] != width or array.size != rows * width:
        return None
    return array if array.ndim == 2 else array.reshape(rows, width)


def _same(table: Array, expected: Array) -> bool:
    """Whether the rows that both have are equal but for rounding: of values, and of angles, which grow with rows."""
    rows = min(len(table), len(expected))
    allowed = _half_step(table) + 1e-5 + 2.5e-7 * np.arange(rows)[:, None]
    return bool((np.abs(table[:rows] - expected[:rows]) <= allowed).all())


def _half_step(table: Array) -> float:
    """What values up to 1 may be off by if they were rounded to half precision, as it seems; else 0."""
    if not (table.view(np.uint32) & 0xFFFF).any():  # bfloat16 is the upper half of fp32
        return 2.0**-9
    with np.errstate(over="ignore"):  # of a tensor that is no table
        return 2.0**-12 if (table.astype(np.float16) == table).all() else 0.0


def _is_like_a_table(name: str) -> bool:
    return any(re.fullmatch(_LIKE_A_TABLE, part) for part in name.split("."))


def _how_to_use(name: str, tables: Collection[str]) -> str:
    """What to set for a table of another formula, where the file has these tables in all."""
    sides = {table: [side for side, words in _SIDES.items() if re.search(words, table)] for table in tables}
    new, otherwise = SHARED_POSITIONS, ""
    if name in sides and sorted(sides.values()) == [[SOURCE_POSITIONS], [TARGET_POSITIONS]]:
        (new,) = sides[name]
    elif len(tables) > 1:
        new, otherwise = SOURCE_POSITIONS, f', or "{TARGET_POSITIONS}" if it is the target\'s'
    return f'to use it as it is, set "positions": "learned" and "names": {{"{name}": "{new}"}}{otherwise}'


def _no_sinusoids(table: Array | None, as_it_is: str) -> str:
    formula = None if table is None else _formula(table[:_ROWS_TO_TELL_BY])
    if formula is None:
        return f"not the sinusoidal table that the config asks for; {as_it_is}"
    return f"a sinusoidal table, but {formula}; {as_it_is}"


def _formula(table: Array) -> str | None:
    """The formula of a table that is not the paper's."""
    for (text, formula), first in product(FORMULAS.items(), _FIRST_POSITIONS):
        positions: NDArray[np.int64] = np.arange(first, first + len(table))
        if _same(table, formula(positions, table.shape[1])):
            return f"{text}, from position {first} on" if first else text
    return None


def _is_causal_mask(array: Array) -> bool:
    """Whether it is a square that tells the future, above the diagonal, from all else."""
    size = max(array.shape, default=0)
    if size < 2 or array.size != size * size or array.shape[-2:] != (size, size):
        return False
    square = array.reshape(size, size)
    future = np.triu(np.ones((size, size), np.bool_), 1)
    open_, hidden = np.unique(square[~future]), np.unique(square[future])
    if len(open_) != 1 or len(hidden) != 1:
        return False
    return (open_[0], hidden[0]) in ((0, 1), (1, 0)) or (open_[0] == 0 and hidden[0] <= -1e4)
