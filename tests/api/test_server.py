"""A server that is not ready, that drains, and that fails: what its callers are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.api.listener import ListenerConfig
from ladderstitch.api.server import Server
from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.oip import grpc_service_pb2, grpc_service_pb2_grpc
from ladderstitch.replica.replica import Replica
from ladderstitch.scheduling.settings import ActiveSettings
from tests.conftest import Bundle
from tests.support.servers import pixels

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def refuse(changes: dict[str, Any]) -> ActiveSettings:
    raise AssertionError("no test here changes settings")


async def refuse_to_drain(announce_s: float) -> bool:
    raise AssertionError("no test here drains by this")


async def refuse_a_model(name: str) -> Any:
    raise AssertionError("no test here loads models")


NO_CONTROL = AdminActions(refuse, refuse_to_drain, refuse_a_model, refuse_a_model)


@pytest.fixture
async def loading() -> AsyncIterator[Server]:
    """A server that listens but has no model yet."""
    server = Server(ModelRegistry("r"), NO_CONTROL, ListenerConfig())
    await server.start("127.0.0.1", 0)
    yield server
    await server.stop(0)


async def test_while_loading_it_is_live_but_not_ready(loading: Server) -> None:
    address = f"127.0.0.1:{loading.port}"
    async with AsyncClient(address, retries=None) as client:
        with pytest.raises(RequestFailed) as refused:
            await client.predict(pixels())
        assert refused.value.code == grpc.StatusCode.UNAVAILABLE
        assert refused.value.reason == "NOT_READY"
    async with grpc.aio.insecure_channel(address) as channel:
        oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await oip.ServerLive(grpc_service_pb2.ServerLiveRequest())).live
        assert not (await oip.ServerReady(grpc_service_pb2.ServerReadyRequest())).ready
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING


async def test_watchers_are_told_of_every_change(loading: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{loading.port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == NOT_SERVING
        await loading.set_serving(True)
        assert (await watch.read()).status == SERVING
        await loading.set_serving(False)
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_an_unforeseen_error_is_internal_with_an_incident_and_no_trace(
    loading: Server, caplog: pytest.LogCaptureFixture
) -> None:
    loading.registry.ready = True
    loading.registry.vision_models = {"broken": None}  # type: ignore[dict-item] # makes the handler fail
    async with AsyncClient(f"127.0.0.1:{loading.port}", retries=None) as client:
        with pytest.raises(RequestFailed) as failed:
            await client.predict(pixels(), model="broken")
    assert failed.value.code == grpc.StatusCode.INTERNAL
    assert failed.value.metadata["error_id"] in caplog.text
    assert "Traceback" in caplog.text
    assert "Traceback" not in failed.value.message
    assert "Error" not in failed.value.message


async def test_a_message_over_the_limit_is_refused(tiny_bundle: Bundle) -> None:
    server = Server(ModelRegistry("r"), NO_CONTROL, ListenerConfig(max_message_bytes=10_000))
    await server.start("127.0.0.1", 0)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(RequestFailed) as refused:
            await client.predict(b"x" * 20_000)
    assert refused.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop(0)


async def test_a_stopping_replica_finishes_and_refuses(tiny_bundle: Bundle) -> None:
    """Everyone is answered or told UNAVAILABLE, by which clients know to go elsewhere."""
    config = ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0, max_batch_size=8)
    replica = Replica(config)
    await replica.start()
    async with AsyncClient(f"127.0.0.1:{replica.port}", retries=None) as client:
        asking = [asyncio.create_task(client.predict(pixels(4, n))) for n in range(40)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        await replica.stop()
        ends = await asyncio.gather(*asking, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, RequestFailed)]
    assert len(ends) - len(refused) > 0
    assert {end.code for end in refused} <= {grpc.StatusCode.UNAVAILABLE}
