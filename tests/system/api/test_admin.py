"""Changing the scheduling of a running server, and what its neighbours see: health, metrics."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from ladderstitch.client import AsyncClient, Client, RequestFailed
from tests.support.servers import RunningServer, pixels


@pytest.fixture(autouse=True)
def _put_back(client: Client) -> Iterator[None]:
    yield
    client.update_scheduling(policy="POLICY_NAME_ADAPTIVE", unpin=True, min_quality=0.0)


def test_policy_pin_and_floor_change_at_once(client: Client) -> None:
    start = client.get_scheduling().revision
    client.update_scheduling(policy="POLICY_NAME_FIXED", fixed_variant=4)
    assert client.predict(pixels()).variant == 4
    client.update_scheduling(pinned_variant=6)
    assert client.predict(pixels()).variant == 6
    client.update_scheduling(unpin=True)
    assert client.predict(pixels()).variant == 4
    client.update_scheduling(policy="POLICY_NAME_MAX_BATCH", min_quality=0.655)
    assert client.predict(pixels(), budget_s=1e-6).quality == 0.66
    now = client.get_scheduling()
    assert (now.revision, now.min_quality) == (start + 4, 0.655)
    assert not now.HasField("pinned_variant")
    assert not now.HasField("fixed_variant")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"pinned_variant": 99}, "pinned_variant"),
        ({"pinned_variant": 1, "unpin": True}, "unpin"),
        ({"policy": "POLICY_NAME_FIXED"}, "fixed_variant"),
        ({"policy": "POLICY_NAME_FIXED", "fixed_variant": -1}, "fixed_variant"),
        ({"fixed_variant": 1}, "fixed_variant"),
        ({"policy": 77}, "policy"),
        ({"min_quality": 0.99}, "min_quality"),
        ({"min_quality": float("nan")}, "min_quality"),
        ({"slackfit_buckets": 0}, "slackfit_buckets"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(
    client: Client, changes: dict[str, object], field: str
) -> None:
    before = client.get_scheduling()
    with pytest.raises(RequestFailed) as refused:
        client.update_scheduling(**changes)
    assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.value.violations) == [field]
    assert client.get_scheduling() == before


async def test_changes_under_load_lose_nothing(server: RunningServer) -> None:
    import asyncio

    async with AsyncClient(server.address) as client:

        async def ask(n: int) -> int:
            return (await client.predict(pixels(seed=n), budget_s=0.5)).variant

        asking = [asyncio.create_task(ask(n)) for n in range(200)]
        for pinned in (1, 8, 2, 16):
            await client.update_scheduling(pinned_variant=pinned)
        assert len(await asyncio.gather(*asking)) == 200


def test_health_is_told_overall_by_service_and_by_model(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in (
            "",
            "tiny",
            "ladderstitch.v1.InferenceService",
            "inference.GRPCInferenceService",
        ):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        (reply,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in reply.list_services_response.service}
    assert names >= {
        "ladderstitch.v1.InferenceService",
        "ladderstitch.v1.AdminService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
    }


def scrape(server: RunningServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(server.metrics) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_what_happened(server: RunningServer, client: Client) -> None:
    before = scrape(server)
    client.update_scheduling(pinned_variant=3)
    client.predict(pixels(), budget_s=9.0)
    client.predict(pixels(), budget_s=1e-6)
    client.predict(pixels(2), variant=5)
    for wishes in ({"variant": 99}, {"budget_s": -1.0}):
        with pytest.raises(RequestFailed):
            client.predict(pixels(), **wishes)
    after = scrape(server)

    def grown(name: str, **labels: str) -> float:
        key = (f"ladderstitch_{name}", frozenset({"model": "tiny", **labels}.items()))
        return after[key] - before.get(key, 0.0)

    assert grown("requests_total", variant="3", code="OK") == 2
    assert grown("requests_total", variant="5", code="OK") == 1
    assert grown("requests_total", variant="none", code="NOT_FOUND") == 1
    assert grown("requests_total", variant="none", code="INVALID_ARGUMENT") == 1
    assert grown("slo_requests_total", met="true") == 2  # the third has the client's 30 s deadline
    assert grown("slo_requests_total", met="false") == 1
    assert grown("switches_total") >= 1
    assert grown("batch_size_sum") == 4
    for name in (
        "queue_seconds",
        "request_duration_seconds",
        "served_quality",
        "dispatch_slack_seconds",
    ):
        assert grown(f"{name}_count") == 3
    for name in ("compute_seconds", "latency_actual_over_predicted_ratio"):
        assert grown(f"{name}_count") == 3
    assert after["ladderstitch_queue_requests", frozenset({("model", "tiny")})] == 0


def test_metrics_are_well_formed(server: RunningServer) -> None:
    for name, labels in scrape(server):
        assert name.startswith("ladderstitch_")
        assert dict(labels).keys() <= {
            "model",
            "variant",
            "code",
            "met",
            "kept",
            "end",
            "reason",
            "le",
        }
