"""Machine code of compiled functions, kept in files: one for each function, types of arguments and kind of processor.

They lie in `__pycache__` beside the source; where that cannot be written, in the user's cache folder; with
NUMBA_CACHE_DIR, there alone. A file counts as long as all that it was made from is the same: the text of the module and
of what it imports of its own package, the versions of numba and NumPy, and numba's settings. File times do not count:
image layers cut them. A folder that cannot be written is read all the same, and a file that cannot be read or written
is no error: the function is compiled.

numba's own cache takes no folder that it cannot write, and does not see that a constant or a function has changed that
comes from another module.
"""

import ast
import hashlib
import inspect
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numba.core.config
import numpy as np
from numba.core.compiler import CompileResult
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps as _dumps

_config = cast(Any, numba.core.config)
_SETTINGS = ("BOUNDSCHECK", "DEBUGINFO_DEFAULT", "OPT")
"""numba's settings that change machine code; those that name the processor belong to the target."""

_pickled = cast(Callable[[object], bytes], _dumps)
_rebuilt = cast(Callable[..., CompileResult], CompileResult._rebuild)

Types = tuple[Any, ...]
"""numba's types of a call's arguments."""


class CodeCache:
    """The machine code of one function. What numba asks of a cache: `load_overload`, `save_overload`, `cache_path`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._module = function.__module__
        self._source = Path(inspect.getfile(function))
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._read: dict[Types, CompileResult] = {}
        self._kept: set[Types] = set()
        self.cache_path = str(folders(self._source)[0])

    def is_kept(self, types: Types) -> bool:
        """Whether a file has the machine code that is in use."""
        return types in self._kept

    def holds(self, types: Types, context: Any) -> bool:
        """Whether a file has machine code for these types; what it has is loaded."""
        if types not in self._read and (result := self._load(types, context)) is not None:
            self._read[types] = result
        return types in self._read

    def load_overload(self, types: Types, context: Any) -> CompileResult | None:
        """The machine code for these types, if a file has it."""
        return self._read.pop(types) if self.holds(types, context) else None

    def save_overload(self, types: Types, result: Any) -> None:
        """Keep machine code, in the first folder that can be written.

        Raises:
            TypeError: it has addresses of this process in it.
        """
        if result.library.has_dynamic_globals:
            raise TypeError(f"{self._name} uses a large array or a C function as a constant; make it an argument")
        key = self._key(types, result.codegen)
        content = _pickled(key) + _pickled(result._reduce())
        for folder in folders(self._source):
            with suppress(OSError):
                _write(folder / self._file_name(key), content)
                self._kept.add(types)
                return

    def _load(self, types: Types, context: Any) -> CompileResult | None:
        # numba's own cache would get ready to compile here: 0.2 s and 13 MB that a server with a full cache can spare.
        rtsys.initialize(context)
        key = self._key(types, context.codegen())
        for folder in folders(self._source):
            # Pickles of another version or of half a file fail in many ways, and all mean: not this one.
            with suppress(Exception), _opened(folder / self._file_name(key), self._source) as stream:
                if pickle.load(stream) == key:
                    result = _rebuilt(context, *pickle.load(stream))
                    self._kept.add(types)
                    return result
        return None

    def _key(self, types: Types, codegen: Any) -> tuple[Any, ...]:
        return made_from(self._module, self._source), types, codegen.magic_tuple()

    def _file_name(self, key: tuple[Any, ...]) -> str:
        kind = hashlib.sha256(repr(key[1:]).encode()).hexdigest()[:16]
        return f"{self._name}-{kind}.{sys.implementation.cache_tag}.nbc"


def folders(source: Path) -> list[Path]:
    """Where the machine code of a source file may lie, the best place first."""
    if _config.CACHE_DIR:
        return [Path(_config.CACHE_DIR)]
    beside = source.parent / "__pycache__"
    with suppress(RuntimeError):  # a user without a home
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return [beside, home / "beamline" / hashlib.sha256(str(source.parent).encode()).hexdigest()[:16]]
    return [beside]


def first_writable(source: Path) -> Path | None:
    """The folder that new machine code of a source file would go to; None if none can be written."""
    return next((folder for folder in folders(source) if _can_be_written(folder)), None)


def _can_be_written(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def trusted_owners(source: Path) -> set[int]:
    """The users whose machine code is run: root, who runs the server, and who has installed its source."""
    return {0, os.geteuid(), source.stat().st_uid}


@contextmanager
def _opened(file: Path, source: Path) -> Iterator[BinaryIO]:
    """Open a file to unpickle it, which may do anything.

    Raises:
        OSError: it cannot be read, or nobody who is trusted owns it.
    """
    with file.open("rb") as stream:
        if os.fstat(stream.fileno()).st_uid not in trusted_owners(source):
            raise PermissionError(f"{file} belongs to another user")
        yield stream


def _write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, whoever else does.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    number, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with open(number, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)  # whoever runs the server reads what its installer has compiled
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


@lru_cache
def made_from(module: str, source: Path) -> str:
    """The state of all that a module's machine code is made from, as a digest."""
    tools = numba.__version__, np.__version__, *(str(getattr(_config, name)) for name in _SETTINGS)
    digest = hashlib.sha256(repr(tools).encode())
    for file in sorted(_sources(module, source)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _sources(module: str, source: Path) -> set[Path]:
    """The files of a module and of what it imports of its top-level package, and so on: constants are compiled in."""
    package = module.partition(".")[0]
    root = source.parents[module.count(".")]
    found, waiting = set[Path](), [source]
    while waiting:
        file = waiting.pop()
        if file not in found and file.exists():
            found.add(file)
            for name in _imports(file):
                if name.partition(".")[0] == package:
                    path = root.joinpath(*name.split("."))
                    waiting += [path.with_suffix(".py"), path / "__init__.py"]
    return found


@lru_cache
def _imports(file: Path) -> list[str]:
    """Every module that a file imports, and every name of one, which may be a module."""
    names = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
