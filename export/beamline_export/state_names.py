"""What the tensors of somebody's state dict are called: prefixes of wrappers, and names that config.json translates."""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile

from beamline_export.spec import Array, ExportError
from beamline_server.likeness import did_you_mean

Translation = Mapping[str, str | None]
"""The `names` of a config.json: a name in the file -> what it becomes, or a beginning of names up to a dot -> what that
becomes; None leaves out what is called so."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes that torch.compile, FSDP and activation checkpointing put between a module and what it wraps."""

_MOST_SHOWN, _MOST_COMPARED = 8, 4096
"""Entries that are told of, and names that one is compared with to find what was meant: each takes its time."""

_COUNTER = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel counts; it stands beside the prefix that all else has."""


@dataclass(frozen=True, slots=True)
class NamedState:
    """A state dict after prefixes are left off and names are translated.

    Attributes:
        tensors: New name -> array.
        origins: New name -> name in the file.
        left_out: Name in the file of what the translation leaves out -> what it would be called otherwise.
        notices: What was left off.
    """

    tensors: dict[str, Array]
    origins: dict[str, str]
    left_out: dict[str, str]
    notices: tuple[str, ...]


def name_state(state: Mapping[str, Array], translation: Translation) -> NamedState:
    """Leave off the prefix that all names have, then translate them.

    Args:
        state: As read from the file.
        translation: Its names may be written with or without what is left off; what fits without, is without.

    Raises:
        ExportError: an entry of the translation fits no name, two are the same, or two tensors would have one name.
    """
    names = {origin: _unwrapped(origin) for origin, array in state.items() if origin != _COUNTER or array.ndim}
    prefix = _common_prefix(names.values())
    bare = {origin: name.removeprefix(prefix) for origin, name in names.items()}
    ordered = sorted(bare.values())
    written = {entry: _as_bare(entry, ordered, prefix) for entry in translation}
    entries = {written[entry]: new for entry, new in translation.items()}
    fitting = {origin: _fitting(name, entries) for origin, name in bare.items()}
    new = {origin: _translated(bare[origin], entry, entries) for origin, entry in fitting.items()}
    unused = entries.keys() - fitting.values()
    if problems := [*_no_names(unused, bare.values()), *_same_entries(written), *_doubles(new)]:
        raise ExportError(f"config.json: names: {'; '.join(problems)}")
    origins = {name: origin for origin, name in new.items() if name is not None}
    tensors = {name: state[origin] for name, origin in origins.items()}
    kept = {entry: new for entry, new in entries.items() if new is not None}
    left_out = {
        origin: str(_translated(bare[origin], _fitting(bare[origin], kept), kept))
        for origin, name in new.items()
        if name is None
    }
    return NamedState(tensors, origins, left_out, tuple(_left_off(state, prefix)))


def unknown_targets(translation: Translation, known: Collection[str]) -> Iterator[str]:
    """What is wrong with the right side of a translation, if these are the names that a model has; the first of it."""
    yield from islice(_unknown_targets(translation, known), _MOST_SHOWN)


def _unknown_targets(translation: Translation, known: Collection[str]) -> Iterator[str]:
    ordered = sorted(known)
    for entry, new in translation.items():
        whole = new if new is not None and not entry.endswith(".") else None
        if whole is not None and whole not in known:
            yield f"{entry!r} becomes {whole!r}, which is not known{_hint(whole, known)}"
        elif new and whole is None and not _fits_any(new, ordered):
            yield f"{entry!r} becomes {new!r}, which no known name begins with"


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _common_prefix(names: Collection[str]) -> str:
    """What all names begin with, up to a dot."""
    if len(names) < 2:
        return ""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, levels))


def _left_off(state: Mapping[str, Array], prefix: str) -> Iterator[str]:
    for wrapper in _WRAPPERS:
        if any(wrapper in name.split(".") for name in state):
            yield f"names in the file contain '{wrapper}.'; it is left off"
    if prefix:
        yield f"names in the file begin with {prefix!r}; it is left off"


def _as_bare(entry: str, names: Sequence[str], prefix: str) -> str:
    """An entry without what is left off of all names, unless it fits some of them, which are sorted, as it is."""
    # Inside the common prefix, there may be a module of the same name.
    whole = _unwrapped(entry)
    return whole if _fits_any(whole, names) else whole.removeprefix(prefix)


def _fits_any(entry: str, names: Sequence[str]) -> bool:
    """Whether one of the sorted names is the entry, or begins with it if it ends with a dot."""
    place = bisect_left(names, entry)
    first = names[place] if place < len(names) else None
    return first is not None and (first == entry or (entry.endswith(".") and first.startswith(entry)))


def _entries_that_fit(name: str) -> Iterator[str]:
    """What an entry may be to fit a name: the name, or a beginning of it up to a dot; the longest first."""
    yield name
    dot = len(name)
    while (dot := name.rfind(".", 0, dot)) >= 0:
        yield name[: dot + 1]


def _fitting(name: str, entries: Translation) -> str | None:
    """The entry that is the name, or the longest that it begins with."""
    # What was written as the common prefix is empty by now, and fits all.
    return next((entry for entry in chain(_entries_that_fit(name), [""]) if entry in entries), None)


def _translated(name: str, entry: str | None, entries: Translation) -> str | None:
    if entry is None:
        return name
    new = entries[entry]
    return None if new is None else new + name.removeprefix(entry)


def _no_names(unused: Collection[str], names: Collection[str]) -> Iterator[str]:
    for entry in sorted(unused)[:_MOST_SHOWN]:
        kind = "no name in the file begins with" if entry.endswith(".") else "no name in the file is"
        yield f"{kind} {entry!r}{_hint(entry, names)}"
    if len(unused) > _MOST_SHOWN:
        yield f"{len(unused) - _MOST_SHOWN} more fit no name"


def _hint(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, islice(known, _MOST_COMPARED))


def _same_entries(written: Mapping[str, str]) -> Iterator[str]:
    first: dict[str, str] = {}
    for entry, bare in written.items():
        if first.setdefault(bare, entry) != entry:
            yield f"{first[bare]!r} and {entry!r} are one name; keep one of the two"


def _doubles(new: Mapping[str, str | None]) -> Iterator[str]:
    first: dict[str, str] = {}
    for origin, name in new.items():
        if name is not None and first.setdefault(name, origin) != origin:
            yield f"{first[name]} and {origin} are both called {name}"
