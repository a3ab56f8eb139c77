"""The manifests grant a server what it comes to at the most with the embedded model."""

from pathlib import Path

import yaml

from beamline_server.bundle import Bundle
from beamline_server.process import ServerProcess

DEPLOY = Path(__file__).parents[2] / "deploy/k8s/base"


def granted() -> int:
    """The bytes that the manifests grant to a server."""
    deployment = yaml.safe_load((DEPLOY / "deployment.yaml").read_text("utf-8"))
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    limit: str = container["resources"]["limits"]["memory"]
    assert limit.endswith("Mi")
    return int(limit.removesuffix("Mi")) << 20


def test_the_manifests_grant_what_the_embedded_model_comes_to(fr_en_int8: Bundle) -> None:
    limit, settings = granted(), DEPLOY / "server.toml"
    with ServerProcess(fr_en_int8.path, "--config", str(settings), "--memory-limit", str(limit)) as running:
        running.wait_until_serving()
        bound = running.samples()["beamline_memory_bound_bytes"]
    print(f"{bound / 1e6:.0f} of {limit / 1e6:.0f} MB")
    assert 0.8 * limit < bound <= limit
