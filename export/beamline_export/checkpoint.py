"""Reads foreign checkpoints without trusting them: JSON configs and tensors, never pickled code."""

import json
import pickle
import stat
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from beamline_export.spec import Array, ExportError
from beamline_server.likeness import did_you_mean

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")
"""In order of preference; the first two may also come in shards, with an index beside them."""

_MOST_UNKNOWN, _LONGEST_SHOWN = 24, 60
"""Names in a message, and characters of one."""

_SUFFIXES = (".safetensors", ".pt", ".ckpt")
_WRAPPED_AS = ("state_dict", "model_state_dict", "model")
"""Where training loops keep the state dict in what they save: Lightning, PyTorch's tutorials, fairseq."""

MOST_BYTES = 64 << 20
"""Of a file that holds no weights: a tokenizer of 256,000 tokens has half as many."""
MOST_POSITIONS = 1 << 16
"""More than any model has; a search of 16 beams takes 2^20 slots for as many tokens."""
MOST_LAYERS = 1024
MOST_TENSORS = 1 << 16
"""More than so many layers have."""
_MOST = 1 << 24
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
_ARCHIVE = b"PK\x03\x04"
_MOST_GROWTH = 8
"""How many times a weights file's size its tensors may have in fp32: bytes become four times as many, and parts of a
tensor may stand beside it."""
_LEAST_ROOM = 1 << 20
_LONGEST_NAME = 1000
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def check_file(file: Path, most_bytes: int | None = MOST_BYTES) -> None:
    """Look at a file before it is opened: a pipe would keep its reader waiting, and a device would never end.

    Raises:
        ExportError: it is no regular file, is larger than `most_bytes`, or is what Git LFS leaves in place of one: some
            lines of text. A file that is not there, or cannot be read, is left to its reader.
    """
    try:
        status = file.stat()
        start = b""
        if stat.S_ISREG(status.st_mode):
            with file.open("rb") as stream:
                start = stream.read(len(_LFS_POINTER))
    except (OSError, ValueError):  # a name that no file can have
        return
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise ExportError(f"{file} is {kind}, not a file; put a file in its place")
    if most_bytes is not None and status.st_size > most_bytes:
        raise ExportError(
            f"{file} has {status.st_size:,} bytes, more than any such file needs ({most_bytes:,}); download it again"
        )
    if start == _LFS_POINTER:
        raise ExportError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ExportError: it cannot be read or is no JSON object.
    """
    check_file(path)
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
        if _is_there(folder / name):
            return [folder / name]
        index = folder / f"{name}.index.json"
        if _is_there(index):
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ExportError(f"{index} has no weight_map of file names")
            for shard in shards.values():
                if not shard or Path(shard).name != shard:
                    raise ExportError(f"{index} names {shard!r}, which is no file of the folder")
            return [folder / shard for shard in sorted(set(shards.values()))]
    like = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    named = "model.safetensors" if like and like[0].endswith(".safetensors") else "model.pt"
    hint = f"; if {like[0]} holds them, call it {named}" if like else ""
    raise ExportError(f"{folder} holds no weights; one of {', '.join(WEIGHT_FILES)} is expected{hint}")


def _is_there(file: Path) -> bool:
    """Whether there is such a file, or a link that leads nowhere, which its reader will name."""
    return file.exists() or file.is_symlink()


def weight_files_not_read(folder: Path) -> Iterator[str]:
    """What the user should know of weights that stand beside those that are read."""
    found = [name for name in WEIGHT_FILES if (folder / name).exists() or (folder / f"{name}.index.json").exists()]
    if len(found) > 1:
        yield f"the weights are those of {found[0]}; not read: {', '.join(found[1:])}"


def _read_tensors(file: Path) -> dict[str, Array]:
    """One file's tensors; one tensor under two names (tied weights) is one array, so that it is stored once."""
    tensors = _load(file)
    if isinstance(tensors, dict):
        tensors = next((inner for name in _WRAPPED_AS if isinstance(inner := tensors.get(name), dict)), tensors)
    if not isinstance(tensors, dict):
        raise ExportError(f"{file} holds a {type(tensors).__name__}, not a state dict; save model.state_dict()")
    _check_names(file, tensors.keys())
    if problems := [f"{name} is {problem}" for name, value in tensors.items() if (problem := _problem(value))]:
        shown = "; ".join(problems[:5])
        raise ExportError(f"{file} holds more than plain tensors ({shown}); save model.state_dict() alone")
    arrays: dict[object, Array] = {}
    result: dict[str, Array] = {}
    room = max(_MOST_GROWTH * file.stat().st_size, _LEAST_ROOM)
    # Popped one by one: of a half-precision checkpoint, only one copy is in memory as a whole.
    for name in list(tensors):
        tensor = tensors.pop(name).detach()
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        if key not in arrays:
            room -= 4 * tensor.numel()
            if room < 0:
                raise ExportError(
                    f"{file} holds the same numbers in many tensors, more than {_MOST_GROWTH} times its size in all; "
                    "save model.state_dict() of the model alone"
                )
            arrays[key] = _as_fp32(file, str(name), tensor)
        result[str(name)] = arrays[key]
    return result


def _check_names(file: Path, names: Collection[object]) -> None:
    if len(names) > MOST_TENSORS:
        raise ExportError(
            f"{file} holds {len(names):,} tensors, more than any model has ({MOST_TENSORS:,}); save model.state_dict()"
        )
    if longest := max((str(name) for name in names if len(str(name)) > _LONGEST_NAME), default=None):
        raise ExportError(f"{file} holds a tensor with a name of {len(longest):,} characters; save model.state_dict()")


def _load(file: Path) -> Any:
    check_file(file, None)
    try:
        return _load_safetensors(file) if file.suffix == ".safetensors" else _load_pickled(file)
    except ExportError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's own text explains how to run the code in the file.
        reason = "it holds Python objects other than tensors, or is damaged; none of its code was run"
        raise ExportError(f"{file}: {reason}: save model.state_dict(), best as safetensors") from error
    except Exception as error:  # every reader raises its own kinds; all mean the same to the user
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ExportError(f"{file} cannot be read as a weights file ({reason}); download or save it again") from error


def _load_safetensors(file: Path) -> dict[str, Any]:
    """The reader itself checks that no tensor lies outside the file, or over another one."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        _check_names(file, opened.keys())
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def _load_pickled(file: Path) -> Any:
    """What torch.save wrote, in the archive of today or in the pickles of before.

    An archive may be small and hold much: compressed, or the same bytes under many names. The former is refused, the
    latter mapped, so that no tensor is more than the file.
    """
    import torch

    with file.open("rb") as stream:
        archive = stream.read(len(_ARCHIVE)) == _ARCHIVE
    if archive:
        with zipfile.ZipFile(file) as entries:
            packed = [entry for entry in entries.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ExportError(
                f"{file}: {packed[0].filename[:60]} in it is compressed, as torch.save does not do; save it again with "
                "torch.save, or best as safetensors"
            )
    with warnings.catch_warnings():  # how the file was pickled is for its reader to know
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)


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


def _as_fp32(file: Path, name: str, tensor: Any) -> Array:
    import torch

    try:
        # NumPy's own way would give a single number a dimension.
        array: Array = tensor.to(torch.float32).contiguous().numpy()
    except RuntimeError as error:  # types of less than a byte, for one
        reason = str(error).partition("\n")[0][:200]
        raise ExportError(f"{file}: {name} cannot be read as fp32 ({reason}); save it in fp32 or fp16") from error
    return array


class Fields:
    """Reads typed values out of a config and collects what is wrong with it. A null is an absent value."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self._data = data
        self._source = source
        self._asked: set[str] = set()
        self.problems: list[str] = []

    @property
    def given(self) -> Mapping[str, Any]:
        """All of it, as it stands there."""
        return self._data

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
        unknown = sorted(self.unasked() - set(known))
        for name in unknown[:_MOST_UNKNOWN]:
            like = did_you_mean(name[:_LONGEST_SHOWN], self._asked | set(known))
            hint = f" (did you mean {meant[name]}?)" if meant and name in meant else like
            self.problems.append(f"{within}{_cut(name)} is not known{hint}")
        if len(unknown) > _MOST_UNKNOWN:
            self.problems.append(f"{within}{len(unknown) - _MOST_UNKNOWN} more are not known")

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
    try:
        return _cut(repr(value))
    except ValueError:  # Python shows no whole number of more than some thousand digits
        return "a number of thousands of digits"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}…"
