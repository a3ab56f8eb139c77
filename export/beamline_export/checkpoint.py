"""Reads foreign checkpoints without trusting them: JSON configs and tensors, never pickled code."""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beamline_export.spec import Array, ExportError
from beamline_server.likeness import did_you_mean

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")
"""In order of preference; the first two may also come in shards, with an index beside them."""

_SUFFIXES = (".safetensors", ".pt")

MOST_POSITIONS = 1 << 16
"""More than this the engine's widest seat could not hold at its widest beam."""
MOST_LAYERS = 1024
_MOST = 1 << 24
_MOST_ABSENT = 4
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def refuse_lfs_pointer(file: Path) -> None:
    """Where Git LFS has not fetched a file, a few lines of text stand in its place.

    Raises:
        ExportError: so it is with this file. One that cannot be read is left to its reader.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError:
        return
    if start == _LFS_POINTER:
        raise ExportError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ExportError: it cannot be read or is no JSON object.
    """
    refuse_lfs_pointer(path)
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object")
    return data


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """As `read_json`; None if the file is absent."""
    return read_json(path) if path.exists() else None


def read_state_dict(folder: Path) -> dict[str, Array]:
    """Every tensor of a checkpoint folder as fp32; safetensors is preferred, a PyTorch file read with weights_only.

    Raises:
        ExportError: no weights file is there, or it is broken, truncated or holds more than tensors.
    """
    result: dict[str, Array] = {}
    for file in _weight_files(folder):
        result |= _read_tensors(file)
    return result


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ExportError(f"{index} has no weight_map of file names")
            for shard in shards.values():
                if not shard or Path(shard).name != shard:
                    raise ExportError(f"{index} names {shard!r}, which is no file of the folder")
            return [folder / shard for shard in sorted(set(shards.values()))]
    like = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    hint = f"; if {like[0]} holds them, call it model{Path(like[0]).suffix}" if like else ""
    raise ExportError(f"{folder} holds no weights; one of {', '.join(WEIGHT_FILES)} is expected{hint}")


def weight_files_not_read(folder: Path) -> Iterator[str]:
    """What the user should know of weights that stand beside those that are read."""
    found = [name for name in WEIGHT_FILES if (folder / name).exists() or (folder / f"{name}.index.json").exists()]
    if len(found) > 1:
        yield f"the weights are those of {found[0]}; not read: {', '.join(found[1:])}"


def _read_tensors(file: Path) -> dict[str, Array]:
    """One file's tensors; one tensor under two names (tied weights) is one array, so that it is stored once."""
    tensors = _load(file)
    if not isinstance(tensors, dict):
        raise ExportError(f"{file} holds a {type(tensors).__name__}, not a state dict; save model.state_dict()")
    if problems := [f"{name} is {problem}" for name, value in tensors.items() if (problem := _problem(value))]:
        shown = "; ".join(problems[:5])
        raise ExportError(f"{file} holds more than plain tensors ({shown}); save model.state_dict() alone")
    arrays: dict[object, Array] = {}
    result: dict[str, Array] = {}
    # Popped one by one: of a half-precision checkpoint, only one copy is in memory as a whole.
    for name in list(tensors):
        tensor = tensors.pop(name).detach()
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        if key not in arrays:
            arrays[key] = _as_fp32(tensor)
        result[str(name)] = arrays[key]
    return result


def _load(file: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    refuse_lfs_pointer(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():  # how the file was pickled is for its reader to know
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own text explains how to run the code in the file.
        reason = "it holds Python objects other than tensors, or is damaged; none of its code was run"
        raise ExportError(f"{file}: {reason}: save model.state_dict(), best as safetensors") from error
    except Exception as error:  # every reader raises its own kinds; all mean the same to the user
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ExportError(f"{file} cannot be read as a weights file ({reason}); download or save it again") from error


def _problem(value: object) -> str | None:
    import torch

    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
        return f"no plain tensor ({value.dtype}, {value.layout}, {value.device})"
    # A few bytes, expanded, may claim any size.
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "larger than what the file holds of it"
    return None


def _as_fp32(tensor: Any) -> Array:
    import torch

    # NumPy's own way would give a single number a dimension.
    array: Array = tensor.to(torch.float32).contiguous().numpy()
    return array


class Fields:
    """Reads typed values out of a config and collects what is wrong with it. A null is an absent value."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self._data = data
        self._source = source
        self._asked: set[str] = set()
        self.problems: list[str] = []

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """A whole number from `least` to `most`."""
        value = self._value(name, default)
        if not _is_integer(value) or not least <= value <= most:
            wanted = f"{name} must be a whole number from {least} to {most}"
            self.problems.append(f"{name} is missing" if value is None else f"{wanted}, not {_shown(value)}")
            return least
        return int(value)

    def optional_id(self, name: str) -> int | None:
        """A token id, or None if it is absent or null."""
        return None if self._value(name, None) is None else self.integer(name, least=0)

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids, given as one number or a list of them; none if it is absent or null."""
        value = self._value(name, [])
        values = value if isinstance(value, list) else [value]
        if not all(_is_integer(i) and 0 <= i <= _MOST for i in values):
            self.problems.append(f"{name} must be token ids, not {_shown(value)}")
            return ()
        return tuple(values)

    def id_sequences(self, name: str) -> list[list[int]]:
        """A list of lists of token ids; empty if it is absent or null."""
        value = self._value(name, [])
        lists = isinstance(value, list) and all(isinstance(sequence, list) and sequence for sequence in value)
        if not lists or not all(_is_integer(i) and 0 <= i <= _MOST for sequence in value for i in sequence):
            self.problems.append(f"{name} must be a list of lists of token ids, not {_shown(value)}")
            return []
        return list(value)

    def number(self, name: str, default: float, *, least: float | None = None, most: float = 1e30) -> float:
        """A number from `least`, or -`most`, to `most`."""
        value, least = self._value(name, default), -most if least is None else least
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            self.problems.append(f"{name} must be a number from {least:g} to {most:g}, not {_shown(value)}")
            return default
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{name} must be true or false, not {_shown(value)}")
            return default
        return value

    def choice(self, name: str, known: Mapping[str, Any], default: str | None = None) -> Any:
        """One of the known values, by its name."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in known:
            wrong = "is missing" if value is None else f"{_shown(value)} is not known"
            self.problems.append(f"{name} {wrong} (known: {', '.join(known)})")
            return next(iter(known.values()))
        return known[value]

    def json_choice(self, name: str, known: Mapping[str, Any], default: str) -> Any:
        """One of the known values, by its JSON text."""
        value = self.raw(name)
        text = default if value is None else json.dumps(value)
        if text not in known:
            self.problems.append(f"{name} {_shown(value)} is not known (known: {', '.join(known)})")
        return known.get(text, known[default])

    def raw(self, name: str) -> Any:
        """Whatever stands there."""
        self._asked.add(name)
        return self._data.get(name)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty if it is absent or null."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            self.problems.append(f"{name} must be an object, not {_shown(value)}")
            return {}
        return value

    def must_be(self, name: str, expected: object) -> None:
        """A setting that changes the model and that only one value of is supported."""
        if self._value(name, expected) != expected:
            self.problems.append(f"{name} {_shown(self._data[name])} is not supported (only {json.dumps(expected)} is)")

    def unasked(self) -> set[str]:
        """Names that nobody has asked for; those that begin with an underscore are their owner's notes."""
        return {name for name in self._data if name not in self._asked and not name.startswith("_")}

    def refuse_unasked(self, known: Collection[str], within: str = "", meant: Mapping[str, str] | None = None) -> None:
        """Names that nobody has asked for are problems, but for `known` ones.

        `within` says what they are in; `meant` what some of them are called here, which likeness would not find.
        """
        for name in sorted(self.unasked() - set(known)):
            like = did_you_mean(name, self._asked | set(known))
            hint = f" (did you mean {meant[name]}?)" if meant and name in meant else like
            self.problems.append(f"{within}{name} is not known{hint}")

    def check(self) -> None:
        """Raise ExportError with all problems found so far, if any."""
        if self.problems:
            raise ExportError(f"{self._source}: {'; '.join(self.problems)}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        return default if value is None else value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value out of somebody's config, short enough for one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


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
        self._state = state
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
            ExportError: the embeddings are of another width: a table of any size could be asked for.
        """
        embedding = self.weights.get("source_embedding")
        if embedding is not None and embedding.shape[-1:] != (width,):
            shape, name = list(embedding.shape), self.names["source_embedding"]
            raise ExportError(f"the checkpoint does not fit its config: {name} has shape {shape}, d_model is {width}")
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
