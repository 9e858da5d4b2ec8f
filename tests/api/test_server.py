"""What callers of a server get while it is loading, draining or failing."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.api.listener import ListenerConfig
from ladderstitch.api.server import ACCEPTORS, Server
from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ModelNotFound
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.oip import grpc_service_pb2, grpc_service_pb2_grpc
from ladderstitch.replica import replica as replica_module
from ladderstitch.replica.replica import Replica
from ladderstitch.runtime.process import free_port
from ladderstitch.scheduling.settings import ActiveSettings
from tests.conftest import VisionBundle
from tests.support.servers import pixels

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def fail_update(changes: dict[str, Any]) -> ActiveSettings:
    raise AssertionError("these tests change no settings")


async def fail_drain(announce_s: float) -> bool:
    raise AssertionError("these tests drain no server")


async def fail_model_change(name: str) -> Any:
    raise AssertionError("these tests load and unload no models")


NO_ACTIONS = AdminActions(fail_update, fail_drain, fail_model_change, fail_model_change)


@pytest.fixture
async def loading() -> AsyncIterator[Server]:
    """Return a server that listens but has no model yet."""
    server = Server(ModelRegistry("r"), NO_ACTIONS, ListenerConfig())
    await server.start("127.0.0.1", 0)
    yield server
    await server.stop(0)


async def test_second_server_on_the_same_port_is_rejected(loading: Server) -> None:
    port = free_port("127.0.0.1")
    first, second = (Server(ModelRegistry("r"), NO_ACTIONS, ListenerConfig()) for _ in range(2))
    assert await first.start("127.0.0.1", port) == port
    with pytest.raises(OSError, match="cannot listen on"):
        await second.start("127.0.0.1", port)
    await first.stop(0)
    third = Server(ModelRegistry("r"), NO_ACTIONS, ListenerConfig())
    assert await third.start("127.0.0.1", port) == port
    await third.stop(0)


async def test_every_connection_reaches_the_same_replica(loading: Server) -> None:
    await loading.set_serving(True)
    own_connection = (("grpc.use_local_subchannel_pool", 1),)
    for _ in range(4 * ACCEPTORS):
        address = f"127.0.0.1:{loading.port}"
        async with grpc.aio.insecure_channel(address, options=own_connection) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING


async def test_server_while_loading_is_live_but_not_ready(loading: Server) -> None:
    address = f"127.0.0.1:{loading.port}"
    async with AsyncClient(address, retry_policy=None) as client:
        with pytest.raises(RequestFailed) as failed:
            await client.predict(pixels())
        assert failed.value.code == grpc.StatusCode.UNAVAILABLE
        assert failed.value.reason == "NOT_READY"
    async with grpc.aio.insecure_channel(address) as channel:
        oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await oip.ServerLive(grpc_service_pb2.ServerLiveRequest())).live
        assert not (await oip.ServerReady(grpc_service_pb2.ServerReadyRequest())).ready
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING


def test_server_without_models_says_so() -> None:
    registry = ModelRegistry("r", ready=True)
    with pytest.raises(ModelNotFound, match=r"no model 'x'; this server has no models$"):
        registry.find("x")


async def test_health_watch_reports_every_change(loading: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{loading.port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == NOT_SERVING
        await loading.set_serving(True)
        assert (await watch.read()).status == SERVING
        await loading.set_serving(False)
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_unexpected_error_returns_an_error_id_and_no_traceback(
    loading: Server, caplog: pytest.LogCaptureFixture
) -> None:
    loading.registry.ready = True
    loading.registry.vision_models = {"broken": None}  # type: ignore[dict-item] # makes the handler fail
    async with AsyncClient(f"127.0.0.1:{loading.port}", retry_policy=None) as client:
        with pytest.raises(RequestFailed) as failed:
            await client.predict(pixels(), model="broken")
    assert failed.value.code == grpc.StatusCode.INTERNAL
    assert failed.value.metadata["error_id"] in caplog.text
    assert "Traceback" in caplog.text
    assert "Traceback" not in failed.value.message
    assert "Error" not in failed.value.message


async def test_message_over_the_size_limit_is_rejected(tiny_bundle: VisionBundle) -> None:
    server = Server(ModelRegistry("r"), NO_ACTIONS, ListenerConfig(max_message_bytes=10_000))
    await server.start("127.0.0.1", 0)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(RequestFailed) as failed:
            await client.predict(b"x" * 20_000)
    assert failed.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop(0)


async def test_stopping_replica_answers_accepted_requests_only(tiny_bundle: VisionBundle) -> None:
    """Other requests end with UNAVAILABLE, so that clients retry on another replica."""
    config = ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0, max_batch_size=8)
    replica = Replica(config)
    await replica.start()
    async with AsyncClient(f"127.0.0.1:{replica.port}", retry_policy=None) as client:
        calls = [asyncio.create_task(client.predict(pixels(4, n))) for n in range(40)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await replica.stop()
        ends = await asyncio.gather(*calls, return_exceptions=True)
    rejected = [end for end in ends if isinstance(end, RequestFailed)]
    assert len(ends) - len(rejected) > 0
    assert {end.code for end in rejected} <= {grpc.StatusCode.UNAVAILABLE}


def probe(port: int, path: str) -> tuple[int, str]:
    """Return the status and the text of a page of the metrics port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=300) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()


async def test_probes_of_a_replica_follow_its_state(
    tiny_bundle: VisionBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0))
    start, seen = replica.models.start, []

    async def start_after_a_probe(on_progress: Any) -> None:
        seen.append(await asyncio.to_thread(probe, replica.metrics_port, "/readyz"))
        seen.append(await asyncio.to_thread(probe, replica.metrics_port, "/healthz"))
        await start(on_progress)

    monkeypatch.setattr(replica.models, "start", start_after_a_probe)
    await replica.start()
    assert seen == [(503, "the replica is loading its models\n"), (200, "ok\n")]
    assert await asyncio.to_thread(probe, replica.metrics_port, "/readyz") == (200, "ok\n")
    await replica.drain()
    ready = await asyncio.to_thread(probe, replica.metrics_port, "/readyz")
    assert ready == (503, "the replica is draining\n")
    assert await asyncio.to_thread(probe, replica.metrics_port, "/healthz") == (200, "ok\n")
    await replica.close()


async def test_probe_reports_an_event_loop_that_is_held(
    tiny_bundle: VisionBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "MAX_LOOP_DELAY_S", 0.5)
    replica = Replica(ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0))
    await replica.start()
    with ThreadPoolExecutor(1) as pool:  # the loop is held until the probe sees it
        status = 200
        while status == 200:
            status, text = pool.submit(probe, replica.metrics_port, "/healthz").result()
    assert status == 503
    assert text.startswith("the event loop has been held for")
    await replica.close()
