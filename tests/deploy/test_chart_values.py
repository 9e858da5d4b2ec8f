"""The chart's values reach its manifests, which are valid with any of them."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.metrics import GatewayMetrics
from tests.deploy.chart import ROOT, rendered, with_values
from tests.deploy.conftest import tool
from tests.deploy.manifests import (
    Manifest,
    application,
    cluster,
    container,
    gateway_config,
    head,
    of_kind,
    parse,
    ports,
    services,
    worker,
)
from tests.deploy.rules import broken
from tests.deploy.schema_checks import validate, validator

EXAMPLES = sorted(
    path
    for path in (ROOT / "deploy" / "examples").glob("*.yaml")
    if "apiVersion" not in yaml.safe_load(path.read_text().partition("---")[0])
)
LONGEST_RELEASE = "release-" + "x" * 45
"""As long as Helm allows: 53 characters."""
KUBERAY_NAME_LIMIT = 47
"""Longest name of a RayService that KubeRay accepts."""


def test_ports_of_the_server_are_rendered_everywhere(helm: str) -> None:
    sets = "server.port=9000,server.admin_port=9001,server.health_port=9002,server.http_port=9003"
    manifests = rendered(
        helm, "--set", f"{sets},server.metrics_port=9004,http.enabled=true,gateway.enabled=true"
    )
    fields = application(manifests)["args"]
    wanted = {"port": 9000, "admin_port": 9001, "health_port": 9002, "http_port": 9003}
    assert fields.items() >= (wanted | {"metrics_port": 9004}).items()
    assert services(manifests)["serve-grpc"]["ports"][0]["port"] == 9000
    assert "serve-openai" not in services(manifests)  # the gateways forward HTTP
    assert services(manifests)["openai"]["ports"][0]["port"] == 8081
    replica = container(worker(manifests))
    declared = ports(worker(manifests))
    assert (declared["serve-grpc"], declared["health"], declared["ls-metrics"]) == (
        9000,
        9002,
        9004,
    )
    assert "--address=127.0.0.1:9001" in replica["lifecycle"]["preStop"]["exec"]["command"]
    gateway = yaml.safe_load(of_kind(manifests, "ConfigMap")["data"]["gateway.yaml"])
    assert gateway["replicas"] == ["dns:x-ladderstitch-replicas:9000"]
    assert gateway["http_port"] == 8081
    alone = rendered(helm, "--set", f"{sets},http.enabled=true")
    assert services(alone)["serve-openai"]["ports"][0]["port"] == 9003
    for found in (manifests, alone):
        assert broken(found) == {}


def test_http_of_gateways_is_rendered_everywhere(helm: str) -> None:
    sets = "http.enabled=true,gateway.enabled=true,gateway.server.http_port=9005"
    origins = '{"server":{"cors_origins":["https://a.example.org"]}}'
    manifests = rendered(helm, "--set", f"{sets},http.ingress.enabled=true", "--set-json", origins)
    assert broken(manifests) == {}
    config = gateway_config(manifests)
    assert (config["http_port"], config["cors_origins"]) == (9005, ["https://a.example.org"])
    GatewayConfig.model_validate(config)
    assert services(manifests)["openai"]["ports"][0]["port"] == 9005
    backend = of_kind(manifests, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]
    assert backend["service"] == {"name": "x-ladderstitch-openai", "port": {"number": 9005}}
    without = rendered(helm, "--set", "gateway.enabled=true")
    assert "http_port" not in gateway_config(without)
    assert broken(without) == {}


def test_default_of_a_server_field_can_be_unset(helm: str) -> None:
    assert application(rendered(helm))["args"]["max_connection_age_s"] == 300
    unset = rendered(helm, "--set", "server.max_connection_age_s=null")
    assert "max_connection_age_s" not in application(unset)["args"]


PLACEMENT: dict[str, Any] = {
    "podLabels": {"team": "vision"},
    "podAnnotations": {"note": "kept"},
    "extraEnv": [{"name": "LADDERSTITCH_CACHE", "value": "/cache"}],
    "extraEnvFrom": [{"secretRef": {"name": "bucket"}}],
    "extraVolumes": [{"name": "cache", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "cache", "mountPath": "/cache"}],
    "priorityClassName": "serving",
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
}
"""Values of a component's pods."""


@pytest.mark.parametrize("component", ["replica", "head", "gateway"])
def test_pod_values_reach_the_pods_of_a_component(
    helm: str, tmp_path: Path, component: str
) -> None:
    values = {component: PLACEMENT} | (
        {"gateway": {"enabled": True} | PLACEMENT} if component == "gateway" else {}
    )
    manifests = with_values(helm, tmp_path, values)
    if component == "gateway":
        pod: Manifest = of_kind(manifests, "Deployment")["spec"]["template"]
    else:
        pod = (head if component == "head" else worker)(manifests)
    spec, only = pod["spec"], container(pod)
    assert pod["metadata"]["labels"]["team"] == "vision"
    assert pod["metadata"]["annotations"]["note"] == "kept"
    assert PLACEMENT["extraEnv"][0] in only["env"]
    assert only["envFrom"] == PLACEMENT["extraEnvFrom"]
    assert PLACEMENT["extraVolumes"][0] in spec["volumes"]
    assert PLACEMENT["extraVolumeMounts"][0] in only["volumeMounts"]
    for field in ("priorityClassName", "nodeSelector", "tolerations", "affinity"):
        assert spec[field] == PLACEMENT[field]
    (spread,) = spec["topologySpreadConstraints"]
    selected = spread["labelSelector"]["matchLabels"]
    assert selected["app.kubernetes.io/component"] == component
    assert selected.items() <= pod["metadata"]["labels"].items()


def test_service_account_is_created_and_used(helm: str) -> None:
    sets = "serviceAccount.create=true,serviceAccount.annotations.role=reader,gateway.enabled=true"
    manifests = rendered(helm, "--set", sets)
    account = of_kind(manifests, "ServiceAccount")
    assert account["metadata"]["annotations"] == {"role": "reader"}
    for pod in (worker(manifests), of_kind(manifests, "Deployment")["spec"]["template"]):
        assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
        assert pod["spec"]["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in head(manifests)["spec"]  # KubeRay makes the autoscaler's


def test_redis_keeps_the_state_of_the_head(helm: str) -> None:
    values = ROOT / "deploy/examples/fault-tolerance.yaml"
    options = cluster(rendered(helm, "-f", str(values)))["gcsFaultToleranceOptions"]
    redis = parse((ROOT / "deploy/examples/redis.yaml").read_text())
    for manifest in redis:
        validate(manifest)
    service = of_kind(redis, "Service")
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"{name}:{port}"
    (only,) = of_kind(redis, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert options["redisPassword"]["valueFrom"] == only["env"][0]["valueFrom"]
    admitted = of_kind(redis, "NetworkPolicy")["spec"]["ingress"][0]["from"][0]["podSelector"]
    labels = head(rendered(helm, "-f", str(values)))["metadata"]["labels"]
    assert admitted["matchLabels"].items() <= labels.items()


def gateway_series() -> set[str]:
    """Return the names of the counters that a gateway exposes."""
    return {
        f"{metric.name}_total"
        for metric in GatewayMetrics().registry.collect()
        if metric.type == "counter"
    }


def test_autoscalers_query_a_metric_of_the_gateway(helm: str, tmp_path: Path) -> None:
    scaled = rendered(helm, "-f", str(ROOT / "deploy/examples/gateway-keda.yaml"))
    query = of_kind(scaled, "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
    counted = re.findall(r"ladderstitch_\w+", query)
    adapter = yaml.safe_load((ROOT / "deploy/monitoring/prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    counted.append(rule["seriesQuery"].partition("{")[0])
    assert len(counted) == 2
    assert set(counted) <= gateway_series()
    target = rendered(helm, "-f", str(ROOT / "deploy/examples/gateway-hpa.yaml"))
    metric = of_kind(target, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]
    assert metric["name"] == rule["name"]["as"]
    rules = {"groups": [{"name": "keda", "rules": [{"record": "a:b", "expr": query}]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    command = [tool("promtool"), "check", "rules", str(tmp_path / "rules.yaml")]
    checked = subprocess.run(command, capture_output=True, timeout=500)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("kind", ["ScaledObject", "HorizontalPodAutoscaler"])
def test_autoscaler_targets_the_gateways(helm: str, kind: str) -> None:
    name = {"ScaledObject": "keda", "HorizontalPodAutoscaler": "hpa"}[kind]
    manifests = rendered(helm, "-f", str(ROOT / f"deploy/examples/gateway-{name}.yaml"))
    deployment = of_kind(manifests, "Deployment")
    assert (
        of_kind(manifests, kind)["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    )
    assert "replicas" not in deployment["spec"]  # the autoscaler's


def test_long_release_names_are_cut_and_stay_distinct(helm: str) -> None:
    sets = "gateway.enabled=true,http.enabled=true,serviceAccount.create=true"
    first = rendered(helm, "--set", sets, release=LONGEST_RELEASE)
    second = rendered(helm, "--set", sets, release=LONGEST_RELEASE[:-1] + "y")
    for manifests in (first, second):
        assert max(len(m["metadata"]["name"]) for m in manifests) <= 63
        ray = of_kind(manifests, "RayService")["metadata"]["name"]
        assert len(ray) <= KUBERAY_NAME_LIMIT
        gateway = yaml.safe_load(of_kind(manifests, "ConfigMap")["data"]["gateway.yaml"])
        assert gateway["replicas"] == [f"dns:{ray}-replicas:8001"]
    assert not {m["metadata"]["name"] for m in first} & {m["metadata"]["name"] for m in second}


def test_name_overrides_replace_the_names(helm: str) -> None:
    full = rendered(helm, "--set", "fullnameOverride=vision,gateway.enabled=true")
    assert {m["metadata"]["name"] for m in full} == {
        "vision",
        "vision-replicas",
        "vision-gateway",
    }
    named = rendered(helm, "--set", "nameOverride=vision")
    assert of_kind(named, "RayService")["metadata"]["name"] == "x-vision"
    assert worker(named)["metadata"]["labels"]["app.kubernetes.io/name"] == "vision"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_values_render_valid_manifests(helm: str, path: Path) -> None:
    rendered(helm, "-f", str(path))


FEATURES: list[dict[str, Any]] = [
    {"serviceAccount": {"create": True}},
    {"tls": {"mutual": True}},
    {"gpus": 4, "tensorParallelSize": 4, "server": {"device": "cuda"}},
    {"model": {"bundle": "/models/x", "volume": {"persistentVolumeClaim": {"claimName": "m"}}}},
    {"replica": PLACEMENT},
    {"head": PLACEMENT},
    {"networkPolicy": {"enabled": False}},
    {"monitoring": {"podMonitor": False, "rules": False}},
    {"commonLabels": {"team": "vision"}, "imagePullSecrets": [{"name": "registry"}]},
    {"podSecurityContext": {"runAsUser": None, "fsGroup": None}},
    {"image": {"digest": "sha256:" + "0" * 64}},
    {"drain": {"announceSeconds": 0, "finishSeconds": 0}},
    {"scheduling": {"policy": "fixed", "fixed_variant": 0, "min_quality": 0.5}},
    *(yaml.safe_load(path.read_text()) for path in EXAMPLES),
]
"""Values that go together in any combination, except for those of the same keys."""


@pytest.mark.parametrize("seed", range(8))
def test_combined_features_render_valid_manifests(helm: str, tmp_path: Path, seed: int) -> None:
    values: dict[str, Any] = {}
    for feature in random.Random(seed).sample(FEATURES, 7):
        values |= {key: value for key, value in feature.items() if key not in values}
    manifests = with_values(helm, tmp_path, values)
    labels = [m["metadata"]["labels"] for m in manifests]
    assert all(given.items() >= values.get("commonLabels", {}).items() for given in labels)


def test_exposed_backends_are_services_of_the_chart(helm: str) -> None:
    for name in ("exposed", "ingress"):
        manifests = rendered(helm, "-f", str(ROOT / f"deploy/examples/{name}.yaml"))
        offered = {
            (m["metadata"]["name"], port["port"])
            for m in manifests
            if m["kind"] == "Service"
            for port in m["spec"]["ports"]
        }
        backends = set()
        for manifest in manifests:
            if manifest["kind"] in ("GRPCRoute", "HTTPRoute"):
                refs = manifest["spec"]["rules"][0]["backendRefs"]
                backends |= {(ref["name"], ref["port"]) for ref in refs}
            if manifest["kind"] == "Ingress":
                path = manifest["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
                backends.add((path["name"], path["port"]["number"]))
        assert len(backends) == 2
        assert backends <= offered


def test_schemas_of_operators_refuse_unknown_fields() -> None:
    import jsonschema

    manifest = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "spec": {"max": 1}}
    with pytest.raises(jsonschema.ValidationError):
        validator("scaledobject-v1alpha1").validate(manifest)
