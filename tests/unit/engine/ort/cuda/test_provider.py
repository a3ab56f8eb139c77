"""What CUDA's provider is told, and what is said where it cannot start. No GPU is needed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from beamline_server.engine.ort.cuda.backend import providers
from beamline_server.engine.ort.cuda.provider import Driver, ask_driver, driver_problem, provider_options
from beamline_server.engine.ort.settings import CPU, CUDA
from beamline_server.graphs import Precision
from beamline_server.models.load import DeviceError, choose_device

KNOWN = {
    *("arena_extend_strategy", "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace"),
    *("device_id", "do_copy_in_default_stream", "enable_cuda_graph", "enable_cudnn", "fuse_conv_bias"),
    *("enable_skip_layer_norm_strict_mode", "external_data_loader_reading_threads", "gpu_external_alloc"),
    *("gpu_external_empty_cache", "gpu_external_free", "gpu_mem_limit", "has_user_compute_stream", "prefer_nhwc"),
    *("sdpa_kernel", "tunable_op_enable", "tunable_op_max_tuning_duration_ms", "tunable_op_tuning_enable"),
    *("use_ep_level_unified_stream", "use_tf32", "user_compute_stream"),
}
"""Options that the provider of onnxruntime 1.31 knows; it refuses others."""


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("fp16", "1")])
@pytest.mark.parametrize("graphs", [False, True])
def test_fp32_is_computed_in_fp32_and_fp16s_head_in_what_holds_fp16(
    precision: Precision, tf32: str, graphs: bool
) -> None:
    assert provider_options(precision, graphs=graphs) == {
        "device_id": "0",
        "use_tf32": tf32,
        "sdpa_kernel": "3",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(graphs)),
    }
    assert providers("cuda", precision, graphs=graphs) == [(CUDA, provider_options(precision, graphs=graphs)), CPU]
    assert providers("cpu", precision, graphs=graphs) == [CPU]


def test_the_provider_knows_every_option() -> None:
    assert provider_options("fp32", graphs=True).keys() <= KNOWN


# -- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "problem"),
    [
        (
            Driver(0, 0, "CUDA driver version is insufficient"),
            "there is no NVIDIA driver here; install one for CUDA 13",
        ),
        (Driver(12040, 0, "insufficient"), "the NVIDIA driver is for CUDA 12.4; install one for CUDA 13"),
        (Driver(13000, 0, "no device is detected"), "the NVIDIA driver finds no GPU (no device is detected); look at"),
        (Driver(13010, 0), "the NVIDIA driver finds no GPU (it counts 0 devices); look at"),
    ],
)
def test_what_is_wrong_with_a_driver_is_said_with_what_to_do(driver: Driver, problem: str) -> None:
    assert (driver_problem(driver, 13) or "").startswith(problem)


@pytest.mark.parametrize("version", [13000, 13020, 14000])
def test_a_driver_at_least_as_new_and_a_device_are_enough(version: int) -> None:
    assert driver_problem(Driver(version, 1), 13) is None


def runtime(version: int, status: int, devices: int) -> Any:
    """CUDA's runtime library on some machine."""

    def put(value: int, status: int = 0) -> Callable[[Any], int]:
        def call(where: Any) -> int:
            where._obj.value = value
            return status

        return call

    def text(status: int) -> bytes:
        return f"error {status}".encode()

    functions = {"cudaDriverGetVersion": put(version), "cudaGetDeviceCount": put(devices, status)}
    return SimpleNamespace(**functions, cudaGetErrorString=text)


def test_the_runtime_is_asked_for_driver_and_devices() -> None:
    assert ask_driver(runtime(13000, 0, 2)) == Driver(13000, 2)
    assert ask_driver(runtime(13000, 100, 0)) == Driver(13000, 0, "error 100")


def test_nobody_is_asked_where_it_does_not_matter() -> None:
    assert choose_device("cpu", "fp16") == "cpu"
    assert choose_device("auto", "int8") == "cpu"
    for precision in ("int8", "int4"):
        with pytest.raises(DeviceError, match=f"the bundle is {precision}, which runs on the CPU"):
            choose_device("cuda", precision)
