"""`ladderstitch.v1.AdminService` on a running server, and its health, reflection and metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.client import AsyncClient, Client, RequestFailed
from ladderstitch.v1 import admin_pb2
from tests.support.servers import RunningServer, pixels


@pytest.fixture(autouse=True)
def _restore_scheduling(client: Client) -> Iterator[None]:
    yield
    client.update_scheduling(policy="POLICY_NAME_ADAPTIVE", unpin=True, min_quality=0.0)


def test_update_scheduling_applies_to_the_next_request(client: Client) -> None:
    start = client.get_scheduling().revision
    client.update_scheduling(policy="fixed", fixed_variant=4)
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
        ({"queue_limit_requests": 0}, "queue_limit_requests"),
        ({"queue_limit_s": 0.0}, "queue_limit_s"),
        ({"attainment_probability": 1.0}, "attainment_probability"),
        ({"priority_window_s": -0.1}, "priority_window_s"),
        ({"overhead_s": float("inf")}, "overhead_s"),
    ],
)
def test_update_scheduling_invalid_change_is_rejected(
    client: Client, changes: dict[str, object], field: str
) -> None:
    before = client.get_scheduling()
    with pytest.raises(RequestFailed) as failed:
        client.update_scheduling(**changes)
    assert failed.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert list(failed.value.violations) == [field]
    assert client.get_scheduling() == before


def test_update_scheduling_same_values_make_no_revision(client: Client) -> None:
    first = client.update_scheduling(queue_limit_requests=77, overhead_s=0.001)
    assert (first.queue_limit_requests, first.overhead_s) == (77, 0.001)
    assert client.update_scheduling(queue_limit_requests=77) == first
    second = client.update_scheduling(queue_limit_requests=1024, overhead_s=0.0005)
    assert second.revision == first.revision + 1


def test_update_scheduling_unknown_policy_is_named(client: Client) -> None:
    with pytest.raises(ValueError, match=r"policy: expected one of fixed, .*, got 'best'"):
        client.update_scheduling(policy="best")


def test_schedule_fixed_variant_alone_sets_the_fixed_policy(
    server: RunningServer, client: Client
) -> None:
    command = ["schedule", "--fixed-variant", "4", "--address", server.address]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    scheduling = client.get_scheduling()
    assert scheduling.policy == admin_pb2.POLICY_NAME_FIXED
    assert scheduling.fixed_variant == 4
    assert client.predict(pixels()).variant == 4
    done = CliRunner().invoke(app, [*command, "--policy", "max_batch"])
    assert done.exit_code == 1
    assert client.get_scheduling() == scheduling


async def test_update_scheduling_under_load_loses_no_request(server: RunningServer) -> None:
    async with AsyncClient(server.address) as client:
        calls = [
            asyncio.create_task(client.predict(pixels(seed=n), budget_s=0.5)) for n in range(200)
        ]
        for pinned in (1, 8, 2, 16):
            await client.update_scheduling(pinned_variant=pinned)
        assert len(await asyncio.gather(*calls)) == 200


def test_health_is_reported_for_server_services_and_models(server: RunningServer) -> None:
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
            health.Check(health_pb2.HealthCheckRequest(service="no-such-service"))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
def test_reflection_lists_all_services(server: RunningServer, version: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        reflect = channel.stream_stream(  # the messages of both versions are the same
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (reply,) = reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in reply.list_services_response.service}
    assert names >= {
        "ladderstitch.v1.InferenceService",
        "ladderstitch.v1.AdminService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    }


def scrape(server: RunningServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the samples of the metrics page by name and labels."""
    with urllib.request.urlopen(server.metrics) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_requests_budgets_and_batches(server: RunningServer, client: Client) -> None:
    before = scrape(server)
    client.update_scheduling(pinned_variant=3)
    client.predict(pixels(), budget_s=9.0)
    client.predict(pixels(), budget_s=1e-6)
    client.predict(pixels(2), variant=5)
    for options in ({"variant": 99}, {"budget_s": -1.0}):
        with pytest.raises(RequestFailed):
            client.predict(pixels(), **options)
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
    assert grown("variant_switches_total") >= 1
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


def test_metrics_have_known_names_and_labels(server: RunningServer) -> None:
    for name, labels in scrape(server):
        assert name.startswith(("ladderstitch_", "process_"))
        assert dict(labels).keys() <= {
            "model",
            "variant",
            "code",
            "met",
            "within_plan",
            "end",
            "reason",
            "le",
            "process",
            "version",
            "python",
            "platform",
        }
