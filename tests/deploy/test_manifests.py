"""The rendered chart and the kustomize overlays: schemas, and the rules of `rules.py`."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ladderstitch.gateway.config import GatewayConfig
from tests.deploy.manifests import (
    Manifest,
    Manifests,
    application,
    container,
    deployment,
    gateway,
    head,
    of_kind,
    parse,
    worker,
    worker_group,
)
from tests.deploy.rules import RULES, broken
from tests.deploy.schema_checks import validate

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
VARIANTS = sorted(path.stem for path in (DEPLOY / "values").glob("*.yaml"))


def committed(variant: str) -> Manifests:
    """Return the committed manifests of a variant."""
    return parse((DEPLOY / "kustomize" / variant / "ladderstitch.yaml").read_text())


def run(*command: str) -> str:
    """Return the output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("variant", VARIANTS)
def test_chart_lints_and_kustomize_matches_it(helm: str, variant: str) -> None:
    values = str(DEPLOY / "values" / f"{variant}.yaml")
    run(helm, "lint", "--strict", str(DEPLOY / "chart"), "-f", values)
    run(sys.executable, "scripts/manifests.py", "--check")


def test_values_schema_has_the_fields_of_the_server() -> None:
    run(sys.executable, "scripts/chart_schema.py", "--check")


@pytest.mark.parametrize("variant", VARIANTS)
def test_kustomize_builds_each_overlay(kubectl: str, variant: str) -> None:
    built = parse(run(kubectl, "kustomize", str(DEPLOY / "kustomize" / variant)))
    assert sorted(m["kind"] for m in built) == sorted(m["kind"] for m in committed(variant))


def with_gateway(helm: str, *flags: str) -> Manifests:
    """Return the manifests that exist only with the gateway enabled."""
    command = (helm, "template", "ladderstitch", str(DEPLOY / "chart"), *flags)
    without, complete = (
        parse(run(*command, "--set", f"gateway.enabled={on}")) for on in ("false", "true")
    )
    return [manifest for manifest in complete if manifest not in without]


def test_gateway_manifests_are_valid_and_reach_replicas(helm: str) -> None:
    added = with_gateway(helm)
    for manifest in added:
        validate(manifest)
    assert sorted(m["kind"] for m in added) == [
        "ConfigMap",
        "Deployment",
        "PodDisruptionBudget",
        "Service",
    ]
    pod = of_kind(added, "Deployment")["spec"]["template"]
    fields = yaml.safe_load(of_kind(added, "ConfigMap")["data"]["gateway.yaml"])
    config = GatewayConfig.model_validate(fields)
    assert container(pod)["command"][:2] == ["ladderstitch", "gateway"]
    declared = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
    assert declared == {
        "grpc": config.port,
        "health": config.health_port,
        "ls-metrics": config.metrics_port,
    }
    assert container(pod)["readinessProbe"]["grpc"]["port"] == config.health_port
    grace_s = pod["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > config.drain_announce_s + config.drain_s
    replicas = of_kind(
        parse(run(helm, "template", "ladderstitch", str(DEPLOY / "chart"))), "Service"
    )
    assert config.replicas == (f"dns:{replicas['metadata']['name']}:8001",)
    for kind in ("Service", "PodDisruptionBudget"):
        spec = of_kind(added, kind)["spec"]
        wanted = spec["selector"].get("matchLabels", spec["selector"])
        assert wanted.items() <= pod["metadata"]["labels"].items()
    mutual = yaml.safe_load(
        of_kind(with_gateway(helm, "--set", "tls.mutual=true"), "ConfigMap")["data"]["gateway.yaml"]
    )
    assert GatewayConfig.model_validate(mutual).replica_key is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_manifests_match_their_schemas(variant: str) -> None:
    for manifest in committed(variant):
        validate(manifest)


@pytest.mark.parametrize("variant", VARIANTS)
def test_manifests_break_no_rule(variant: str) -> None:
    assert broken(committed(variant)) == {}


def test_chart_values_reach_the_server(helm: str) -> None:
    sets = "server.threads=3,tls.mutual=true,scheduling.min_quality=0.9,monitoring.rules=false"
    text = run(helm, "template", "x", str(DEPLOY / "chart"), "--set-json", sets)
    manifests = parse(text)
    fields = application(manifests)["args"]
    assert fields["threads"] == 3
    assert fields["tls_client_ca"] == "/etc/ladderstitch/tls/ca.crt"
    assert deployment(manifests)["user_config"] == {"min_quality": 0.9}
    assert "PrometheusRule" not in {manifest["kind"] for manifest in manifests}
    assert broken(manifests) == {}


def change_application(manifests: Manifests, change: Callable[[Manifest], object]) -> None:
    """Change the only application of `serveConfigV2` in place."""
    spec = of_kind(manifests, "RayService")["spec"]
    serve_config = yaml.safe_load(spec["serveConfigV2"])
    change(serve_config["applications"][0])
    spec["serveConfigV2"] = yaml.safe_dump(serve_config)


def rename_port(manifests: Manifests) -> None:
    """Rename the port of gRPC."""
    container(worker(manifests))["ports"][1]["name"] = "grpc"


def without_kind(kind: str) -> Callable[[Manifests], None]:
    """Return a function that removes the manifest of a kind."""

    def remove(manifests: Manifests) -> None:
        manifests.remove(of_kind(manifests, kind))

    return remove


def without_shared_memory(manifests: Manifests) -> None:
    """Remove the mount of /dev/shm."""
    mounts = container(worker(manifests))["volumeMounts"]
    mounts[:] = [mount for mount in mounts if mount["name"] != "shm"]


BREAKING: dict[str, Callable[[Manifests], object]] = {
    "serve_ports_are_named_for_kuberay": rename_port,
    "server_accepts_its_config": lambda m: change_application(
        m, lambda app: app["args"].update(rank=1)
    ),
    "pods_drain_before_they_stop": lambda m: container(worker(m)).pop("lifecycle"),
    "grace_is_longer_than_the_drain": lambda m: worker(m)["spec"].update(
        terminationGracePeriodSeconds=30
    ),
    "readiness_probe_asks_the_replica": lambda m: container(worker(m)).pop("readinessProbe"),
    "disruptions_are_limited": without_kind("PodDisruptionBudget"),
    "service_is_headless_and_selects_replicas": lambda m: of_kind(m, "Service")["spec"].pop(
        "clusterIP"
    ),
    "services_target_ports_of_the_server": lambda m: change_application(
        m, lambda app: app["args"].update(http_port=8081)
    ),
    "gateways_forward_what_replicas_answer": lambda m: container(gateway(m) or {})["ports"].pop(),
    "metrics_are_declared_and_scraped": lambda m: container(worker(m))["ports"].pop(),
    "containers_have_requests_and_limits": lambda m: container(head(m))["resources"].pop("limits"),
    "ranks_and_gpus_fit_the_pod": lambda m: change_application(
        m, lambda app: app["deployments"][0].pop("max_replicas_per_node")
    ),
    "worker_group_fits_all_replicas": lambda m: worker_group(m).update(maxReplicas=1),
    "callers_are_authenticated": lambda m: change_application(
        m, lambda app: app["args"].update(insecure_public=True)
    ),
    "pods_are_unprivileged": lambda m: container(worker(m)).pop("securityContext"),
    "network_policy_closes_other_ports": without_kind("NetworkPolicy"),
    "shared_memory_is_mounted": without_shared_memory,
}


def test_every_rule_has_a_breaking_change() -> None:
    assert BREAKING.keys() == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("name", BREAKING)
def test_rule_reports_its_breaking_change(name: str) -> None:
    manifests = copy.deepcopy(committed("gpu-tp" if name.startswith("gateways") else "cpu"))
    BREAKING[name](manifests)
    assert name in broken(manifests)


def test_example_token_file_loads() -> None:
    from ladderstitch.security.tokens import load_tokens

    names = {token.name for token in load_tokens(ROOT / "examples/tokens.yaml").values()}
    assert names == {
        token["name"]
        for token in yaml.safe_load((ROOT / "examples/tokens.yaml").read_text())["tokens"]
    }
