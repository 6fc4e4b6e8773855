"""The Kubernetes manifests: they render, they are valid, and their numbers and names agree with the server's."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import pytest

from serve import config
from tests.deploy import manifests
from tests.deploy.crd_schemas import CRD_SCHEMAS
from tests.deploy.manifests import KUBERNETES, ROOT, TARGETS, Manifest

VERSIONS = ("1.30.0", "1.33.0", "1.37.0")
NUMBER_OF_OBJECTS = {"base": 7, "overlays/demo": 8, "overlays/production": 10}
# The server promises to exit within the grace + 2 s; what is left covers a loaded node.
TEARDOWN_SECONDS = 5

each_target = pytest.mark.parametrize("target", TARGETS)


def test_every_kustomization_is_tested() -> None:
    folders = {path.parent.relative_to(KUBERNETES).as_posix() for path in KUBERNETES.rglob("kustomization.yaml")}
    components = {"components/monitoring", "components/api-keys"}  # overlays/production has both
    assert folders == {*TARGETS, *components}


@each_target
def test_objects_are_valid(target: str) -> None:
    """Against the real schemas, strictly: an unknown field fails."""
    objects = manifests.render(target)
    assert len(objects) == NUMBER_OF_OBJECTS[target]
    for manifest in objects:
        if manifest["kind"] in CRD_SCHEMAS:
            jsonschema.validate(manifest, CRD_SCHEMAS[manifest["kind"]])
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_refuse_mistakes() -> None:
    (monitor,) = manifests.of_kind("overlays/production", "PodMonitor")
    endpoint = monitor["spec"]["podMetricsEndpoints"][0]
    for wrong in ({**endpoint, "interval": "15 secs"}, {**endpoint, "port": 8000}, {**endpoint, "pathh": "/"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(
                {**monitor, "spec": {**monitor["spec"], "podMetricsEndpoints": [wrong]}}, CRD_SCHEMAS["PodMonitor"]
            )
    spec = {**manifests.deployment("base")["spec"], "replica": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**manifests.deployment("base"), "spec": spec}, VERSIONS[-1], strict=True)


@each_target
def test_the_pod_outlives_its_drain(target: str) -> None:
    pre_stop = manifests.server(target)["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = float(manifests.settings(target)["FLAN_SERVE_SHUTDOWN_GRACE_SECONDS"])
    assert pre_stop >= 10, "proxies need seconds to forget an endpoint"
    assert manifests.pod(target)["terminationGracePeriodSeconds"] >= pre_stop + grace + TEARDOWN_SECONDS


@each_target
def test_probes(target: str) -> None:
    container = manifests.server(target)
    startup, ready, live = (container[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert startup["httpGet"] == ready["httpGet"] == {"path": "/readyz", "port": "http"}
    assert live["httpGet"] == {"path": "/livez", "port": "http"}, "liveness on /readyz would kill a draining pod"
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    assert ready["failureThreshold"] >= 2
    assert min(probe["timeoutSeconds"] for probe in (startup, ready, live)) >= 5
    # A pod that turns unready is off every list well before preStop ends.
    assert ready["periodSeconds"] * ready["failureThreshold"] <= 15


@each_target
def test_every_variable_is_a_setting(target: str) -> None:
    known = {config.env_name(field) for field in dataclasses.fields(config.Settings)}
    assert len(known) > 20
    names = [*manifests.settings(target), *(entry["name"] for entry in manifests.server(target)["env"])]
    ours = [name for name in names if name.startswith(config.ENV_PREFIX)]
    assert len(ours) >= 5
    assert set(ours) <= known
    assert set(names) - set(ours) == {"HF_HUB_OFFLINE", "OMP_NUM_THREADS"}


@each_target
def test_the_server_accepts_the_settings(target: str) -> None:
    settings = config.load([], manifests.settings(target)).settings
    ports = {port["name"]: port["containerPort"] for port in manifests.server(target)["ports"]}
    assert ports == {"http": settings.port, "grpc": settings.grpc_port}
    assert settings.host == "0.0.0.0"


@each_target
def test_no_service_name_becomes_a_setting(target: str) -> None:
    """Kubernetes sets <SERVICE>_PORT and more in every pod; the server refuses an unknown FLAN_SERVE_* variable."""
    for service in manifests.of_kind(target, "Service"):
        assert not f"{service['metadata']['name'].upper().replace('-', '_')}_".startswith(config.ENV_PREFIX)
    assert manifests.pod(target)["enableServiceLinks"] is False


@each_target
def test_security_context(target: str) -> None:
    spec, container = manifests.pod(target), manifests.server(target)
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert not any("hostPath" in volume for volume in spec["volumes"])
    assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()


@each_target
def test_writable_folders_are_volumes(target: str) -> None:
    volumes = {volume["name"]: volume for volume in manifests.pod(target)["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in manifests.server(target)["volumeMounts"]}
    assert {volumes[mount["name"]]["name"] for mount in mounts.values()} == set(volumes), "a volume nobody mounts"
    for path in ("/home/flan", "/tmp", "/dev/shm"):
        assert "sizeLimit" in volumes[mounts[path]["name"]]["emptyDir"], "unbounded, it can fill the node"
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    others = [mount for path, mount in mounts.items() if path not in ("/home/flan", "/tmp", "/dev/shm")]
    assert all(mount["readOnly"] for mount in others)


@each_target
def test_selectors_meet_the_pods(target: str) -> None:
    labels = manifests.deployment(target)["spec"]["template"]["metadata"]["labels"]
    selectors = [manifests.deployment(target)["spec"]["selector"]["matchLabels"]]
    selectors += [service["spec"]["selector"] for service in manifests.of_kind(target, "Service")]
    selectors += [
        m["spec"]["selector"]["matchLabels"]
        for kind in ("PodDisruptionBudget", "PodMonitor")
        for m in manifests.of_kind(target, kind)
    ]
    selectors += [m["spec"]["podSelector"]["matchLabels"] for m in manifests.of_kind(target, "NetworkPolicy")]
    selectors += [entry["labelSelector"]["matchLabels"] for entry in manifests.pod(target)["topologySpreadConstraints"]]
    assert len(selectors) >= 6
    for selector in selectors:
        assert selector == {"app.kubernetes.io/name": "flan", "app.kubernetes.io/component": "server"}
        assert selector.items() <= labels.items()


@each_target
def test_ports_agree(target: str) -> None:
    names = {port["name"] for port in manifests.server(target)["ports"]}
    for service in manifests.of_kind(target, "Service"):
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in names
            assert port["appProtocol"] == {"http": "http", "grpc": "kubernetes.io/h2c"}[port["name"]]
    (headless,) = [s for s in manifests.of_kind(target, "Service") if s["spec"].get("clusterIP") == "None"]
    assert [port["name"] for port in headless["spec"]["ports"]] == ["grpc"]
    for monitor in manifests.of_kind(target, "PodMonitor"):
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= names
    for policy in manifests.of_kind(target, "NetworkPolicy"):
        assert all(port["port"] in names for rule in policy["spec"]["ingress"] for port in rule["ports"])


@each_target
def test_the_image_is_this_version(target: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    image = manifests.server(target)["image"]
    assert re.fullmatch(rf"[a-z0-9.\-/:]+/flan-serve:{re.escape(version)}", image)
    found = manifests.deployment(target)
    for metadata in (found["metadata"], found["spec"]["template"]["metadata"]):
        assert metadata["labels"]["app.kubernetes.io/version"] == version
    for manifest in manifests.render(target):
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["labels"]["app.kubernetes.io/name"] == "flan"


@each_target
def test_keys_come_from_a_secret_or_not_at_all(target: str) -> None:
    assert "FLAN_SERVE_API_KEY" not in manifests.settings(target)
    entries = [entry for entry in manifests.server(target)["env"] if entry["name"] == "FLAN_SERVE_API_KEY"]
    assert [entry["valueFrom"] for entry in entries] == (
        [{"secretKeyRef": {"name": "flan-api-keys", "key": "keys"}}] if target == "overlays/production" else []
    ), "not optional: a missing Secret must not open the server"


def test_rollout_never_goes_below_the_replicas() -> None:
    spec: dict[str, Any] = manifests.deployment("overlays/production")["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert spec["progressDeadlineSeconds"] > 600
    (budget,) = manifests.of_kind("overlays/production", "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1


def test_monitoring_may_scrape_and_others_may_not() -> None:
    """NetworkPolicies add up: the base alone does not let the monitoring namespace in."""
    by_name: dict[str, Manifest] = {
        policy["metadata"]["name"]: policy for policy in manifests.of_kind("overlays/production", "NetworkPolicy")
    }
    assert by_name.keys() == {"flan", "flan-metrics"}
    assert by_name["flan"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    (rule,) = by_name["flan"]["spec"]["egress"]
    assert {port["port"] for port in rule["ports"]} == {53}
