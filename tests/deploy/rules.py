"""Rules for working deployments that no schema expresses; each rule yields the violations."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.replica.autoscaling import ScalingGoals
from ladderstitch.scheduling.settings import SchedulerSettings
from tests.deploy.manifests import (
    Manifests,
    application,
    cluster,
    container,
    deployment,
    gateway,
    gateway_config,
    has_kind,
    head,
    of_kind,
    pods,
    ports,
    selects,
    services,
    worker,
    worker_group,
)

Rule = Callable[[Manifests], Iterator[str]]
RULES: list[Rule] = []


def rule(check: Rule) -> Rule:
    """Register a rule."""
    RULES.append(check)
    return check


def broken(manifests: Manifests) -> dict[str, list[str]]:
    """Return the violations by the name of the rule; rules without any are left out."""
    violations = {check.__name__: list(check(manifests)) for check in RULES}
    return {name: found for name, found in violations.items() if found}


def defines(path: str) -> bool:
    """Return whether `module:function` exists, without the import, which takes seconds for Ray."""
    module, _, name = path.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    body = ast.parse(Path(spec.origin).read_text()).body
    return any(
        isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name for node in body
    )


@rule
def serve_ports_are_named_for_kuberay(manifests: Manifests) -> Iterator[str]:
    """KubeRay silently drops ports of Serve with other names."""
    number = application(manifests)["args"]["port"]
    names = [name for name, port in ports(worker(manifests)).items() if port == number]
    if names != ["serve-grpc"]:
        yield f"port {number} is named {names}, expected serve-grpc"


@rule
def server_accepts_its_config(manifests: Manifests) -> Iterator[str]:
    described = application(manifests)
    policy = deployment(manifests)["autoscaling_config"]["policy"]["policy_function"]
    for path in (described["import_path"], policy):
        if not defines(path):
            yield f"{path} does not exist"
    if deployment(manifests)["name"] != "replica":
        yield f"expected a deployment called replica, got {deployment(manifests)['name']}"
    try:
        ServerConfig.load(None, described["args"])
        SchedulerSettings.model_validate(deployment(manifests)["user_config"])
        scaling = deployment(manifests)["autoscaling_config"]["policy"]
        ScalingGoals.model_validate(scaling["policy_kwargs"])
    except (ConfigError, ValidationError) as error:
        yield str(error)


@rule
def pods_drain_before_they_stop(manifests: Manifests) -> Iterator[str]:
    """The pod's SIGTERM reaches Ray, not the replica."""
    hook = container(worker(manifests)).get("lifecycle", {}).get("preStop", {})
    command = hook.get("exec", {}).get("command", [])
    if command[:2] != ["ladderstitch", "drain"]:
        yield f"preStop: expected ladderstitch drain, got {command}"
    admin = application(manifests)["args"].get("admin_port")
    if f"--address=127.0.0.1:{admin}" not in command:
        yield f"preStop: expected the drain at the admin port {admin}, got {command}"


@rule
def grace_is_longer_than_the_drain(manifests: Manifests) -> Iterator[str]:
    command = container(worker(manifests)).get("lifecycle", {}).get("preStop", {})
    flags = command.get("exec", {}).get("command", [])
    waits = [
        int(flag.partition("=")[2].removesuffix("s"))
        for flag in flags
        if flag.startswith(("--announce=", "--timeout="))
    ]
    needed = sum(waits) + deployment(manifests)["graceful_shutdown_timeout_s"]
    grace = worker(manifests)["spec"].get("terminationGracePeriodSeconds", 30)
    if grace <= needed:
        yield f"terminationGracePeriodSeconds {grace} <= {needed} of preStop and Serve"
    drain_s = application(manifests)["args"].get("drain_s", 20)
    if deployment(manifests)["graceful_shutdown_timeout_s"] <= drain_s:
        yield "graceful_shutdown_timeout_s: expected more than drain_s, or Serve ends the drain"


@rule
def readiness_probe_asks_the_replica(manifests: Manifests) -> Iterator[str]:
    probe = container(worker(manifests)).get("readinessProbe", {}).get("grpc", {})
    number = application(manifests)["args"].get("health_port")
    if probe.get("port") != number or number not in ports(worker(manifests)).values():
        yield f"readinessProbe: expected the declared health port {number}, got {probe}"


@rule
def disruptions_are_limited(manifests: Manifests) -> Iterator[str]:
    wanted = [
        manifest["spec"]["selector"]["matchLabels"]
        for manifest in manifests
        if manifest["kind"] == "PodDisruptionBudget"
    ]
    limited = {"replica": worker(manifests), "gateway": gateway(manifests)}
    for name, pod in limited.items():
        if pod is not None and not any(selects(labels, pod) for labels in wanted):
            yield f"no PodDisruptionBudget selects a {name}"


@rule
def service_is_headless_and_selects_replicas(manifests: Manifests) -> Iterator[str]:
    spec = services(manifests)["serve-grpc"]
    if spec.get("clusterIP") != "None":
        yield "clusterIP: expected None, because a ClusterIP balances connections, not requests"
    if not selects(spec["selector"], worker(manifests)):
        yield "the Service selects no replica"


@rule
def services_target_ports_of_the_server(manifests: Manifests) -> Iterator[str]:
    declared, fields = ports(worker(manifests)), application(manifests)["args"]
    has_gateways = gateway(manifests) is not None
    for field, name in (("port", "serve-grpc"), ("http_port", "serve-openai")):
        if (number := fields.get(field)) != declared.get(name):
            yield f"{field} is {number}, the pod's port {name} {declared.get(name)}"
        is_forwarded = field == "http_port" and has_gateways
        if number is not None and not is_forwarded and name not in services(manifests):
            yield f"no Service targets {name}"
    for name, spec in services(manifests).items():
        if selects(spec["selector"], worker(manifests)) and name not in declared:
            yield f"targetPort {name} is not a port of a replica"


@rule
def gateways_forward_what_replicas_answer(manifests: Manifests) -> Iterator[str]:
    pod = gateway(manifests)
    if pod is None:
        return
    declared, config = ports(pod), gateway_config(manifests)
    for field, name in (("port", "grpc"), ("http_port", "openai")):
        if (number := config.get(field)) != declared.get(name):
            yield f"{field} is {number}, the gateway's port {name} {declared.get(name)}"
        if (number is None) != (application(manifests)["args"].get(field) is None):
            yield f"{field}: expected it of gateways and replicas, or of none, got {number}"
        service = services(manifests).get(name)
        if number is not None and (service is None or not selects(service["selector"], pod)):
            yield f"no Service of the gateways targets {name}"
        if number is not None and number not in open_ports(manifests):
            yield f"{field}: {number} of the gateways is closed to callers"


@rule
def metrics_are_declared_and_scraped(manifests: Manifests) -> Iterator[str]:
    declared = ports(worker(manifests))
    number = application(manifests)["args"]["metrics_port"]
    if declared.get("ls-metrics") != number or declared.get("metrics") != 8080:
        yield f"expected ports ls-metrics {number} and metrics 8080, got {declared}"
    if has_kind(manifests, "PodMonitor"):
        spec = of_kind(manifests, "PodMonitor")["spec"]
        labels = worker(manifests)["metadata"]["labels"]
        if not spec["selector"]["matchLabels"].items() <= labels.items():
            yield "the PodMonitor selects no replica"
        known = declared.keys() | ports(head(manifests)).keys()
        if missing := {end["port"] for end in spec["podMetricsEndpoints"]} - known:
            yield f"the PodMonitor scrapes undeclared ports {sorted(missing)}"


@rule
def containers_have_requests_and_limits(manifests: Manifests) -> Iterator[str]:
    for pod in pods(manifests):
        bounds = container(pod).get("resources", {})
        for kind in ("requests", "limits"):
            if missing := {"cpu", "memory"} - bounds.get(kind, {}).keys():
                yield f"{container(pod)['name']}: {kind} lack {sorted(missing)}"


@rule
def ranks_and_gpus_fit_the_pod(manifests: Manifests) -> Iterator[str]:
    fields = application(manifests)["args"]
    gpus = int(container(worker(manifests))["resources"]["limits"].get("nvidia.com/gpu", 0))
    ranks = fields.get("tensor_parallel_size", 1) + fields.get("spare_ranks", 0)
    if gpus and gpus < ranks:
        yield f"{ranks} ranks, but {gpus} GPUs in a pod"
    if fields.get("device", "auto").startswith("cuda") and not gpus:
        yield "device is cuda, but the pod asks for no GPU"
    alone = deployment(manifests).get("max_replicas_per_node") == 1
    if fields.get("tensor_parallel_size", 1) == 1 and not alone:
        yield "max_replicas_per_node: expected 1, because two replicas in a pod would share a port"


@rule
def worker_group_fits_all_replicas(manifests: Manifests) -> Iterator[str]:
    scaling, group = deployment(manifests)["autoscaling_config"], worker_group(manifests)
    if not cluster(manifests).get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling: expected true, or no pod is added for a replica"
    if group["maxReplicas"] < scaling["max_replicas"]:
        yield f"{scaling['max_replicas']} replicas on {group['maxReplicas']} pods"
    if group["minReplicas"] < scaling["min_replicas"]:
        yield "minReplicas: expected at least the minimum number of replicas"


@rule
def callers_are_authenticated(manifests: Manifests) -> Iterator[str]:
    fields = application(manifests)["args"]
    if fields.get("insecure_public"):
        yield "insecure_public is set"
    mounts = [mount["mountPath"] for mount in container(worker(manifests))["volumeMounts"]]
    for field in ("tls_certificate", "tls_key", "token_file"):
        path = fields.get(field)
        if path is None or not any(path.startswith(mount + "/") for mount in mounts):
            yield f"{field}: {path} is in no mounted volume"
    if cluster(manifests).get("authOptions", {}).get("mode") != "token":
        yield "Ray's token authentication is off"


@rule
def pods_are_unprivileged(manifests: Manifests) -> Iterator[str]:
    for pod in pods(manifests):
        mine, spec = container(pod).get("securityContext", {}), pod["spec"]
        if not spec.get("securityContext", {}).get("runAsNonRoot"):
            yield f"{container(pod)['name']}: runAsNonRoot is not set"
        if mine.get("allowPrivilegeEscalation") is not False:
            yield f"{container(pod)['name']}: allowPrivilegeEscalation is not false"
        if mine.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{container(pod)['name']}: capabilities are not dropped"
        if not mine.get("readOnlyRootFilesystem"):
            yield f"{container(pod)['name']}: the root file system is writable"


@rule
def network_policy_closes_other_ports(manifests: Manifests) -> Iterator[str]:
    """Ray's control plane listens on all interfaces."""
    if not has_kind(manifests, "NetworkPolicy"):
        yield "no NetworkPolicy"
        return
    wanted = of_kind(manifests, "NetworkPolicy")["spec"]["podSelector"].get("matchLabels", {})
    for pod in pods(manifests):
        if not wanted.items() <= pod["metadata"]["labels"].items():
            yield f"the NetworkPolicy does not cover {container(pod)['name']}"
    fields = application(manifests)["args"]
    for field in ("port", "http_port"):
        if fields.get(field, 8001) not in open_ports(manifests):
            yield f"{field}: {fields[field]} is closed to callers"


def open_ports(manifests: Manifests) -> set[int]:
    """Return the ports that the NetworkPolicy opens to callers outside the release."""
    entries = of_kind(manifests, "NetworkPolicy")["spec"]["ingress"]
    return {port["port"] for entry in entries for port in entry.get("ports", ())}


@rule
def shared_memory_is_mounted(manifests: Manifests) -> Iterator[str]:
    """The default of Kubernetes is 64 MiB, too little for Ray and for ranks."""
    for pod in pods(manifests):
        memory = {
            volume["name"]
            for volume in pod["spec"].get("volumes", ())
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        }
        mounted = {
            mount["name"]
            for mount in container(pod).get("volumeMounts", ())
            if mount["mountPath"] == "/dev/shm"
        }
        if not mounted & memory:
            yield f"{container(pod)['name']}: /dev/shm is not a volume in memory"
