"""Rendered manifests as Python objects, and ways to reach into them."""

from __future__ import annotations

from typing import Any

import yaml

Manifest = dict[str, Any]
Manifests = list[Manifest]


def parse(text: str) -> Manifests:
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(manifests: Manifests, kind: str) -> Manifest:
    """The only one of its kind."""
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def has_kind(manifests: Manifests, kind: str) -> bool:
    return any(manifest["kind"] == kind for manifest in manifests)


def services(manifests: Manifests) -> dict[Any, Manifest]:
    """Specs by the name of the container port that they lead to."""
    specs = [manifest["spec"] for manifest in manifests if manifest["kind"] == "Service"]
    return {port["targetPort"]: spec for spec in specs for port in spec["ports"]}


def cluster(manifests: Manifests) -> Manifest:
    spec: Manifest = of_kind(manifests, "RayService")["spec"]["rayClusterConfig"]
    return spec


def worker_group(manifests: Manifests) -> Manifest:
    (group,) = cluster(manifests)["workerGroupSpecs"]
    found: Manifest = group
    return found


def worker(manifests: Manifests) -> Manifest:
    """The replica's pod template."""
    template: Manifest = worker_group(manifests)["template"]
    return template


def head(manifests: Manifests) -> Manifest:
    template: Manifest = cluster(manifests)["headGroupSpec"]["template"]
    return template


def pods(manifests: Manifests) -> Manifests:
    return [head(manifests), worker(manifests)]


def container(pod: Manifest) -> Manifest:
    (only,) = pod["spec"]["containers"]
    found: Manifest = only
    return found


def ports(pod: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(pod)["ports"]}


def application(manifests: Manifests) -> Manifest:
    """Of `serveConfigV2`."""
    config = yaml.safe_load(of_kind(manifests, "RayService")["spec"]["serveConfigV2"])
    (only,) = config["applications"]
    found: Manifest = only
    return found


def deployment(manifests: Manifests) -> Manifest:
    (only,) = application(manifests)["deployments"]
    found: Manifest = only
    return found
