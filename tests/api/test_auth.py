"""Access to a server over real connections: TLS, client certificates, tokens and their limits."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import generate_latest

from ladderstitch.api.listener import ListenerConfig
from ladderstitch.api.server import ACCEPTORS, Server
from ladderstitch.client import AsyncClient, Credentials, RequestFailed
from ladderstitch.client.channel import PLAINTEXT
from ladderstitch.config import ServerConfig
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.oip import grpc_service_pb2, grpc_service_pb2_grpc
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.preprocessing import ImageReader
from tests.api.test_server import fail_model_change, fail_update
from tests.support.certificates import NOW, Authority, Pair, serial_number
from tests.support.servers import picture

Code = grpc.StatusCode
USER, ADMIN, SLOW, NARROW = (
    f"{name}-secret-0123456789" for name in ("user", "admin", "slow", "narrow")
)
TOKENS = f"""
tokens:
  - {{name: user, token: {USER}}}
  - {{name: operator, token: {ADMIN}, scopes: [inference, admin]}}
  - {{name: slow, token: {SLOW}, requests_per_s: 0.01}}
  - {{name: narrow, token: {NARROW}, concurrent_requests: 2}}
"""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    path.write_text(TOKENS)
    return path


async def succeed_to_drain(announce_s: float) -> bool:
    return True


ACTIONS = AdminActions(fail_update, succeed_to_drain, fail_model_change, fail_model_change)
"""Of the admin actions, these tests use only `drain`."""


@asynccontextmanager
async def serving(metrics: Metrics | None = None, **fields: Any) -> AsyncIterator[Server]:
    """Run a server without models; `fields` are fields of its configuration."""
    config = ServerConfig(**fields)
    listener = ListenerConfig.from_config(config, (metrics or Metrics()).observe_denial)
    server = Server(ModelRegistry("r", ready=True), ACTIONS, listener)
    await server.start(config.host, 0)
    await server.set_serving(True)
    yield server
    await server.stop(0)


def tls_fields(pair: Pair, **fields: Any) -> dict[str, Any]:
    """Return the configuration fields of a server with this certificate."""
    return {"tls_certificate": pair.certificate, "tls_key": pair.key, **fields}


async def call_status(port: int, credentials: Credentials = PLAINTEXT) -> Code:
    """Return the status of a call that needs no model."""
    address = f"127.0.0.1:{port}"
    async with AsyncClient(address, credentials=credentials, retry_policy=None) as client:
        try:
            await client.list_models()
        except RequestFailed as failed:
            return failed.code
    return Code.OK


def served_serial(port: int) -> int:
    """Return the serial number of the certificate that a new connection gets."""
    return serial_number(ssl.get_server_certificate(("127.0.0.1", port), timeout=10).encode())


async def test_tls_client_connects_only_if_it_trusts_the_authority(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with serving(**tls_fields(authority.issue("server"))) as server:
        assert await call_status(server.port, Credentials(ca=authority.path)) == Code.OK
        assert await call_status(server.port, Credentials(ca=stranger.path)) == Code.UNAVAILABLE
        assert await call_status(server.port) == Code.UNAVAILABLE


async def test_tls_serves_the_certificate_on_every_port(authority: Authority) -> None:
    async with serving(**tls_fields(authority.issue("server"), admin_port=0)) as server:
        ports = [server.port] * 4 * ACCEPTORS + [server.admin_port]
        serials = [await asyncio.to_thread(served_serial, port) for port in ports]
    assert len(set(serials)) == 1


async def test_tls_expired_server_certificate_is_rejected(authority: Authority) -> None:
    pair = authority.issue("server", expires=NOW - dt.timedelta(hours=1))
    async with serving(**tls_fields(pair)) as server:
        assert await call_status(server.port, Credentials(ca=authority.path)) == Code.UNAVAILABLE


async def test_mutual_tls_requires_a_valid_client_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    fields = tls_fields(authority.issue("server"), tls_client_ca=authority.path)
    pairs = {
        "known": authority.issue("client"),
        "unknown": stranger.issue("foreign"),
        "expired": authority.issue("old", expires=NOW - dt.timedelta(hours=1)),
    }
    credentials = {
        name: Credentials(ca=authority.path, certificate=pair.certificate, key=pair.key)
        for name, pair in pairs.items()
    } | {"none": Credentials(ca=authority.path)}
    async with serving(**fields) as server:
        statuses = {name: await call_status(server.port, c) for name, c in credentials.items()}
    rejected = dict.fromkeys(["unknown", "expired", "none"], Code.UNAVAILABLE)
    assert statuses == {"known": Code.OK} | rejected


async def test_certificate_rotated_under_load_loses_no_request(authority: Authority) -> None:
    """Connections stay open, new ones get the new certificate, a mismatched pair is ignored."""
    pair = authority.issue("server")
    credentials = Credentials(ca=authority.path)
    async with serving(**tls_fields(pair)) as server:
        first = await asyncio.to_thread(served_serial, server.port)
        rotated = asyncio.Event()

        async def call_repeatedly() -> int:
            """Call on one connection and on new ones until after the rotation."""
            answers = 0
            async with AsyncClient(f"127.0.0.1:{server.port}", credentials=credentials) as client:
                while not rotated.is_set() or answers < 10:
                    await client.list_models()
                    assert await call_status(server.port, credentials) == Code.OK
                    answers += 2
            return answers

        calling = [asyncio.create_task(call_repeatedly()) for _ in range(3)]
        later = authority.issue("later")
        os.replace(later.certificate, pair.certificate)  # the key does not match it yet
        assert await asyncio.to_thread(served_serial, server.port) == first
        os.replace(later.key, pair.key)
        second = await asyncio.to_thread(served_serial, server.port)
        assert second != first
        rotated.set()
        assert min(await asyncio.gather(*calling)) >= 10


async def test_token_scopes_allow_inference_and_admin_calls(
    authority: Authority, token_file: Path
) -> None:
    fields, metrics = tls_fields(authority.issue("server"), token_file=token_file), Metrics()
    async with serving(metrics, **fields) as server:

        async def admin_status(token: str | None) -> Code:
            credentials = Credentials(ca=authority.path, token=token)
            async with AsyncClient(f"127.0.0.1:{server.port}", credentials=credentials) as client:
                try:
                    await client.drain()
                except RequestFailed as failed:
                    return failed.code
            return Code.OK

        inference = [
            await call_status(server.port, Credentials(ca=authority.path, token=token))
            for token in (None, "wrong-0123456789", USER, ADMIN)
        ]
        admin = [await admin_status(t) for t in (None, "wrong-0123456789", USER, ADMIN)]
    page = generate_latest(metrics.registry).decode()
    assert inference == [Code.UNAUTHENTICATED, Code.UNAUTHENTICATED, Code.OK, Code.OK]
    assert admin == [
        Code.UNAUTHENTICATED,
        Code.UNAUTHENTICATED,
        Code.PERMISSION_DENIED,
        Code.OK,
    ]
    assert 'ladderstitch_denied_calls_total{reason="UNAUTHENTICATED"} 4.0' in page
    assert 'ladderstitch_denied_calls_total{reason="PERMISSION_DENIED"} 1.0' in page


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", USER),),
        (("authorization", f"Basic {USER}"),),
        (("authorization", "Bearer"),),
        (("authorization", f"Bearer {USER}"), ("authorization", f"Bearer {USER}")),
    ],
    ids=["bare", "basic", "empty", "twice"],
)
async def test_authorization_malformed_is_unauthenticated(
    token_file: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    async with (
        serving(token_file=token_file) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        client._metadata = metadata
        with pytest.raises(RequestFailed) as failed:
            await client.list_models()
    assert failed.value.code == Code.UNAUTHENTICATED
    assert failed.value.reason == "UNAUTHENTICATED"


async def test_token_limits_reject_with_the_time_to_wait(token_file: Path) -> None:
    async with serving(token_file=token_file) as server:
        address = f"127.0.0.1:{server.port}"
        async with AsyncClient(address, credentials=Credentials(token=SLOW)) as client:
            await client.list_models()
            with pytest.raises(RequestFailed) as failed:
                await client.list_models()
        assert failed.value.code == Code.RESOURCE_EXHAUSTED
        assert failed.value.reason == "RATE_LIMITED"
        assert 90 < (failed.value.retry_after_s or 0) <= 100

        auth = server.listener.auth
        assert auth is not None
        narrow = auth.tokens.find(NARROW)
        assert narrow is not None
        async with AsyncClient(address, credentials=Credentials(token=NARROW)) as client:
            with (
                auth.limiter.acquire(narrow),
                auth.limiter.acquire(narrow),
                pytest.raises(
                    RequestFailed, match="at most 2 requests of token 'narrow' in flight"
                ),
            ):
                await client.list_models()
            await client.list_models()
            assert auth.limiter.in_flight("narrow") == 0


async def test_streaming_calls_need_a_token_except_for_health(token_file: Path) -> None:
    """Reflection streams in both directions; channels check health without a token."""
    query = reflection_pb2.ServerReflectionRequest(list_services="")
    async with (
        serving(token_file=token_file) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in reflect(iter([query])):
                pass
        assert failed.value.code() == Code.UNAUTHENTICATED
        for secret in (USER, NARROW):  # without limits, and with limits
            metadata = (("authorization", f"Bearer {secret}"),)
            (reply,) = [r async for r in reflect(iter([query]), metadata=metadata)]
            assert len(reply.list_services_response.service) > 3
        health: Any = health_pb2_grpc.HealthStub(channel)
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.SERVING


async def test_admin_port_serves_admin_calls_exclusively(token_file: Path) -> None:
    fields = {"admin_port": 0, "health_port": 0, "token_file": token_file}
    async with serving(**fields) as server:
        operator = Credentials(token=ADMIN)
        async with AsyncClient(f"127.0.0.1:{server.port}", credentials=operator) as client:
            await client.list_models()
            with pytest.raises(RequestFailed) as failed:
                await client.drain()
            assert failed.value.code == Code.UNIMPLEMENTED
            stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(client.channel)
            with pytest.raises(grpc.aio.AioRpcError, match="admin port"):
                await stub.RepositoryModelLoad(
                    grpc_service_pb2.RepositoryModelLoadRequest(model_name="tiny"),
                    metadata=operator.metadata,
                )
        async with AsyncClient(f"127.0.0.1:{server.admin_port}", credentials=operator) as client:
            assert await client.drain()
            with pytest.raises(RequestFailed) as failed:
                await client.list_models()
            assert failed.value.code == Code.UNIMPLEMENTED
        async with AsyncClient(f"127.0.0.1:{server.health_port}") as client:
            health: Any = health_pb2_grpc.HealthStub(client.channel)
            reply = await health.Check(health_pb2.HealthCheckRequest(service=""))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(RequestFailed) as failed:
                await client.list_models()
            assert failed.value.code == Code.UNIMPLEMENTED


async def test_connection_over_its_maximum_age_reconnects() -> None:
    async with (
        serving(max_connection_age_s=0.2) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        await client.list_models()
        async with asyncio.timeout(300):
            await client.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        await client.list_models()


async def test_reader_image_over_the_pixel_limit_is_rejected(tiny_bundle: VisionBundle) -> None:
    reader = ImageReader(tiny_bundle.manifest.preprocessing, max_pixels=400)
    assert (await reader.read_encoded("image", picture((20, 20)))).shape == (1, 1, 8, 8)
    with pytest.raises(InvalidArgument, match="at most 400 pixels, got 21 x 20"):
        await reader.read_encoded("image", picture((21, 20)))


def test_credentials_token_needs_tls_beyond_loopback() -> None:
    with pytest.raises(ValueError, match="token: expected ca or tls"):
        Credentials(token=USER).channel_credentials("example.org:8001")
    assert Credentials(token=USER).channel_credentials("127.0.0.1:8001") is None
    assert USER not in repr(Credentials(token=USER))
