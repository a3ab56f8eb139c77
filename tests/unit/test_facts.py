"""A fact that stands in several places, for people or for who may not import it, is the same in all of them."""

import re
from pathlib import Path

import pytest

from beamline_client.address import DEFAULT_SERVER, GRPC_PORT
from beamline_client.load.scrape import METRICS_PORT
from beamline_client.load.setup import LoadOptions
from beamline_client.testing import described
from beamline_server.engine.admission import DEFAULT_ROWS
from beamline_server.engine.ort.cuda.backend import ENCODER_GRAPHS, STEP_GRAPHS
from beamline_server.engine.ort.cuda.captured_graphs import CAPTURED_FROM_USE
from beamline_server.engine.ort.settings import SPIN_US
from beamline_server.engine.request import MAX_LENGTH_PENALTY
from beamline_server.manifest import NAME_PATTERN
from beamline_server.settings import Settings

REPOSITORY = Path(__file__).parents[2]
GRPC, METRICS = (Settings.model_fields[name].default for name in ("grpc_port", "metrics_port"))
NUMBERS = {4: "four"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", f"gRPC on {GRPC}, metrics on {METRICS}"),
        ("docs/load-testing.md", f"gRPC on {GRPC}, metrics on {METRICS}"),
        ("docs/api.md", f"Ports: {GRPC} gRPC without encryption, {METRICS} metrics"),
        ("deploy/docker/server.Dockerfile", f"EXPOSE {GRPC} {METRICS}"),
        ("docs/deploy.md", f"live hypotheses of a worker, {DEFAULT_ROWS} by default"),
        (
            "docs/adr/0008-cuda-graphs.md",
            f"used {NUMBERS[CAPTURED_FROM_USE]} times, up to {STEP_GRAPHS} of the step and",
        ),
        ("docs/adr/0008-cuda-graphs.md", f"{ENCODER_GRAPHS} of the encoder"),
        ("docs/performance.md", f"{SPIN_US} µs"),
        (
            "protos/beamline/v1/generation.proto",
            f"Exponent of the length penalty, -{MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}.",
        ),
    ],
)
def test_the_text_says_what_the_code_does(file: str, text: str) -> None:
    assert text in (REPOSITORY / file).read_text("utf-8")


def test_a_client_knocks_where_a_server_listens() -> None:
    """It installs without the server, so it has ports of its own."""
    assert (GRPC_PORT, METRICS_PORT) == (GRPC, METRICS)
    assert f"localhost:{GRPC}" == DEFAULT_SERVER
    assert LoadOptions().server == DEFAULT_SERVER


@pytest.mark.parametrize("name", ["max_inputs", "max_text_bytes", "max_beam_size", "max_message_bytes"])
def test_the_fake_server_has_the_limits_of_a_real_one(name: str) -> None:
    assert getattr(described().limits, name) == Settings.model_fields[name].default


def test_the_fake_server_gives_as_much_time_as_a_real_one() -> None:
    assert (
        described().limits.max_duration.ToTimedelta().total_seconds() == Settings.model_fields["max_duration_s"].default
    )


@pytest.mark.parametrize(
    "text",
    [
        re.escape(NAME_PATTERN),
        r"MAX_BEAMS = \d+",
        r"MAX_LENGTH_PENALTY = [\d.]+",
        r"(default|le|ge)=16\b",
        r"KEPT_RUNS = \d+",
        r"gcd\(width",
    ],
)
def test_a_fact_of_the_code_stands_in_one_place(text: str) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}"
        for package in ("server", "export")
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        for _ in re.findall(text, path.read_text("utf-8"))
    ]
    assert len(found) == (0 if "default" in text else 1), found
