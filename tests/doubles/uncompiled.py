"""Modules with compiled functions, loaded as plain Python that checks its indices."""

import ast
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from beamline_server.engine import compiled

_Index = TypeVar("_Index")
_CHECK = "_not_negative"


def uncompiled(*names: str) -> tuple[ModuleType, ...]:
    """These modules, loaded anew with `@compiled` off, so that they call one another's plain functions.

    Machine code does not check indices; these modules do. One beyond the end is an IndexError, as NumPy has it. So is a
    negative one, unless it is written as such (`a[-1]`). The modules that are loaded already stay what they are, and so
    do those that these import, but for those named here.
    """
    for name in names:
        importlib.import_module(name)  # for what it brings along, which is not to be loaded anew
    with _loading_anew(names):
        return tuple(importlib.import_module(name) for name in names)


@contextmanager
def _loading_anew(names: Sequence[str]) -> Iterator[None]:
    kept = {name: sys.modules.pop(name) for name in names}
    kept[compiled.__name__] = sys.modules[compiled.__name__]
    finder = _Finder(names)
    sys.modules[compiled.__name__] = _switched_off()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules |= kept
        for name, module in kept.items():
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], own, module)


def _switched_off() -> ModuleType:
    """A twin of the module that compiles, whose decorator leaves functions what they are."""
    twin = ModuleType(compiled.__name__)
    vars(twin).update(vars(compiled) | {"compiled": lambda function: function, "entry_point": lambda *_: None})
    return twin


class _Finder(MetaPathFinder):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname in self._names else None
        if spec is not None and spec.origin is not None:
            spec.loader = _CheckingLoader(fullname, spec.origin)
        return spec


class _CheckingLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = _CheckedIndices().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _CHECK, not_negative)
        super().exec_module(module)


class _CheckedIndices(ast.NodeTransformer):
    """Puts every index, and every bound of a slice, through `not_negative`."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.Subscript:
        self.generic_visit(node)
        node.slice = self._checked(node.slice)
        return node

    def _checked(self, index: ast.expr) -> ast.expr:
        if isinstance(index, ast.Tuple):
            index.elts = [self._checked(element) for element in index.elts]
        elif isinstance(index, ast.Slice):
            for bound in ("lower", "upper"):
                if (expression := getattr(index, bound)) is not None:
                    setattr(index, bound, self._checked(expression))
        elif not isinstance(index, ast.Constant | ast.UnaryOp):
            call = ast.Call(ast.Name(_CHECK, ast.Load()), [index], [])
            return ast.copy_location(call, index)
        return index


def not_negative(index: _Index) -> _Index:
    """The index itself.

    Raises:
        IndexError: it is a negative number, which would count from the end.
    """
    if isinstance(index, int | np.integer) and index < 0:
        raise IndexError(f"index {index} is negative")
    return index
