"""A gateway's manners: health, drain, who gets in, what Prometheus sees, where replicas are."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.client import AsyncClient, Credentials, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.gateway import gateway as gateways
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_pool import named
from ladderstitch.replica.replica import Replica
from ladderstitch.vision.bundle import Bundle
from ladderstitch_loadtest.servers.process_supervisor import free_ports
from tests.support.certificates import Authority
from tests.support.fake_replicas import INFER, Context, FakeReplica, MakeFleet, fixed
from tests.support.servers import pixels

RETRIES = "ladderstitch_gateway_retries_total{"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SECRET, WATCHER = "user-secret-0123456789", "watcher-secret-0123456789"


async def page(port: int, path: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
            return str(reply.read().decode())

    return await asyncio.to_thread(read)


async def test_health_is_that_of_the_best_replica(fleet: MakeFleet) -> None:
    one, two = FakeReplica("r0"), FakeReplica("r1", ("tiny", "other"))
    async with fleet([one, two]) as running:
        health: Any = health_pb2_grpc.HealthStub(running.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        everything = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == SERVING
        assert (await everything.read()).status == SERVING
        two.state.serving = False
        assert (await watch.read()).status == NOT_SERVING
        service = health_pb2.HealthCheckRequest(service="ladderstitch.v1.InferenceService")
        assert (await health.Check(service)).status == SERVING
        one.state.serving = False
        assert (await everything.read()).status == NOT_SERVING
        one.state.serving = True
        assert (await everything.read()).status == SERVING
        watch.cancel()
        everything.cancel()


async def test_drained_it_ends_what_it_has_and_refuses_the_rest(fleet: MakeFleet) -> None:
    started, gate = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Context) -> bytes:
        started.set()
        await gate.wait()
        return b"done"

    async with fleet(1) as running:
        running.replicas[0].answers[INFER] = wait
        asking = asyncio.ensure_future(running.infer())
        await started.wait()
        async with AsyncClient(f"127.0.0.1:{running.gateway.port}", retries=None) as client:
            draining = asyncio.create_task(client.drain())
            health: Any = health_pb2_grpc.HealthStub(running.channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
            while (await watch.read()).status != NOT_SERVING:
                pass
            with pytest.raises(RequestFailed) as refused:
                await client.list_models()
            assert refused.value.reason == "DRAINING"
            assert not draining.done()
            gate.set()
            assert await draining
            watch.cancel()
        assert await asking == b"done"


async def test_prometheus_finds_the_gateway_and_its_replicas(fleet: MakeFleet) -> None:
    async with fleet(2) as running:
        running.replicas[0].refuse(INFER, grpc.StatusCode.UNAVAILABLE)
        for _ in range(4):
            await running.infer()
        port = running.gateway.metrics_port
        metrics = await page(port, "/metrics")
        assert f'requests_total{{code="OK",method="{INFER}"}} 4.0' in metrics
        assert 'gateway_replicas{state="serving"} 2.0' in metrics
        retries = next(line for line in metrics.splitlines() if line.startswith(RETRIES))
        assert float(retries.split()[-1]) >= 1
        found = json.loads(await page(port, "/sd"))
    assert sorted(found, key=str) == [
        {"targets": ["127.0.0.1:1"], "labels": {"replica": name}} for name in ("r0", "r1")
    ]


async def test_gateways_share_a_port_and_inherit_the_metrics_page(
    fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "INHERIT_S", 0.05)
    port, page_port = free_ports(2)
    async with fleet(1, port=port, metrics_port=page_port, share_port=True) as second:
        # the fixture's own came first, so it has the page
        settings = second.gateway.settings
        third = Gateway(settings, fixed(second.replicas))
        await third.start()
        assert (third.port, second.gateway.metrics_port) == (port, page_port)
        assert third.metrics_port != page_port
        await third.until_serving()
        await second.gateway.stop()
        async with asyncio.timeout(5):
            while third.metrics_port != page_port:
                await second.gateway.fleet.change(0.02)
        assert "gateway_replicas" in await page(page_port, "/metrics")
        assert await second.infer() == b"r0"
        await third.stop()


async def test_tls_tokens_and_limits_on_both_hops(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Real replica behind mutual TLS, a gateway that shows a certificate; tokens are passed on."""
    authority = Authority(tmp_path)
    inside, outside, shown = (authority.issue(name) for name in ("replica", "gateway", "shown"))
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
            tls_certificate=inside.certificate,
            tls_key=inside.key,
            tls_client_ca=authority.path,
        )
    )
    await replica.start()
    settings = GatewayConfig(
        port=0,
        metrics_port=0,
        drain_announce_s=0,
        replicas=(f"127.0.0.1:{replica.port}",),
        tls_certificate=outside.certificate,
        tls_key=outside.key,
        replica_ca=authority.path,
        replica_certificate=shown.certificate,
        replica_key=shown.key,
        replica_token_file=watcher,
    )
    gateway = Gateway(settings, named(settings.replicas))
    await gateway.start()
    async with asyncio.timeout(20):
        await gateway.until_serving()
    where = f"127.0.0.1:{gateway.port}"
    async with AsyncClient(where, access=Credentials(authority.path, token=SECRET)) as client:
        assert (await client.predict(pixels())).label
    async with AsyncClient(where, access=Credentials(authority.path, token="x" * 20)) as client:
        with pytest.raises(RequestFailed) as refused:
            await client.predict(pixels())
        assert refused.value.reason == "UNAUTHENTICATED"  # by the replica
    await gateway.stop()
    await replica.stop()


async def test_a_gateway_with_tokens_of_its_own_asks_for_them(
    fleet: MakeFleet, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"tokens:\n  - {{name: user, token: {SECRET}}}\n")
    async with fleet(1, token_file=tokens) as running:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await running.infer()
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert running.replicas[0].count == 0
        mine = (("authorization", f"Bearer {SECRET}"),)
        assert await running.infer(metadata=mine) == b"r0"
        drain = running.channel.unary_unary("/ladderstitch.v1.AdminService/Drain")
        with pytest.raises(grpc.aio.AioRpcError) as forbidden:
            await drain(b"", metadata=mine)
        assert forbidden.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_names_are_looked_up() -> None:
    found = await anext(aiter(named(["127.0.0.2:7", "dns:localhost:8"])))
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
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GatewayConfig.load(None, fields)


def test_a_token_in_the_clear_to_another_machine_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(SECRET)
    settings = GatewayConfig(replicas=("192.0.2.1:1",), replica_token_file=secret)
    with pytest.raises(ValueError, match="in the clear"):
        settings.credentials.credentials("192.0.2.1:1")
