"""From the names that a family gives its tensors to the canonical ones, with an account of what was left."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from beamline_export.spec import Array, ExportError

_MOST_ABSENT = 4
MOST_COMPUTED = 1 << 26
"""Numbers in a position table: 65,536 positions of a width of 1,024."""


class Renamer:
    """Takes tensors out of a state dict under their canonical names and tells what was left.

    Args:
        state: Tensors by the names that a family gives them.
        origins: What those are called in the file that are not called so there.

    Attributes:
        weights: Canonical name -> array.
        names: Canonical name -> name in the file, for messages.
        known: Every name that was asked for.
        notices: What the user should know about the file.
    """

    def __init__(self, state: Mapping[str, Array], origins: Mapping[str, str] | None = None) -> None:
        self._state = dict(state)
        self._origins = origins or {}
        self._taken: set[str] = set()
        self.weights: dict[str, Array] = {}
        self.names: dict[str, str] = {}
        self.known: set[str] = set()
        self.notices: list[str] = []
        self._remarks: dict[str, str] = {}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        self.known.add(name)
        return name in self._state

    def origin(self, name: str) -> str:
        """What a tensor is called in the file."""
        return self._origins.get(name, name)

    def take(self, canonical: str, *names: str) -> None:
        """The first of `names` that exists becomes `canonical`; if none does, `check_weights` will report it."""
        self.names.setdefault(canonical, self.origin(names[0]))
        for name in names:
            if self.has(name):
                if canonical not in self.weights:
                    self.weights[canonical] = self._state[name]
                    self.names[canonical] = self.origin(name)
                self._taken.add(name)

    def tell_absent_biases(self, told: Collection[str] = ()) -> None:
        """Note those that are taken for zeros although the file has others: a model has all or none, as a rule.

        Args:
            told: Names that were left out on purpose.
        """
        biases = sorted(name for name in self.known if name.endswith("bias") and name not in told)
        absent = [self.origin(name) for name in biases if name not in self._state]
        if 0 < len(absent) < len(biases):
            more = f" and {len(absent) - _MOST_ABSENT} more" if len(absent) > _MOST_ABSENT else ""
            listed = f"{', '.join(absent[:_MOST_ABSENT])}{more}"
            self.notices.append(
                f"not in the file: {listed}; zeros are used, which is right if the model has none there"
            )

    def compute_positions(self, positions: int, width: int, table: Callable[[int, int], Array]) -> None:
        """One table (positions, width) for both stacks, by a family's formula, where there is none yet.

        Raises:
            ExportError: the embeddings are of another width, or the table would have more numbers than any model's: one
                of any size could be asked for.
        """
        embedding = self.weights.get("source_embedding")
        if embedding is not None and embedding.shape[-1:] != (width,):
            shape, name = list(embedding.shape), self.names["source_embedding"]
            raise ExportError(f"the checkpoint does not fit its config: {name} has shape {shape}, d_model is {width}")
        if embedding is not None and positions * width > MOST_COMPUTED:
            raise ExportError(
                f"the config asks for {positions} positions of {width} numbers, more than any model has "
                f"({MOST_COMPUTED:,} numbers); correct it"
            )
        if embedding is not None:
            computed = table(positions, width)
            self.weights.setdefault("source_positions", computed)
            self.weights.setdefault("target_positions", computed)

    def module(self, canonical: str, name: str) -> None:
        """`name.weight` and `name.bias`; an absent bias is zero."""
        self.take(f"{canonical}.weight", f"{name}.weight")
        self.take(f"{canonical}.bias", f"{name}.bias")
        weight = self.weights.get(f"{canonical}.weight")
        if f"{canonical}.bias" not in self.weights and weight is not None:
            self.weights[f"{canonical}.bias"] = np.zeros(weight.shape[:1], np.float32)

    def weight_alone(self, canonical: str, name: str) -> None:
        """`name.weight` of a linear layer that has no bias: it becomes zero."""
        self.take(f"{canonical}.weight", f"{name}.weight")
        if (weight := self.weights.get(f"{canonical}.weight")) is not None:
            self.weights[f"{canonical}.bias"] = np.zeros(weight.shape[:1], np.float32)

    def change(self, name: str, make: Callable[[Array], Array]) -> None:
        """Put another tensor in the place of one that is there and has not been taken."""
        if name in self._state:
            self._state[name] = make(self._state[name])

    def thirds(self, canonical: Sequence[str], stem: str) -> None:
        """Three linear layers that are kept as one, one above the other: `stem` + weight and `stem` + bias."""
        weight = self._state.get(f"{stem}weight")
        for kind, default in (
            ("weight", None),
            ("bias", None if weight is None else np.zeros(weight.shape[:1], np.float32)),
        ):
            whole = self._state[f"{stem}{kind}"] if self.has(f"{stem}{kind}") else default
            self._taken.add(f"{stem}{kind}")
            for i, name in enumerate(canonical):
                self.names[f"{name}.{kind}"] = self.origin(f"{stem}{kind}")
                if whole is not None and whole.ndim:
                    third = -(-len(whole) // 3)
                    self.weights[f"{name}.{kind}"] = whole[i * third : (i + 1) * third]
                elif whole is not None:  # a lone number: its shape will be told
                    self.weights[f"{name}.{kind}"] = whole

    def ignore(self, pattern: str) -> None:
        """Tensors that carry no information of their own."""
        self._taken |= {name for name in self._state if re.fullmatch(pattern, name)}

    def leave_out(self, name: str) -> None:
        """A tensor that the model does without."""
        self._taken.add(name)

    def share_equal(self, *canonical: str) -> None:
        """Tables that were saved twice become one array, which is stored once."""
        for i, name in enumerate(canonical):
            for other in canonical[:i]:
                table, first = self.weights.get(name), self.weights.get(other)
                if table is not None and first is not None and np.array_equal(table, first):
                    self.weights[name] = first
                    break

    def tell_untied(self, setting: str, *canonical: str) -> None:
        """Say so where the file holds different tables although a setting ("X is true") makes them one."""
        tables = {id(self.weights[name]): self.names[name] for name in canonical if name in self.weights}
        if len(tables) > 1:
            found = " and ".join(tables.values())
            self.notices.append(f"{setting}, but {found} differ in the file; each is used as it is")

    def left(self) -> dict[str, Array]:
        """What nothing has taken."""
        return {name: array for name, array in self._state.items() if name not in self._taken}

    def remark(self, name: str, text: str) -> None:
        """Say what a tensor is, if nothing takes it."""
        self._remarks[name] = text

    def foreign(self) -> dict[str, str]:
        """Name in the file of what nothing has taken -> its shape and what was remarked: `check_weights` reports it."""
        return {
            self.origin(name): f"{list(array.shape)}{f' ({self._remarks[name]})' if name in self._remarks else ''}"
            for name, array in self.left().items()
        }
