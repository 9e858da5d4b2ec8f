"""Values that the chart refuses, and that its schema is closed and complete."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.deploy.chart import CHART, SCHEMA, template

REFUSED = {
    "replicas.min=5,replicas.max=2": "replicas.min: expected at most replicas.max, got 5 > 2",
    "replicas.goals.quality=2": "/replicas/goals/quality",
    "replicas.maximum=3": "maximum",
    "gpus=1,tensorParallelSize=2": "at least tensorParallelSize + spareRanks = 2, got 1",
    "gpus=2,tensorParallelSize=2,spareRanks=1": "spareRanks = 3, got 2",
    "server.device=cuda": "gpus: expected at least 1 along with server.device=cuda, got 0",
    "gpus=1,server.device=cpu": "gpus: expected 0 along with server.device=cpu, got 1",
    "server.threds=2": "threds",
    "server.threads=0": "/server/threads",
    "server.host=127.0.0.1": "host",
    "server.insecure_public=true": "insecure_public",
    "server.port=8080": "server.port: expected a port of its own, got 8080, which Ray's metrics",
    "server.port=9464": "got 9464, which server.metrics_port uses",
    "server.port=80": "/server/port",
    "server.page=on": "http.enabled: expected true along with server.page=on",
    "server.http_port=9000": "http.enabled: expected true along with server.http_port, got false",
    "gateway.server.http_port=9000": "http.enabled: expected true along with gateway.server.http",
    "server.allowed_hosts[0]=a": "allowed_hosts",
    "gateway.server.http_port=8003,http.enabled=true": "gateway.server.http_port: expected a port",
    "scheduling.policy=fastest": "/scheduling/policy",
    "scheduling.policy=fixed": "scheduling.fixed_variant: expected a variant id",
    "model.volume.emptyDir.medium=Memory": "model.bundle: expected a directory in model.mountPath",
    "replica.resources.requests.cpu=2500m": "requests.cpu: expected at most the limit 2, got 2500m",
    "head.resources.requests.memory=4Gi": "expected at most the limit 3Gi, got 4Gi",
    "replica.resources.limits.cpu=two": "/replica/resources/limits/cpu",
    "replica.sharedMemory=much": "/replica/sharedMemory",
    "replica.podLabels.app\\.kubernetes\\.io/component=z": "propertyName 'app",
    "replica.extraEnv[0].nam=z": "/replica/extraEnv/0",
    "replica.extraEnv[0].name=LADDERSTITCH_CA": "replica.extraEnv: expected names of their own",
    "head.extraVolumes[0].name=shm": "head.extraVolumes: expected names of their own, got shm",
    "head.sharedMemory=1Gi": "sharedMemory",
    "gateway.ingress.enabled=true": "gateway.enabled: expected true along with gateway.ingress",
    "gateway.autoscaling.enabled=true": "expected true along with gateway.autoscaling.enabled",
    "gateway.autoscaling.min=11": "expected at most gateway.autoscaling.max, got 11 > 10",
    "gateway.route.enabled=true": "gateway.route.parentRefs: expected at least one Gateway",
    "gateway.server.port=8003": "gateway.server.port: expected a port of its own, got 8003",
    "gateway.service.type=Public": "/gateway/service/type",
    "http.ingress.enabled=true": "http.enabled: expected true along with http.ingress.enabled",
    "http.enabled=true,http.route.enabled=true": "http.route.parentRefs: expected at least one",
    "faultTolerance.redis.address=redis": "/faultTolerance/redis/address",
    "faultTolerance.redis.passwordSecret.name=redis": "/faultTolerance/redis/passwordSecret",
    "tls.secretName=Upper": "/tls/secretName",
    "image.tag=a/b": "/image/tag",
    "fullnameOverride=Upper": "/fullnameOverride",
    "networkPolicy.clients[0].pods=z": "/networkPolicy/clients/0",
}
"""Values and the part of the error that names them."""


@pytest.mark.parametrize("values", REFUSED)
def test_wrong_value_is_refused_and_named(helm: str, values: str) -> None:
    done = template(helm, "--set", values)
    assert done.returncode != 0
    assert REFUSED[values] in done.stderr


def open_objects(schema: Any, path: str = "") -> list[str]:
    """Return the paths of the described objects that allow properties of any name."""
    if isinstance(schema, list):
        return [
            found for at, part in enumerate(schema) for found in open_objects(part, f"{path}/{at}")
        ]
    if not isinstance(schema, dict):
        return []
    mine = [path] if "properties" in schema and "additionalProperties" not in schema else []
    return mine + [
        found for key, part in schema.items() for found in open_objects(part, f"{path}/{key}")
    ]


def test_schema_is_closed_except_for_kubernetes_lists() -> None:
    free = {path.split("/")[-2] for path in open_objects(SCHEMA)}
    assert free == {"imagePullSecrets", "extraVolumes", "extraVolumeMounts"}


def undescribed(given: Any, described: Any, path: str = "") -> list[str]:
    """Return the paths that only one of the default values and their schema has."""
    properties = described.get("properties", {})
    if "$ref" in described:
        name = described["$ref"].split("/")[-1]
        properties = SCHEMA["definitions"][name].get("properties", {})
    if not given or not isinstance(given, dict):
        return []  # empty by default: the fields are those of the server or of Kubernetes
    found = [f"{path}.{name}" for name in given.keys() ^ properties.keys() if properties]
    for name in given.keys() & properties.keys():
        found += undescribed(given[name], properties[name], f"{path}.{name}")
    return found


def test_values_and_schema_list_the_same_values() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values["server"] = {}  # one of many fields has a default of the chart
    assert undescribed(values, SCHEMA) == [".global"]  # a parent chart's
