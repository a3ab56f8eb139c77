"""CUDA: how its provider is told to compute, and what it lacks on this machine.

Options that could change numbers, and what was decided (onnxruntime 1.31):

- `use_tf32`: on by default, and then products of fp32 numbers keep 10 bits of each. Off for fp32 bundles. In fp16
  bundles the fp32 products are the head and, where fp16 would overflow, the last one of feed-forward layers. Their
  factors come from fp16, so that TF32 holds them without loss, or are products of two such numbers, which it rounds as
  fp16 would.
- `enable_cuda_graph`: replays the same kernels on the same shapes; the bits are the same.
- `sdpa_kernel`: which attention kernels may run; left alone, one that needs a plan per shape would be preferred.
- Not set: `tunable_op_enable` (off; would choose kernels by their speed on the day), `prefer_nhwc`, `fuse_conv_bias`
  and `cudnn_conv_*` (convolutions, which no graph has), `enable_skip_layer_norm_strict_mode` (for nodes that
  sessions.py keeps from being made). Products of fp16 numbers are summed in fp32.
"""

import contextlib
import ctypes
import io
import logging
from dataclasses import dataclass

from beamline_server.engine.ort.c_api import available_providers, installed_folder
from beamline_server.engine.ort.settings import CUDA
from beamline_server.graphs import Precision

INSTALL = "install the extra server-gpu in place of server"
_FLASH_OR_MEMORY_EFFICIENT = 3
_log = logging.getLogger(__name__)


def provider_options(precision: Precision, *, graphs: bool) -> dict[str, str]:
    """What the CUDA provider is told for the graphs of a bundle; the head of this module says why."""
    return {
        "device_id": "0",
        "use_tf32": str(int(precision != "fp32")),
        "sdpa_kernel": str(_FLASH_OR_MEMORY_EFFICIENT),
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(graphs)),
    }


@dataclass(frozen=True, slots=True)
class Driver:
    """What CUDA's runtime library tells of the machine.

    Attributes:
        version: Of CUDA that the driver is for, as 1000 major + 10 minor; 0 if there is no driver.
        devices: GPUs that this process may use.
        problem: Why they could not be counted, in CUDA's words, if they could not.
    """

    version: int
    devices: int
    problem: str = ""


def what_is_missing() -> str | None:
    """Why no CUDA session can start on this machine, and what to do; None if a device answers."""
    if CUDA not in available_providers():
        return f"this onnxruntime has no CUDA provider; {INSTALL}"
    import onnxruntime as ort

    preload()
    needed = int(ort.cuda_version.split(".")[0])
    try:
        # The driver first: the provider's library does not load without one.
        problem = driver_problem(ask_driver(ctypes.CDLL(f"libcudart.so.{needed}")), needed)
        if problem is None:
            _load_provider()
    except OSError as error:
        return f"a library of CUDA {needed} is missing ({error}); {INSTALL}"
    return problem


def _load_provider() -> None:
    """Load the provider's library, which needs several of CUDA's. OSError names one that is missing."""
    folder = installed_folder()
    ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))


def preload() -> None:
    """Load CUDA's libraries from the installed Python packages; those that are loaded already (PyTorch's) stay."""
    import onnxruntime as ort

    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints; what is missing is found out by `what_is_missing`
        ort.preload_dlls()
    for line in said.getvalue().splitlines():
        _log.debug("onnxruntime: %s", line, extra={"event": "preload_cuda"})


def ask_driver(runtime: ctypes.CDLL) -> Driver:
    """Ask CUDA's runtime library; it neither needs a driver nor starts anything on a device."""
    version, devices = ctypes.c_int(), ctypes.c_int()
    runtime.cudaDriverGetVersion(ctypes.byref(version))
    status = runtime.cudaGetDeviceCount(ctypes.byref(devices))
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return Driver(version.value, devices.value, runtime.cudaGetErrorString(status).decode() if status else "")


def driver_problem(driver: Driver, needed: int) -> str | None:
    """What is wrong with a driver for a program that was built for CUDA `needed`, and what to do."""
    major, minor = driver.version // 1000, driver.version % 1000 // 10
    if not driver.version:
        return (
            f"there is no NVIDIA driver here; install one for CUDA {needed}, and let the container use it if it is one"
        )
    if major < needed:
        return f"the NVIDIA driver is for CUDA {major}.{minor}; install one for CUDA {needed} on this machine"
    if driver.problem or not driver.devices:
        found = driver.problem or "it counts 0 devices"
        return f"the NVIDIA driver finds no GPU ({found}); look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    return None
