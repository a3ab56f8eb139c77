"""What tests of several folders share."""

import io
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from beamline_server.bundle import Bundle

# Before any test loads PyTorch: its threads must not spin while server processes want the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Servers under test are on this machine, and some tests call them with bare channels: no proxy is between.
for _name in ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)

# Started in the background, a shell leaves SIGINT ignored, nohup SIGHUP, and the processes that tests interrupt would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run; `--hypothesis-profile=explore` looks for new ones, `quick` has few.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("steady"), max_examples=20)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("steady")

FR_EN = Path(__file__).parents[1] / "models" / "fr-en"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what connects to ::1 on machines without it, as most containers are."""
    if item.get_closest_marker("ipv6") is not None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: ::1 cannot be bound ({error})")


@pytest.fixture(scope="session")
def export_fr_en(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Exports the embedded model in a precision, calibrated if a file is given for it."""
    from beamline_export.bundle_writer import ExportOptions, export
    from beamline_export.progress import Progress

    def exported(precision: str, calibrate: Path | None = None) -> Bundle:
        target = tmp_path_factory.mktemp("fr-en") / precision
        return export(FR_EN, target, ExportOptions(precision, calibrate=calibrate), Progress(io.StringIO()))

    return exported


@pytest.fixture(scope="session")
def fr_en_fp32(export_fr_en: Callable[[str], Bundle]) -> Bundle:
    """The embedded model as an fp32 bundle."""
    return export_fr_en("fp32")


@pytest.fixture(scope="session")
def fr_en_int8(export_fr_en: Callable[[str], Bundle]) -> Bundle:
    """The embedded model as an int8 bundle."""
    return export_fr_en("int8")


@pytest.fixture(scope="session")
def fr_en_int4(export_fr_en: Callable[[str], Bundle]) -> Bundle:
    """The embedded model as an int4 bundle."""
    return export_fr_en("int4")


@pytest.fixture(scope="session")
def fr_en_calibrated(export_fr_en: Callable[..., Bundle]) -> Bundle:
    """The embedded model as a calibrated int8 bundle, as the demo serves it."""
    return export_fr_en("int8", FR_EN / "calibration.txt")
