"""Manifests against the schemas of Kubernetes and of the operators whose kinds the chart uses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate

from tests.deploy.manifests import Manifest, head, worker

KUBERNETES = "1.33"
SCHEMAS = Path(__file__).parent / "schemas"
OPERATORS = {
    "RayService": "rayservice-v1",
    "PodMonitor": "podmonitor-v1",
    "PrometheusRule": "prometheusrule-v1",
    "ScaledObject": "scaledobject-v1alpha1",
    "HTTPRoute": "httproute-v1",
    "GRPCRoute": "grpcroute-v1",
    "BackendTLSPolicy": "backendtlspolicy-v1",
}
"""File of the schema by kind, for kinds that Kubernetes itself lacks."""


@cache
def validator(name: str) -> jsonschema.protocols.Validator:
    """Return a validator for the schema of the file NAME.schema.json."""
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def validate(manifest: Manifest) -> None:
    """Raise an error of jsonschema or kubernetes_validate for a manifest that breaks its schema.

    Unknown fields are errors. KubeRay's schema does not describe all parts of a pod, so that a
    RayService's pods are validated as pods, too.
    """
    _validate(json.dumps(manifest))


@cache  # charts with different values have most manifests in common
def _validate(text: str) -> None:
    manifest: Manifest = json.loads(text)
    kind = manifest["kind"]
    if kind not in OPERATORS:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    validator(OPERATORS[kind]).validate(manifest)
    if kind == "RayService":
        for pod in (head([manifest]), worker([manifest])):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": pod["metadata"]}
            kubernetes_validate.validate(whole | {"spec": pod["spec"]}, KUBERNETES, strict=True)
