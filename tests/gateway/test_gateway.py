"""A gateway's health, draining, access, metrics and configuration."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.client import AsyncClient, Credentials, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.gateway import gateway as gateway_module
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_pool import discover_replicas
from ladderstitch.replica.replica import Replica
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.servers.process_supervisor import free_ports
from tests.support.certificates import Authority
from tests.support.fake_replicas import INFER, Context, FakeReplica, StartGateway, discover_fixed
from tests.support.servers import pixels

RETRIES = "ladderstitch_gateway_retries_total{"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SECRET, WATCHER = "user-secret-0123456789", "watcher-secret-0123456789"


async def fetch(port: int, path: str) -> str:
    """Return the body of an HTTP page of this machine."""

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=300) as reply:
            return str(reply.read().decode())

    return await asyncio.to_thread(read)


async def test_health_is_serving_while_any_replica_serves(start_gateway: StartGateway) -> None:
    one, two = FakeReplica("r0"), FakeReplica("r1", ("tiny", "other"))
    async with start_gateway([one, two]) as running:
        health: Any = health_pb2_grpc.HealthStub(running.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        overall = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == SERVING
        assert (await overall.read()).status == SERVING
        two.state.serving = False
        assert (await watch.read()).status == NOT_SERVING
        service = health_pb2.HealthCheckRequest(service="ladderstitch.v1.InferenceService")
        assert (await health.Check(service)).status == SERVING
        one.state.serving = False
        assert (await overall.read()).status == NOT_SERVING
        one.state.serving = True
        assert (await overall.read()).status == SERVING
        watch.cancel()
        overall.cancel()


async def test_drain_finishes_calls_and_rejects_new_ones(start_gateway: StartGateway) -> None:
    started, gate = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Context) -> bytes:
        started.set()
        await gate.wait()
        return b"done"

    async with start_gateway(1) as running:
        running.replicas[0].answers[INFER] = wait
        asking = asyncio.ensure_future(running.infer())
        await started.wait()
        async with AsyncClient(f"127.0.0.1:{running.gateway.port}", retry_policy=None) as client:
            draining = asyncio.create_task(client.drain())
            health: Any = health_pb2_grpc.HealthStub(running.channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
            while (await watch.read()).status != NOT_SERVING:
                pass
            with pytest.raises(RequestFailed) as rejected:
                await client.list_models()
            assert rejected.value.reason == "DRAINING"
            assert not draining.done()
            gate.set()
            assert await draining
            watch.cancel()
        assert await asking == b"done"


async def test_metrics_and_discovery_list_calls_and_replicas(start_gateway: StartGateway) -> None:
    async with start_gateway(2) as running:
        running.replicas[0].fail(INFER, grpc.StatusCode.UNAVAILABLE)
        for _ in range(4):
            await running.infer()
        port = running.gateway.metrics_port
        metrics = await fetch(port, "/metrics")
        assert f'requests_total{{code="OK",method="{INFER}"}} 4.0' in metrics
        assert 'gateway_replicas{state="serving"} 2.0' in metrics
        retries = next(line for line in metrics.splitlines() if line.startswith(RETRIES))
        assert float(retries.split()[-1]) >= 1
        found = json.loads(await fetch(port, "/sd"))
    assert sorted(found, key=str) == [
        {"targets": ["127.0.0.1:1"], "labels": {"replica": name}} for name in ("r0", "r1")
    ]


async def test_shared_port_metrics_port_is_taken_over(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "PORT_TAKEOVER_POLL_S", 0.05)
    port, metrics_port = free_ports(2)
    async with start_gateway(1, port=port, metrics_port=metrics_port, share_port=True) as second:
        # the fixture's gateway started first, so it has the metrics port
        third = Gateway(second.gateway.config, discover_fixed(second.replicas))
        await third.start()
        assert (third.port, second.gateway.metrics_port) == (port, metrics_port)
        assert third.metrics_port != metrics_port
        await third.wait_until_serving()
        await second.gateway.stop()
        async with asyncio.timeout(300):
            while third.metrics_port != metrics_port:
                await second.gateway.pool.wait_for_change(0.02)
        assert "gateway_replicas" in await fetch(metrics_port, "/metrics")
        assert await second.infer() == b"r0"
        await third.stop()


async def test_tls_and_tokens_apply_on_both_hops(tiny_bundle: VisionBundle, tmp_path: Path) -> None:
    """A real replica requires mutual TLS; the gateway has a certificate and passes tokens on."""
    authority = Authority(tmp_path)
    replica_files, gateway_files, client_files = (
        authority.issue(name) for name in ("replica", "gateway", "client")
    )
    tokens, watcher = tmp_path / "tokens.yaml", tmp_path / "watcher"
    tokens.write_text(
        f"tokens:\n  - {{name: user, token: {SECRET}}}\n  - {{name: watcher, token: {WATCHER}}}\n"
    )
    watcher.write_text(WATCHER)
    replica = Replica(
        ServerConfig(
            bundle=tiny_bundle.path,
            port=0,
            metrics_port=0,
            token_file=tokens,
            tls_certificate=replica_files.certificate,
            tls_key=replica_files.key,
            tls_client_ca=authority.path,
        )
    )
    await replica.start()
    config = GatewayConfig(
        port=0,
        metrics_port=0,
        drain_announce_s=0,
        replicas=(f"127.0.0.1:{replica.port}",),
        tls_certificate=gateway_files.certificate,
        tls_key=gateway_files.key,
        replica_ca=authority.path,
        replica_certificate=client_files.certificate,
        replica_key=client_files.key,
        replica_token_file=watcher,
    )
    gateway = Gateway(config, discover_replicas(config.replicas))
    await gateway.start()
    async with asyncio.timeout(300):
        await gateway.wait_until_serving()
    address = f"127.0.0.1:{gateway.port}"
    known, unknown = (Credentials(authority.path, token=token) for token in (SECRET, "x" * 20))
    async with AsyncClient(address, credentials=known) as client:
        assert (await client.predict(pixels())).label
    async with AsyncClient(address, credentials=unknown) as client:
        with pytest.raises(RequestFailed) as rejected:
            await client.predict(pixels())
        assert rejected.value.reason == "UNAUTHENTICATED"  # by the replica
    await gateway.stop()
    await replica.stop()


async def test_gateway_with_token_file_requires_tokens(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"tokens:\n  - {{name: user, token: {SECRET}}}\n")
    async with start_gateway(1, token_file=tokens) as running:
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await running.infer()
        assert rejected.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert running.replicas[0].count == 0
        mine = (("authorization", f"Bearer {SECRET}"),)
        assert await running.infer(metadata=mine) == b"r0"
        drain = running.channel.unary_unary("/ladderstitch.v1.AdminService/Drain")
        with pytest.raises(grpc.aio.AioRpcError) as forbidden:
            await drain(b"", metadata=mine)
        assert forbidden.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_discovery_resolves_dns_names() -> None:
    found = await anext(aiter(discover_replicas(["127.0.0.2:7", "dns:localhost:8"])))
    assert {"127.0.0.2:7", "127.0.0.1:8"} <= found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replicas": ["nowhere"]}, "expected HOST:PORT or dns:HOST:PORT, got 'nowhere'"),
        ({"replicas": ["dns:name:0"]}, "got 'dns:name:0'"),
        ({"host": "0.0.0.0"}, "is reachable from other machines"),
        ({"retry_timeout_s": 0}, "retry_timeout_s"),
        ({"max_image_pixels": 5}, "max_image_pixels"),
    ],
)
def test_config_with_invalid_field_names_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GatewayConfig.load(None, fields)


def test_token_without_tls_to_another_host_is_rejected(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(SECRET)
    config = GatewayConfig(replicas=("192.0.2.1:1",), replica_token_file=secret)
    with pytest.raises(ValueError, match="token: expected ca or tls"):
        config.credentials.channel_credentials("192.0.2.1:1")


async def test_probes_of_a_gateway_follow_its_replicas(start_gateway: StartGateway) -> None:
    replica = FakeReplica("r0")
    async with start_gateway([replica]) as running:
        port = running.gateway.metrics_port
        assert await fetch(port, "/readyz") == "ok\n"
        assert await fetch(port, "/healthz") == "ok\n"
        assert 'process_cpu_seconds_total{process="gateway"}' in await fetch(port, "/metrics")
        replica.state.serving = False
        await running.wait_until(lambda: not running.gateway.serving)
        with pytest.raises(urllib.error.HTTPError) as refused:
            await fetch(port, "/readyz")
        with refused.value as reply:
            assert reply.code == 503
            assert reply.read() == b"none of 1 replicas serves\n"
        with pytest.raises(urllib.error.HTTPError) as unknown:
            await fetch(port, "/livez")
        unknown.value.close()
        assert unknown.value.code == 404
