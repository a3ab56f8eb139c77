"""Loops compiled to machine code: the one module that imports numba.

    @compiled
    def decide(rules: Rules, table: Table, members: Integers) -> int:
        ...

    entry_point(decide, lambda: (Rules.example(), Table.of(1), np.zeros(1, np.int64)))

A compiled function keeps its Python type. An *entry point* is what Python code calls; it comes with the arguments of a
call, whose types are those of all calls. `make_ready` sees to machine code for all entry points; a function that only
compiled ones call needs no entry of its own.

Compiling takes seconds, so `engine/code_cache.py` keeps what comes of it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from beamline_server.engine.processor import processor, target

# numba reads them when it is imported.
os.environ.setdefault("NUMBA_CPU_NAME", target(processor()))
os.environ.setdefault("NUMBA_CPU_FEATURES", "")  # none of this machine's own

import numba
import numba.core.config
from numba.core.dispatcher import Dispatcher

from beamline_server.engine.code_cache import CodeCache, Types, first_writable

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_HERE = Path(__file__)


@dataclass(frozen=True, slots=True)
class Ready:
    """How entry points became ready.

    Attributes:
        compiled: How many were compiled.
        loaded: How many came from the cache.
        kept: Whether the cache has them all now.
        seconds: The time that it took.
    """

    compiled: int
    loaded: int
    kept: bool
    seconds: float


_entry_points: list[tuple[Any, Callable[[], tuple[Any, ...]]]] = []
"""numba's dispatchers, which find, load or compile the machine code for the types of a call; and examples of calls."""


def compiled(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Compile a function of a module when it is made ready or first called.

    It computes what Python would: sums are added up in the order they are written in, and a division by zero raises.
    Indices alone are not checked. With NUMBA_DISABLE_JIT=1 the function stays what it is.

    Raises:
        TypeError: it encloses variables of another function.
    """
    return _compiled(function, unlocked=False)


def compiled_unlocked(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """As `compiled`; while it runs, other threads run Python.

    It is for what takes long: to have the interpreter's lock back, it may wait for whoever has it then.
    """
    return _compiled(function, unlocked=True)


def _compiled(function: Callable[_Parameters, _Result], *, unlocked: bool) -> Callable[_Parameters, _Result]:
    if function.__closure__:
        raise TypeError(f"{function.__qualname__} encloses variables; make them arguments, or constants of the module")
    dispatcher = numba.njit(nogil=unlocked, error_model="python")(function)
    if isinstance(dispatcher, Dispatcher):
        dispatcher._cache = CodeCache(function)  # type: ignore[attr-defined]  # where numba keeps its own
    return cast(Callable[_Parameters, _Result], dispatcher)


def entry_point(function: Callable[..., object], example: Callable[[], tuple[Any, ...]]) -> None:
    """Make a compiled function one of those that `make_ready` sees to.

    Args:
        function: What Python code calls. With calls of several types, it is an entry point for each.
        example: The arguments of a call. They are looked at and not computed with, so arrays may be small or empty.

    Raises:
        TypeError: the function is not compiled.
    """
    if isinstance(function, Dispatcher):
        _entry_points.append((function, example))
    elif not is_off():
        raise TypeError(f"{function!r} is no compiled function; decorate it with @compiled")


def is_off() -> bool:
    """Whether NUMBA_DISABLE_JIT is set, so that the loops run as plain Python."""
    return bool(cast(Any, numba.core.config).DISABLE_JIT)


def keeping_folder() -> Path | None:
    """Where machine code that is compiled now will be kept; None if no folder can be written."""
    return first_writable(_HERE)


def to_compile() -> int:
    """How many entry points have machine code neither in memory nor in a file."""
    return sum(
        types not in function.overloads and not function._cache.holds(types, function.targetctx)
        for function, types in _calls()
    )


def make_ready(before_compiling: Callable[[int], object] = lambda _: None) -> Ready:
    """Load the machine code of all entry points, or compile it.

    Afterwards, a call of one of them with other types is a TypeError: it would wait for the compiler.

    Args:
        before_compiling: Is told how many have to be compiled, if any have.
    """
    began, calls = time.perf_counter(), _calls()
    new = sum(types not in function.overloads for function, types in calls)
    if missing := to_compile():
        before_compiling(missing)
    for function, types in calls:
        if types not in function.overloads:
            function.compile(types)
    for function, _ in calls:
        function.disable_compile()
    kept = all(function._cache.is_kept(types) for function, types in calls)
    return Ready(missing, new - missing, kept, round(time.perf_counter() - began, 3))


def _calls() -> list[tuple[Any, Types]]:
    """All entry points, with the types that they are called with."""
    return [(function, tuple(map(function.typeof_pyval, example()))) for function, example in _entry_points]
