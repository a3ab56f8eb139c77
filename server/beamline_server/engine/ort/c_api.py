"""The few calls of onnxruntime's C interface that a step on the CPU needs: many small graphs run in a row, from loops.

A step runs a graph per attention. Through the Python interface each run would take and give back the interpreter's
lock, and wait for it behind whoever else runs Python; compiled loops call `RunWithBinding` by its address instead, and
hold no lock from the first graph to the last.

The interface is a table of functions, whose order never changes (onnxruntime_c_api.h: "All members of this struct are
append-only"); `_PLACES` are the places in it.
"""

import ctypes
import mmap
import weakref
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_API_VERSION = 24
"""Of the interface; libraries serve all versions up to their own."""
_PLACES = {
    "GetErrorMessage": 2,
    "CreateEnv": 3,
    "CreateSession": 7,
    "CreateSessionFromArray": 8,
    "CreateSessionOptions": 10,
    "DisableMemPattern": 17,
    "SetSessionLogSeverityLevel": 22,
    "SetIntraOpNumThreads": 24,
    "SetInterOpNumThreads": 25,
    "SessionGetOutputCount": 31,
    "SessionGetOutputName": 37,
    "CreateTensorWithDataAsOrtValue": 49,
    "CreateCpuMemoryInfo": 69,
    "AllocatorFree": 76,
    "GetAllocatorWithDefaultOptions": 78,
    "ReleaseStatus": 93,
    "ReleaseSession": 95,
    "ReleaseValue": 96,
    "ReleaseSessionOptions": 100,
    "GetAvailableProviders": 125,
    "ReleaseAvailableProviders": 126,
    "AddSessionConfigEntry": 130,
    "RunWithBinding": 133,
    "CreateIoBinding": 134,
    "ReleaseIoBinding": 135,
    "BindInput": 136,
    "BindOutput": 137,
    "CreateAndRegisterAllocator": 144,
    "AddInitializer": 150,
    "AddExternalInitializersFromFilesInMemory": 279,
}
_ELEMENT = {
    np.dtype(element): number
    for element, number in (
        (np.float32, 1), (np.uint8, 2), (np.int8, 3), (np.int32, 6), (np.int64, 7), (np.float16, 10),
    )
}  # fmt: skip
_LIBRARIES = ("libonnxruntime.so.*", "libonnxruntime.*.dylib")
SHARED_ARENA = "session.use_env_allocators"
"""The key of a session's configuration by which it takes memory from the arena of the process."""
_SILENT = 4
_ARENA = 1
_CPU_MEMORY = 0

Pointer = ctypes.c_void_p


class NativeError(Exception):
    """onnxruntime has refused a call; the text is its own."""


def installed_folder() -> Path:
    """Where onnxruntime's libraries are."""
    spec = find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "capi"


@cache
def _table() -> int:
    """Address of the table of functions."""
    folder = installed_folder()
    library = next((path for pattern in _LIBRARIES for path in folder.glob(pattern)), None)
    if library is None:
        raise NativeError(f"{folder} has no library of onnxruntime; install onnxruntime again")
    base = ctypes.CDLL(str(library)).OrtGetApiBase
    base.restype = Pointer
    get_api = ctypes.CFUNCTYPE(Pointer, ctypes.c_uint32)(Pointer.from_address(base()).value or 0)
    table: int = get_api(_API_VERSION)
    return table


def address(name: str) -> int:
    """Where a function of the interface is in memory."""
    found = Pointer.from_address(_table() + ctypes.sizeof(Pointer) * _PLACES[name]).value
    assert found is not None
    return found


@cache
def _function(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)(address(name))


def _call(name: str, *arguments: Any) -> None:
    """Call a function that returns a status.

    Raises:
        NativeError: it is not well.
    """
    check(_function(name, Pointer, *map(type, arguments))(*arguments))


def check(status: int | None) -> None:
    """Raise what a status tells, and release it; 0 and None tell nothing.

    Raises:
        NativeError: it tells something.
    """
    if status:
        text = _function("GetErrorMessage", ctypes.c_char_p, Pointer)(status)
        _release("Status", status)
        raise NativeError(text.decode(errors="replace"))


def _new(name: str, *arguments: Any) -> Pointer:
    """What a function makes, which is its last argument."""
    made = Pointer()
    _call(name, *arguments, ctypes.pointer(made))
    return made


def available_providers() -> list[str]:
    """Execution providers that the installed onnxruntime has."""
    names, count = ctypes.POINTER(ctypes.c_char_p)(), ctypes.c_int()
    _call("GetAvailableProviders", ctypes.pointer(names), ctypes.pointer(count))
    found = [(names[i] or b"").decode() for i in range(count.value)]
    _call("ReleaseAvailableProviders", names, count)
    return found


def _release(kind: str, pointer: int | Pointer) -> None:
    _function(f"Release{kind}", None, Pointer)(pointer)


def _release_with(owner: object, kind: str, pointer: int) -> None:
    """Release something when its owner goes; but not at the end of the process, when a thread may still compute."""
    weakref.finalize(owner, _release, kind, pointer).atexit = False


@cache
def _environment() -> Pointer:
    """What all sessions of the process share: an arena."""
    made = _new("CreateEnv", ctypes.c_int(_SILENT), ctypes.c_char_p(b"beamline"))
    _call("CreateAndRegisterAllocator", made, _memory(), Pointer())
    return made


@cache
def _memory() -> Pointer:
    return _new("CreateCpuMemoryInfo", ctypes.c_int(_ARENA), ctypes.c_int(_CPU_MEMORY))


class NativeSession:
    """A graph that is ready to run.

    Args:
        graph: The model, in ONNX's format, or the path of its file.
        weights: Name and content of the file that it takes its weights from; the session copies what it needs. None for
            a path: the file beside it is mapped.
        shared: Weights by their names, which it reads where they are instead; kept as long as the session.
        threads: To compute a node on.
        settings: onnxruntime's session configuration, key by key.
    """

    def __init__(
        self,
        graph: bytes | Path,
        weights: tuple[str, bytes | mmap.mmap] | None,
        *,
        threads: int,
        settings: Mapping[str, str],
        shared: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self._shared = [(name, array, _tensor(array)) for name, array in (shared or {}).items()]
        for _, _, value in self._shared:
            _release_with(self, "Value", value.value or 0)
        options = _new("CreateSessionOptions")
        try:
            _configure(options, threads, settings)
            for shared_name, _, value in self._shared:
                _call("AddInitializer", options, ctypes.c_char_p(shared_name.encode()), value)
            if weights is not None:
                name, content = weights[0], np.frombuffer(weights[1], np.uint8)
                _call(
                    "AddExternalInitializersFromFilesInMemory",
                    options,
                    (ctypes.c_char_p * 1)(name.encode()),
                    (Pointer * 1)(content.ctypes.data),
                    (ctypes.c_size_t * 1)(content.size),
                    ctypes.c_size_t(1),
                )
            if isinstance(graph, Path):
                pointer = _new("CreateSession", _environment(), ctypes.c_char_p(bytes(graph)), options)
            else:
                size = ctypes.c_size_t(len(graph))
                pointer = _new("CreateSessionFromArray", _environment(), ctypes.c_char_p(graph), size, options)
        finally:
            _release("SessionOptions", options)
        self.handle: int = pointer.value or 0
        _release_with(self, "Session", self.handle)

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        count = ctypes.c_size_t()
        _call("SessionGetOutputCount", Pointer(self.handle), ctypes.pointer(count))
        return [self._output(i) for i in range(count.value)]

    def _output(self, number: int) -> str:
        allocator, name = _new("GetAllocatorWithDefaultOptions"), ctypes.c_char_p()
        _call("SessionGetOutputName", Pointer(self.handle), ctypes.c_size_t(number), allocator, ctypes.pointer(name))
        text = (name.value or b"").decode()
        _call("AllocatorFree", allocator, ctypes.cast(name, Pointer))
        return text


def _configure(options: Pointer, threads: int, settings: Mapping[str, str]) -> None:
    _call("SetSessionLogSeverityLevel", options, ctypes.c_int(_SILENT))
    _call("SetIntraOpNumThreads", options, ctypes.c_int(threads))
    _call("SetInterOpNumThreads", options, ctypes.c_int(1))
    # Shapes change from step to step: a pattern of one is no use for the next.
    _call("DisableMemPattern", options)
    for key, value in {**settings, SHARED_ARENA: "1"}.items():
        _call("AddSessionConfigEntry", options, ctypes.c_char_p(key.encode()), ctypes.c_char_p(value.encode()))


class Binding:
    """Inputs and outputs of runs of a session, in host memory that is kept as long as the binding."""

    def __init__(
        self, session: NativeSession, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
    ) -> None:
        pointer = _new("CreateIoBinding", Pointer(session.handle))
        self.handle: int = pointer.value or 0
        _release_with(self, "IoBinding", self.handle)
        self._session = session
        self._kept = [*inputs.values(), *outputs.values()]
        for function, arrays in (("BindInput", inputs), ("BindOutput", outputs)):
            for name, array in arrays.items():
                value = _tensor(array)
                try:
                    _call(function, pointer, ctypes.c_char_p(name.encode()), value)
                finally:
                    _release("Value", value)

    def run(self) -> None:
        """Compute; other threads run Python meanwhile."""
        _call("RunWithBinding", Pointer(self._session.handle), Pointer(), Pointer(self.handle))


def _tensor(array: NDArray[Any]) -> Pointer:
    """A tensor in the memory of an array, which has to be kept."""
    assert array.flags.c_contiguous, "only whole arrays can be bound"
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    return _new(
        "CreateTensorWithDataAsOrtValue",
        _memory(),
        Pointer(array.ctypes.data),
        ctypes.c_size_t(array.nbytes),
        shape,
        ctypes.c_size_t(array.ndim),
        ctypes.c_int(_ELEMENT[array.dtype]),
    )
