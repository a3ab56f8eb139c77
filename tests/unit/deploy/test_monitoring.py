"""Alerts and autoscaling metrics: they name series that the server has, and each alert is tested and documented."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from beamline_server.engine.workers import EngineLoad
from beamline_server.metrics import Metrics

BUSY = EngineLoad(
    queued_requests=1,
    queued_rows=4,
    running_requests=2,
    running_rows=8,
    row_capacity=128,
    queue_limit_rows=1024,
    last_step_at=0.0,
)
Labels = dict[str, set[str]]


@pytest.fixture(scope="session")
def exposed() -> dict[str, Labels]:
    """The series of the server's own registry, each with its labels and their values."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch_load(lambda: BUSY, clock=lambda: 0.0)
    found: dict[str, Labels] = {}
    for sample in (sample for family in metrics.registry.collect() for sample in family.samples):
        labels = found.setdefault(sample.name, {})
        for name, value in sample.labels.items():
            labels.setdefault(name, set()).add(value)
    return found


@pytest.fixture(scope="session")
def monitoring(repository: Path) -> Path:
    return repository / "deploy" / "monitoring"


@pytest.fixture(scope="session")
def alerts(monitoring: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load((monitoring / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="session")
def adapter(monitoring: Path) -> dict[str, Any]:
    [rule] = yaml.safe_load((monitoring / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    found: dict[str, Any] = rule
    return found


def selectors_in(query: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each series that a query names, with the label values that it asks for."""
    for name, matchers in re.findall(r"\b(beamline_\w+)(?:\{([^}]*)\})?", query):
        yield name, dict(re.findall(r'(\w+)="([^"]+)"', matchers))


def test_alerts_ask_for_series_that_exist(alerts: list[dict[str, Any]], exposed: dict[str, Labels]) -> None:
    for alert in alerts:
        selectors = list(selectors_in(alert["expr"]))
        assert selectors, alert["alert"]
        for series, wanted in selectors:
            assert series in exposed, alert["alert"]
            for label, value in wanted.items():
                assert value in exposed[series][label], f"{alert['alert']}: {series}{{{label}={value!r}}}"


def test_alert_tests_feed_series_that_exist(monitoring: Path, exposed: dict[str, Labels]) -> None:
    """An alert that is tested with made-up series proves nothing."""
    suites = yaml.safe_load((monitoring / "alerts_test.yaml").read_text())["tests"]
    for series, labels in (
        found for suite in suites for fed in suite["input_series"] for found in selectors_in(fed["series"])
    ):
        ours = {label: value for label, value in labels.items() if label not in {"job", "instance", "namespace", "le"}}
        assert series in exposed
        assert all(value in exposed[series][label] for label, value in ours.items()), (series, ours)


def test_alerts_tell_how_urgent_and_what_it_means(alerts: list[dict[str, Any]]) -> None:
    for alert in alerts:
        assert alert["labels"]["severity"] in {"page", "ticket"}, alert["alert"]
        assert alert["annotations"].keys() == {"summary", "description"}, alert["alert"]
        assert "for" in alert, alert["alert"]


@pytest.mark.parametrize("arguments", ["check rules alerts.yaml", "test rules alerts_test.yaml"])
def test_prometheus_accepts_the_rules_and_their_cases_hold(promtool: str, monitoring: Path, arguments: str) -> None:
    command = [promtool, *arguments.split()]
    done = subprocess.run(command, cwd=monitoring, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not(
    monitoring: Path, alerts: list[dict[str, Any]]
) -> None:
    suites = yaml.safe_load((monitoring / "alerts_test.yaml").read_text())["tests"]
    cases = [(case["alertname"], bool(case.get("exp_alerts"))) for suite in suites for case in suite["alert_rule_test"]]
    assert set(cases) == {(alert["alert"], fires) for alert in alerts for fires in (True, False)}


def test_every_alert_is_documented(repository: Path, alerts: list[dict[str, Any]]) -> None:
    page = (repository / "docs" / "deploy.md").read_text()
    for alert in alerts:
        assert f"| `{alert['alert']}` |" in page


def documented(repository: Path, heading: str) -> dict[str, str]:
    """Of the table below a heading of docs/deploy.md: each name of the first column, with the second column."""
    page = (repository / "docs" / "deploy.md").read_text("utf-8")
    section = page.partition(f"### {heading}\n")[2].partition("\n###")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name: second.strip() for names, second in rows for name in re.findall("`([^`]+)`", names)}


def test_every_metric_is_documented_and_no_other(repository: Path) -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.watch_load(lambda: BUSY, clock=lambda: 0.0)
    metrics.watch_log({"rate": 0})
    metrics.tell_constants({"model": "m"}, {"beamline": "1"})
    found = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.registry.collect()
    }
    assert documented(repository, "Metrics") == found


def test_every_event_of_the_log_is_documented_and_no_other(repository: Path) -> None:
    sources = (repository / "server" / "beamline_server").rglob("*.py")
    logged = {name for source in sources for name in re.findall(r'"event": "(\w+)"', source.read_text("utf-8"))}
    assert documented(repository, "Log").keys() == logged | {"message"}


def test_the_adapter_makes_the_metric_that_the_gpu_overlay_scales_by(
    repository: Path, adapter: dict[str, Any], exposed: dict[str, Labels]
) -> None:
    overlay = repository / "deploy/k8s/overlays/gpu/horizontalpodautoscaler.yaml"
    [metric] = yaml.safe_load(overlay.read_text())["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == adapter["name"]["as"]
    # <<.LabelMatchers>> and <<.GroupBy>> are filled in by the adapter.
    named = {name for key in ("seriesQuery", "metricsQuery") for name, _ in selectors_in(adapter[key])}
    assert named == {"beamline_running_rows", "beamline_queued_rows", "beamline_row_capacity"}
    assert named <= exposed.keys()
