"""Which known name was probably meant by one that is not known."""

import difflib
from collections.abc import Iterable

_LIKENESS = 0.7  # from which on a name may be meant by another one


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, or None if none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=_LIKENESS)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the known name that is most like this one; empty if none is like it."""
    found = closest(name, known)
    return "" if found is None else f" (did you mean {found}?)"
