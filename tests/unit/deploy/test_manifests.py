"""What `kubectl apply -k` sends: valid for the API servers in use, and true to the server and to our policies."""

import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from beamline_server.settings import Settings, SettingsError, read_command

Resource = dict[str, Any]
Render = Callable[[Path], list[Resource]]

OVERLAYS = ("overlays/cpu", "overlays/gpu")
KUBERNETES_VERSIONS = ("1.29", "1.32", "1.35", "1.37")
# What the pod may still take after the drain to flush, close and exit.
EXIT_MARGIN_S = 10
NEIGHBOUR_IMAGE = f"registry.example/beamline-bundle@sha256:{'e' * 64}"
# What the kubelet keeps of a container's log by default: five files of 10Mi.
LOG_MIB = 50
# The autoscaler ignores deviations from its target up to this share.
AUTOSCALER_TOLERANCE = Decimal("0.1")


@pytest.fixture(scope="session")
def k8s(repository: Path) -> Path:
    return repository / "deploy" / "k8s"


@pytest.fixture(scope="session", params=("base", *OVERLAYS))
def manifests(request: pytest.FixtureRequest, k8s: Path, kustomize: Render) -> list[Resource]:
    """The resources of the base and of each overlay."""
    folder: str = request.param
    return kustomize(k8s / folder)


@pytest.fixture(scope="session")
def gpu(k8s: Path, kustomize: Render) -> list[Resource]:
    return kustomize(k8s / "overlays/gpu")


def set_images(folder: Path, **images: str) -> None:
    """`kustomize edit set image NAME=IMAGE ...` in an overlay, which names all of them already."""
    path = folder / "kustomization.yaml"
    content = yaml.safe_load(path.read_text())
    for name, image in images.items():
        [index] = [i for i, entry in enumerate(content["images"]) if entry["name"] == f"beamline-{name}"]
        new_name, kind, version = image.partition("@") if "@" in image else image.rpartition(":")
        content["images"][index] = {
            "name": f"beamline-{name}",
            "newName": new_name,
            {"@": "digest", ":": "newTag"}[kind]: version,
        }
    path.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="session", params=product(OVERLAYS, (False, True)), ids=str)
def neighbours(
    request: pytest.FixtureRequest, k8s: Path, kustomize: Render, tmp_path_factory: pytest.TempPathFactory
) -> list[Resource]:
    """A second model in the namespace, made the way docs/deploy.md says, with its section 2 done before or not."""
    overlay, edited = request.param
    copy = tmp_path_factory.mktemp("deploy") / "k8s"
    shutil.copytree(k8s, copy)
    if edited:
        set_images(copy / overlay, server="registry.example/s:1", bundle=f"registry.example/b@sha256:{'f' * 64}")
    folder = copy / "overlays" / "en-de"
    shutil.copytree(copy / overlay, folder)
    set_images(folder, bundle=NEIGHBOUR_IMAGE)
    page = (k8s.parents[1] / "docs" / "deploy.md").read_text("utf-8")
    [lines] = re.findall(r"^```yaml\n(namePrefix: .*?)^```", page, re.DOTALL | re.MULTILINE)
    with (folder / "kustomization.yaml").open("a") as stream:
        stream.write(lines)
    return kustomize(folder)


def only(manifests: list[Resource], kind: str) -> Resource:
    [found] = [resource for resource in manifests if resource["kind"] == kind]
    return found


def pod(manifests: list[Resource]) -> Resource:
    template: Resource = only(manifests, "Deployment")["spec"]["template"]
    return template


def server(manifests: list[Resource]) -> Resource:
    [found] = pod(manifests)["spec"]["containers"]
    container: Resource = found
    return container


def bundle_copier(manifests: list[Resource]) -> Resource:
    [found] = pod(manifests)["spec"]["initContainers"]
    container: Resource = found
    return container


def settings_of(manifests: list[Resource]) -> dict[str, Any]:
    """The settings file as the server reads it, found the way the server's arguments and mounts lead to it."""
    arguments = server(manifests)["args"]
    path = Path(arguments[arguments.index("--config") + 1])
    [mount] = [m for m in server(manifests)["volumeMounts"] if m["mountPath"] == str(path.parent)]
    [volume] = [v for v in pod(manifests)["spec"]["volumes"] if v["name"] == mount["name"]]
    config_map = only(manifests, "ConfigMap")
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    return tomllib.loads(config_map["data"][path.name])


def selectors(manifests: list[Resource]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every label selector that is meant to find the server's pods."""
    for resource in manifests:
        kind, spec = resource["kind"], resource.get("spec", {})
        name = f"{kind}/{resource['metadata']['name']}"
        if kind == "Service":
            yield name, spec["selector"]
        elif kind in {"Deployment", "PodDisruptionBudget"}:
            yield name, spec["selector"]["matchLabels"]
        elif kind == "NetworkPolicy":
            yield name, spec["podSelector"]["matchLabels"]
    for constraint in pod(manifests)["spec"]["topologySpreadConstraints"]:
        yield f"spread over {constraint['topologyKey']}", constraint["labelSelector"]["matchLabels"]


# ---- valid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_resource_has_a_schema_and_follows_it(manifests: list[Resource], version: str) -> None:
    for resource in manifests:
        # Raises for a kind or API version that it does not know, where its command line only prints a warning.
        assert kubernetes_validate.validate(resource, version, strict=True) == version


def test_the_validation_finds_misspelt_fields_and_unknown_kinds(gpu: list[Resource]) -> None:
    """Guards the test above: a validator that accepts everything would pass it too."""
    autoscaler = only(gpu, "HorizontalPodAutoscaler")
    with pytest.raises(kubernetes_validate.ValidationError, match="minReplica"):
        kubernetes_validate.validate(
            {**autoscaler, "spec": {**autoscaler["spec"], "minReplica": 2}}, KUBERNETES_VERSIONS[-1], strict=True
        )
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        kubernetes_validate.validate({**autoscaler, "apiVersion": "autoscaling/v2beta2"}, KUBERNETES_VERSIONS[-1])


def test_the_deployment_is_complete(manifests: list[Resource]) -> None:
    assert sorted(resource["kind"] for resource in manifests) == [
        "ConfigMap",
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
        "Service",
        "ServiceAccount",
    ]


# ---- true to the server ---------------------------------------------------------------------------------------------


def test_the_server_accepts_the_settings(manifests: list[Resource], tmp_path: Path) -> None:
    """Read as the server reads them: from the container's arguments, every problem an error."""
    in_container, *_ = (m["mountPath"] for m in server(manifests)["volumeMounts"] if m["name"] == "settings")
    for name, text in only(manifests, "ConfigMap")["data"].items():
        (tmp_path / name).write_text(text)
    command = read_command([a.replace(in_container, str(tmp_path)) for a in server(manifests)["args"]], {})
    assert str(command.bundle) == "/models/bundle"
    assert settings_of(manifests).items() <= command.settings.model_dump().items()


def test_the_server_would_refuse_the_variables_of_a_service_link(gpu: list[Resource]) -> None:
    """The reason for the test below: Kubernetes names them after the Service."""
    services = {resource["metadata"]["name"] for resource in gpu if resource["kind"] == "Service"}
    assert "beamline" in services
    with pytest.raises(SettingsError, match="BEAMLINE_SERVICE_HOST"):
        read_command(["/models/bundle"], {"BEAMLINE_SERVICE_HOST": "10.0.0.1"})


def test_the_server_gets_one_setting_by_its_environment_and_none_by_accident(manifests: list[Resource]) -> None:
    assert pod(manifests)["spec"]["enableServiceLinks"] is False
    [limit] = server(manifests)["env"]
    assert limit["name"] == "BEAMLINE_MEMORY_LIMIT"
    assert limit["valueFrom"]["resourceFieldRef"] == {"containerName": "server", "resource": "limits.memory"}
    bytes_granted = mebibytes(server(manifests)["resources"]["limits"]["memory"]) << 20
    command = read_command(["/models/bundle"], {limit["name"]: str(bytes_granted)})
    assert command.settings.memory_limit == bytes_granted
    assert "envFrom" not in server(manifests)


def test_ports_are_those_that_the_server_listens_on(manifests: list[Resource]) -> None:
    settings = settings_of(manifests)
    ports = {port["name"]: port["containerPort"] for port in server(manifests)["ports"]}
    assert ports == {"grpc": settings["grpc_port"], "metrics": settings["metrics_port"]}
    annotations = pod(manifests)["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(ports["metrics"])
    assert annotations["prometheus.io/path"] == "/metrics"


@pytest.mark.parametrize(
    ("probe", "health_service"), [("startupProbe", ""), ("readinessProbe", ""), ("livenessProbe", "live")]
)
def test_probes_ask_the_health_service(manifests: list[Resource], probe: str, health_service: str) -> None:
    assert server(manifests)[probe]["grpc"] == {"port": settings_of(manifests)["grpc_port"], "service": health_service}


def test_probes_are_patient_with_starts_and_overload(manifests: list[Resource]) -> None:
    def patience_s(probe: str) -> int:
        found = server(manifests)[probe]
        patience: int = found["periodSeconds"] * found["failureThreshold"]
        return patience

    assert patience_s("startupProbe") >= 300
    # So that a pod that is not ready in time says why.
    assert patience_s("startupProbe") > Settings.model_fields["warm_up_timeout_s"].default
    assert patience_s("livenessProbe") >= 60
    assert patience_s("readinessProbe") <= 10


def test_services_lead_to_the_grpc_port(manifests: list[Resource]) -> None:
    services = [resource["spec"] for resource in manifests if resource["kind"] == "Service"]
    for service in services:
        [port] = service["ports"]
        assert port["targetPort"] == "grpc"
        assert port["port"] == settings_of(manifests)["grpc_port"]
        assert port["appProtocol"] == "kubernetes.io/h2c"
    assert sorted(service.get("clusterIP", "assigned") for service in services) == ["None", "assigned"]


def is_selected(selector: Resource, labels: dict[str, str]) -> bool:
    """Whether a selector that asks for something finds these labels."""
    wanted = [(key, [value]) for key, value in selector.get("matchLabels", {}).items()]
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        wanted.append((expression["key"], expression["values"]))
    assert wanted, "an empty selector finds everything"
    return all(labels.get(key) in values for key, values in wanted)


CLIENT = {"beamline-client": "true"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}


@pytest.mark.parametrize(
    ("namespace", "labels", "ports"),
    [
        pytest.param(CLIENT, CLIENT, {"grpc"}, id="caller"),
        pytest.param({}, CLIENT, set(), id="pod that labels itself"),
        pytest.param(MONITORING, CLIENT, set(), id="pod that labels itself, in another known namespace"),
        pytest.param(CLIENT, {}, set(), id="neighbour of a caller"),
        pytest.param({"beamline-client": "false"}, CLIENT, set(), id="namespace that is shut"),
        pytest.param(MONITORING, PROMETHEUS, {"metrics"}, id="prometheus"),
        pytest.param({}, PROMETHEUS, set(), id="another prometheus"),
        pytest.param(MONITORING, {}, set(), id="neighbour of prometheus"),
    ],
)
def test_a_port_is_open_to_pods_whose_namespace_and_label_are_known(
    manifests: list[Resource], namespace: dict[str, str], labels: dict[str, str], ports: set[str]
) -> None:
    found = set()
    for rule in only(manifests, "NetworkPolicy")["spec"]["ingress"]:
        [peer], [port] = rule["from"], rule["ports"]
        assert peer.keys() == {"namespaceSelector", "podSelector"}
        matched = is_selected(peer["namespaceSelector"], namespace), is_selected(peer["podSelector"], labels)
        if all(matched):
            found.add(port["port"])
    assert found == ports


def test_the_network_policy_lets_nothing_out(manifests: list[Resource]) -> None:
    policy = only(manifests, "NetworkPolicy")["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert policy["egress"] == []


def test_the_bundle_is_where_the_server_looks_for_it(manifests: list[Resource]) -> None:
    bundle = server(manifests)["args"][0]
    [written] = bundle_copier(manifests)["volumeMounts"]
    [read] = [mount for mount in server(manifests)["volumeMounts"] if mount["mountPath"] == bundle]
    assert written["mountPath"] == bundle
    assert bundle_copier(manifests)["command"][-1] == f"{bundle}/"
    assert written["name"] == read["name"]
    assert read["readOnly"] is True
    [volume] = [volume for volume in pod(manifests)["spec"]["volumes"] if volume["name"] == read["name"]]
    assert "emptyDir" in volume


def test_there_is_time_to_finish_accepted_requests(manifests: list[Resource]) -> None:
    settings = settings_of(manifests)
    assert settings["lame_duck_s"] == 5
    assert settings["drain_timeout_s"] >= settings["max_duration_s"]
    grace_s = pod(manifests)["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= settings["lame_duck_s"] + settings["drain_timeout_s"] + EXIT_MARGIN_S


def test_decode_threads_and_front_end_have_a_processor_each(manifests: list[Resource]) -> None:
    """The container sees all of the node's processors, so what it may use has to be said in the settings."""
    settings = settings_of(manifests)
    requested = Decimal(server(manifests)["resources"]["requests"]["cpu"])
    assert settings["workers"] * settings["threads_per_worker"] + 1 == requested


# ---- availability ---------------------------------------------------------------------------------------------------


def test_selectors_find_the_pods(manifests: list[Resource]) -> None:
    labels = pod(manifests)["metadata"]["labels"]
    found = dict(selectors(manifests))
    assert len(found) == 7
    for name, selector in found.items():
        assert selector, name
        assert selector.items() <= labels.items(), name


def test_a_second_model_in_the_namespace_stays_apart(manifests: list[Resource], neighbours: list[Resource]) -> None:
    ours, theirs = (pod(resources)["metadata"]["labels"] for resources in (manifests, neighbours))
    for name, selector in selectors(neighbours):
        assert selector.items() <= theirs.items(), name
        assert not selector.items() <= ours.items(), name
    for name, selector in selectors(manifests):
        assert not selector.items() <= theirs.items(), name
    assert not {(r["kind"], r["metadata"]["name"]) for r in manifests} & {
        (r["kind"], r["metadata"]["name"]) for r in neighbours
    }
    autoscaler = only(neighbours, "HorizontalPodAutoscaler")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == only(neighbours, "Deployment")["metadata"]["name"]
    # Callers carry the labels that the documentation tells them to, and none of ours.
    assert only(neighbours, "NetworkPolicy")["spec"]["ingress"] == only(manifests, "NetworkPolicy")["spec"]["ingress"]


def test_a_second_model_is_the_one_that_was_named(neighbours: list[Resource], repository: Path) -> None:
    assert bundle_copier(neighbours)["image"] == NEIGHBOUR_IMAGE
    names = {resource["metadata"]["name"] for resource in neighbours if resource["kind"] == "Service"}
    assert names == {"en-de-beamline", "en-de-beamline-headless"}
    assert "dns:///en-de-beamline-headless." in (repository / "docs" / "deploy.md").read_text("utf-8")


def test_a_rollout_never_takes_capacity_away(manifests: list[Resource]) -> None:
    deployment = only(manifests, "Deployment")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert deployment["minReadySeconds"] >= 10


def test_a_disruption_leaves_a_replica(manifests: list[Resource]) -> None:
    budget = only(manifests, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert only(manifests, "HorizontalPodAutoscaler")["spec"]["minReplicas"] > budget["maxUnavailable"]


def test_the_autoscaler_owns_the_number_of_replicas(manifests: list[Resource]) -> None:
    deployment = only(manifests, "Deployment")
    autoscaler = only(manifests, "HorizontalPodAutoscaler")["spec"]
    assert autoscaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert autoscaler["maxReplicas"] > autoscaler["minReplicas"]


@pytest.mark.parametrize("folder", ["base", "overlays/cpu"])
def test_the_autoscaler_can_see_saturated_workers(folder: str, k8s: Path, kustomize: Render) -> None:
    """Workers that never pause must exceed the target by more than the autoscaler's tolerance."""
    manifests = kustomize(k8s / folder)
    settings = settings_of(manifests)
    [metric] = only(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    target = Decimal(metric["resource"]["target"]["averageUtilization"]) / 100
    saturated = Decimal(settings["workers"] * settings["threads_per_worker"]) / Decimal(
        server(manifests)["resources"]["requests"]["cpu"]
    )
    assert saturated > target * (1 + AUTOSCALER_TOLERANCE)


# ---- security -------------------------------------------------------------------------------------------------------


def test_pods_meet_the_restricted_standard(manifests: list[Resource]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a read-only root on top."""
    spec = pod(manifests)["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["runAsGroup"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert {key for volume in spec["volumes"] for key in volume if key != "name"} <= {"configMap", "emptyDir"}
    for container in (server(manifests), bundle_copier(manifests)):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not any("hostPort" in port for port in container.get("ports", ()))


def test_the_only_place_to_write_is_a_small_tmp(manifests: list[Resource]) -> None:
    writable = [m for m in server(manifests)["volumeMounts"] if not m.get("readOnly")]
    assert [mount["mountPath"] for mount in writable] == ["/tmp"]
    volumes = {volume["name"]: volume for volume in pod(manifests)["spec"]["volumes"]}
    assert volumes[writable[0]["name"]]["emptyDir"]["sizeLimit"]


def test_pods_hold_no_credentials(manifests: list[Resource]) -> None:
    account = only(manifests, "ServiceAccount")
    spec = pod(manifests)["spec"]
    assert spec["serviceAccountName"] == account["metadata"]["name"]
    assert spec["automountServiceAccountToken"] is False
    assert account["automountServiceAccountToken"] is False


def test_memory_is_bounded_and_cpu_is_not_throttled(manifests: list[Resource]) -> None:
    for container in (server(manifests), bundle_copier(manifests)):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert limits["memory"] == requests["memory"]
        assert "cpu" not in limits


def mebibytes(quantity: str) -> int:
    number, unit = quantity[:-2], quantity[-2:]
    return int(number) * {"Mi": 1, "Gi": 1024}[unit]


def test_a_pod_may_fill_its_volumes_and_its_logs(manifests: list[Resource]) -> None:
    """The kubelet evicts a pod whose volumes and logs together exceed the limits of its containers."""
    limits = []
    for container in (server(manifests), bundle_copier(manifests)):
        requests, limit = (container["resources"][key]["ephemeral-storage"] for key in ("requests", "limits"))
        assert requests == limit
        limits.append(mebibytes(limit))
    volumes = [volume["emptyDir"]["sizeLimit"] for volume in pod(manifests)["spec"]["volumes"] if "emptyDir" in volume]
    # Init containers do not add to a pod's limit.
    assert limits[0] >= sum(map(mebibytes, volumes)) + 2 * LOG_MIB
    assert limits[1] >= LOG_MIB


# ---- overlays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", OVERLAYS)
def test_images_have_versions_and_no_registry(folder: str, k8s: Path, repository: Path, kustomize: Render) -> None:
    """The version is this package's; the registry is the operator's."""
    manifests = kustomize(k8s / folder)
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert server(manifests)["image"] == f"beamline-server:{version}-{Path(folder).name}"
    assert re.fullmatch(r"beamline-bundle:fr-en-(int8|fp16)", bundle_copier(manifests)["image"])


@pytest.mark.parametrize("folder", OVERLAYS)
def test_images_can_be_named_by_digest(folder: str, k8s: Path, kustomize: Render, tmp_path: Path) -> None:
    images = {
        name: f"registry.example:5000/{name}@sha256:{digit * 64}" for name, digit in (("server", "a"), ("bundle", "b"))
    }
    shutil.copytree(k8s, tmp_path / "k8s")
    set_images(tmp_path / "k8s" / folder, **images)
    manifests = kustomize(tmp_path / "k8s" / folder)
    assert server(manifests)["image"] == images["server"]
    assert bundle_copier(manifests)["image"] == images["bundle"]


def test_the_base_runs_on_cpus(k8s: Path, kustomize: Render) -> None:
    manifests = kustomize(k8s / "overlays/cpu")
    assert settings_of(manifests)["device"] == "cpu"
    assert not [name for name in server(manifests)["resources"]["limits"] if "gpu" in name]


def test_the_gpu_overlay_asks_for_a_gpu_and_uses_it(gpu: list[Resource]) -> None:
    assert server(gpu)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings_of(gpu)["device"] == "cuda"
    assert settings_of(gpu)["workers"] == 1
    assert bundle_copier(gpu)["image"].endswith("-fp16")
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod(gpu)["spec"]["tolerations"]


def test_the_gpu_overlay_scales_by_demand(gpu: list[Resource]) -> None:
    [metric] = only(gpu, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "beamline_row_demand"
    assert Decimal(metric["pods"]["target"]["averageValue"].removesuffix("m")) < 1000


def test_overlays_differ_in_settings_only_where_they_must(k8s: Path, kustomize: Render, gpu: list[Resource]) -> None:
    """The GPU's file replaces the base's: what is changed in one must be changed in the other."""
    ours, theirs = settings_of(kustomize(k8s / "overlays/cpu")), settings_of(gpu)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"device", "workers"}
