"""Access to the parts of rendered manifests."""

from __future__ import annotations

from typing import Any

import yaml

Manifest = dict[str, Any]
Manifests = list[Manifest]


def parse(text: str) -> Manifests:
    """Return the non-empty documents of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(manifests: Manifests, kind: str) -> Manifest:
    """Return the only manifest of a kind."""
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def has_kind(manifests: Manifests, kind: str) -> bool:
    """Return whether a manifest of the kind exists."""
    return any(manifest["kind"] == kind for manifest in manifests)


def services(manifests: Manifests) -> dict[Any, Manifest]:
    """Return the specs of Services by the name of their target port."""
    specs = [manifest["spec"] for manifest in manifests if manifest["kind"] == "Service"]
    return {port["targetPort"]: spec for spec in specs for port in spec["ports"]}


def cluster(manifests: Manifests) -> Manifest:
    """Return the specification of the Ray cluster."""
    spec: Manifest = of_kind(manifests, "RayService")["spec"]["rayClusterConfig"]
    return spec


def worker_group(manifests: Manifests) -> Manifest:
    """Return the only worker group."""
    (group,) = cluster(manifests)["workerGroupSpecs"]
    found: Manifest = group
    return found


def worker(manifests: Manifests) -> Manifest:
    """Return the pod template of replicas."""
    template: Manifest = worker_group(manifests)["template"]
    return template


def head(manifests: Manifests) -> Manifest:
    """Return the pod template of Ray's head."""
    template: Manifest = cluster(manifests)["headGroupSpec"]["template"]
    return template


def pods(manifests: Manifests) -> Manifests:
    """Return all pod templates of the Ray cluster."""
    return [head(manifests), worker(manifests)]


def gateway(manifests: Manifests) -> Manifest | None:
    """Return the pod template of the gateways; None if there are none."""
    if not has_kind(manifests, "Deployment"):
        return None
    template: Manifest = of_kind(manifests, "Deployment")["spec"]["template"]
    return template


def gateway_config(manifests: Manifests) -> Manifest:
    """Return the configuration of the gateways."""
    found: Manifest = yaml.safe_load(of_kind(manifests, "ConfigMap")["data"]["gateway.yaml"])
    return found


def selects(selector: Manifest, pod: Manifest) -> bool:
    """Return whether a selector has the labels of a pod."""
    labels: Manifest = pod["metadata"]["labels"]
    return selector.items() <= labels.items()


def container(pod: Manifest) -> Manifest:
    """Return the only container of a pod."""
    (only,) = pod["spec"]["containers"]
    found: Manifest = only
    return found


def ports(pod: Manifest) -> dict[str, int]:
    """Return the container ports of a pod by name."""
    return {port["name"]: port["containerPort"] for port in container(pod)["ports"]}


def application(manifests: Manifests) -> Manifest:
    """Return the only application of `serveConfigV2`."""
    config = yaml.safe_load(of_kind(manifests, "RayService")["spec"]["serveConfigV2"])
    (only,) = config["applications"]
    found: Manifest = only
    return found


def deployment(manifests: Manifests) -> Manifest:
    """Return the only deployment of the application."""
    (only,) = application(manifests)["deployments"]
    found: Manifest = only
    return found
