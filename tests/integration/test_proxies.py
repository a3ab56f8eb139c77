"""Everything that talks to a server on this machine goes there directly, whatever proxies the environment names."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from beamline_client import Client
from beamline_client.load.scrape import fetch
from beamline_client.testing import RecordingProxy
from beamline_server.bundle import Bundle
from beamline_server.process import BEAMLINE, ServerProcess


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    with RecordingProxy() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def test_nothing_goes_through_a_proxy(proxy: RecordingProxy, fr_en_int8: Bundle, tmp_path: Path) -> None:
    with ServerProcess(fr_en_int8.path) as server:
        server.wait_until_serving()
        with Client(server.target) as client:
            text = client.generate_one("Où est la gare ?").text
        page = f"http://127.0.0.1:{server.log.wait_for('listening')['metrics_port']}/metrics"
        assert fetch(page).values
        translate = [str(BEAMLINE), "translate", "--server", server.target, "Où est la gare ?"]
        load = [str(BEAMLINE), "load", "--server", server.target, "--metrics", page, "--workers", "2", "-o", "report"]
        brief = ["--concurrency", "1", "--duration", "1s", "--warm-up", "0s"]

        translated = subprocess.run(translate, capture_output=True, text=True, check=True, timeout=60)
        loaded = subprocess.run([*load, *brief], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)

        assert translated.stdout == f"{text}\n"
        assert loaded.returncode in {0, 3}, loaded.stderr
        assert server.samples_when_idle()['beamline_requests_total{outcome="ok"}'] > 2
    # Elsewhere, a library may have business of its own.
    assert [request for request in proxy.requests if "127.0.0.1" in request or "localhost" in request] == []
