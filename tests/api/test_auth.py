"""Who gets in: TLS, client certificates, tokens and their limits, through real connections."""

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
from ladderstitch.api.server import Server
from ladderstitch.client import AsyncClient, Credentials, RequestFailed
from ladderstitch.client.channel import PLAIN
from ladderstitch.config import ServerConfig
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import AdminActions, ModelRegistry
from ladderstitch.oip import grpc_service_pb2, grpc_service_pb2_grpc
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.preprocessing import ImageReader
from tests.api.test_server import refuse, refuse_a_model
from tests.support.certificates import NOW, Authority, Pair, serial
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


async def drained(announce_s: float) -> bool:
    return True


CONTROL = AdminActions(refuse, drained, refuse_a_model, refuse_a_model)
"""An administrator's only deed here."""


@asynccontextmanager
async def serving(metrics: Metrics | None = None, **fields: Any) -> AsyncIterator[Server]:
    """A server without models, which is up at once; with a configuration's part on access."""
    settings = ServerConfig(**fields)
    transport = ListenerConfig.of(settings, (metrics or Metrics()).denied)
    server = Server(ModelRegistry("r", ready=True), CONTROL, transport)
    await server.start(settings.host, 0)
    await server.set_serving(True)
    yield server
    await server.stop(0)


def encrypted(pair: Pair, **fields: Any) -> dict[str, Any]:
    return {"tls_certificate": pair.certificate, "tls_key": pair.key, **fields}


async def outcome(port: int, access: Credentials = PLAIN) -> Code:
    """How a call ends that needs no model."""
    async with AsyncClient(f"127.0.0.1:{port}", access=access, retries=None) as client:
        try:
            await client.list_models()
        except RequestFailed as refused:
            return refused.code
    return Code.OK


def served_certificate(port: int) -> int:
    """Serial number of what a new connection is shown."""
    return serial(ssl.get_server_certificate(("127.0.0.1", port), timeout=10).encode())


async def test_tls_lets_in_who_trusts_the_authority_and_nobody_else(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with serving(**encrypted(authority.issue("server"))) as server:
        assert await outcome(server.port, Credentials(ca=authority.path)) == Code.OK
        assert await outcome(server.port, Credentials(ca=stranger.path)) == Code.UNAVAILABLE
        assert await outcome(server.port) == Code.UNAVAILABLE


async def test_an_expired_certificate_is_trusted_by_nobody(authority: Authority) -> None:
    pair = authority.issue("server", expires=NOW - dt.timedelta(hours=1))
    async with serving(**encrypted(pair)) as server:
        assert await outcome(server.port, Credentials(ca=authority.path)) == Code.UNAVAILABLE


async def test_mutual_tls_asks_for_a_valid_client_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    fields = encrypted(authority.issue("server"), tls_client_ca=authority.path)
    pairs = {
        "known": authority.issue("client"),
        "unknown": stranger.issue("foreign"),
        "expired": authority.issue("old", expires=NOW - dt.timedelta(hours=1)),
    }
    accesses = {
        name: Credentials(ca=authority.path, certificate=pair.certificate, key=pair.key)
        for name, pair in pairs.items()
    } | {"none": Credentials(ca=authority.path)}
    async with serving(**fields) as server:
        ends = {name: await outcome(server.port, access) for name, access in accesses.items()}
    refused = dict.fromkeys(["unknown", "expired", "none"], Code.UNAVAILABLE)
    assert ends == {"known": Code.OK} | refused


async def test_a_certificate_rotated_under_load_loses_no_request(authority: Authority) -> None:
    """Connections go on; new ones see the new certificate; a mismatched pair changes nothing."""
    pair = authority.issue("server")
    access = Credentials(ca=authority.path)
    async with serving(**encrypted(pair)) as server:
        first = await asyncio.to_thread(served_certificate, server.port)
        rotated = asyncio.Event()

        async def ask() -> int:
            """Requests on one connection, and on a new one each, until after the rotation."""
            answers = 0
            async with AsyncClient(f"127.0.0.1:{server.port}", access=access) as client:
                while not rotated.is_set() or answers < 10:
                    await client.list_models()
                    assert await outcome(server.port, access) == Code.OK
                    answers += 2
            return answers

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        later = authority.issue("later")
        os.replace(later.certificate, pair.certificate)  # for a moment, the key is another's
        assert await asyncio.to_thread(served_certificate, server.port) == first
        os.replace(later.key, pair.key)
        second = await asyncio.to_thread(served_certificate, server.port)
        assert second != first
        rotated.set()
        assert min(await asyncio.gather(*asking)) >= 10


async def test_tokens_decide_who_may_ask_and_who_may_administer(
    authority: Authority, token_file: Path
) -> None:
    fields, metrics = encrypted(authority.issue("server"), token_file=token_file), Metrics()
    async with serving(metrics, **fields) as server:

        async def administers(token: str | None) -> Code:
            access = Credentials(ca=authority.path, token=token)
            async with AsyncClient(f"127.0.0.1:{server.port}", access=access) as client:
                try:
                    await client.drain()
                except RequestFailed as refused:
                    return refused.code
            return Code.OK

        asked = [
            await outcome(server.port, Credentials(ca=authority.path, token=token))
            for token in (None, "wrong-0123456789", USER, ADMIN)
        ]
        administered = [await administers(t) for t in (None, "wrong-0123456789", USER, ADMIN)]
    page = generate_latest(metrics.registry).decode()
    assert asked == [Code.UNAUTHENTICATED, Code.UNAUTHENTICATED, Code.OK, Code.OK]
    assert administered == [
        Code.UNAUTHENTICATED,
        Code.UNAUTHENTICATED,
        Code.PERMISSION_DENIED,
        Code.OK,
    ]
    assert 'ladderstitch_denied_calls_total{reason="UNAUTHENTICATED"} 4.0' in page
    assert 'ladderstitch_denied_calls_total{reason="NOT_ALLOWED"} 1.0' in page


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
async def test_a_malformed_authorization_is_no_authorization(
    token_file: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    async with (
        serving(token_file=token_file) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        client._metadata = metadata
        with pytest.raises(RequestFailed) as refused:
            await client.list_models()
    assert refused.value.code == Code.UNAUTHENTICATED
    assert refused.value.reason == "UNAUTHENTICATED"


async def test_a_tokens_limits_refuse_with_the_time_to_wait(token_file: Path) -> None:
    async with serving(token_file=token_file) as server:
        address = f"127.0.0.1:{server.port}"
        async with AsyncClient(address, access=Credentials(token=SLOW)) as client:
            await client.list_models()
            with pytest.raises(RequestFailed) as refused:
                await client.list_models()
        assert refused.value.code == Code.RESOURCE_EXHAUSTED
        assert refused.value.reason == "RATE_LIMITED"
        assert 90 < (refused.value.retry_after_s or 0) <= 100

        guard = server.transport.guard
        assert guard is not None
        narrow = guard.tokens.find(NARROW)
        assert narrow is not None
        async with AsyncClient(address, access=Credentials(token=NARROW)) as client:
            with (
                guard.limits.admitted(narrow),
                guard.limits.admitted(narrow),
                pytest.raises(RequestFailed, match="has 2 requests in flight"),
            ):
                await client.list_models()
            await client.list_models()
            assert guard.limits.in_flight("narrow") == 0


async def test_streaming_calls_pass_the_same_door(token_file: Path) -> None:
    """Reflection is a stream in both directions; health is open, channels ask it tokenless."""
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    async with (
        serving(token_file=token_file) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        ask: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in ask(iter([question])):
                pass
        assert refused.value.code() == Code.UNAUTHENTICATED
        for secret in (USER, NARROW):  # without limits, and with
            metadata = (("authorization", f"Bearer {secret}"),)
            (reply,) = [r async for r in ask(iter([question]), metadata=metadata)]
            assert len(reply.list_services_response.service) > 3
        health: Any = health_pb2_grpc.HealthStub(channel)
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.SERVING


async def test_admin_on_a_port_of_its_own_is_nowhere_else(token_file: Path) -> None:
    fields = {"admin_port": 0, "health_port": 0, "token_file": token_file}
    async with serving(**fields) as server:
        operator = Credentials(token=ADMIN)
        async with AsyncClient(f"127.0.0.1:{server.port}", access=operator) as client:
            await client.list_models()
            with pytest.raises(RequestFailed) as refused:
                await client.drain()
            assert refused.value.code == Code.UNIMPLEMENTED
            stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(client.channel)
            with pytest.raises(grpc.aio.AioRpcError, match="admin port"):
                await stub.RepositoryModelLoad(
                    grpc_service_pb2.RepositoryModelLoadRequest(model_name="tiny"),
                    metadata=operator.metadata,
                )
        async with AsyncClient(f"127.0.0.1:{server.admin_port}", access=operator) as client:
            assert await client.drain()
            with pytest.raises(RequestFailed) as refused:
                await client.list_models()
            assert refused.value.code == Code.UNIMPLEMENTED
        async with AsyncClient(f"127.0.0.1:{server.health_port}") as client:
            health: Any = health_pb2_grpc.HealthStub(client.channel)
            reply = await health.Check(health_pb2.HealthCheckRequest(service=""))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(RequestFailed) as refused:
                await client.list_models()
            assert refused.value.code == Code.UNIMPLEMENTED


async def test_an_old_connection_is_given_up_and_made_anew() -> None:
    async with (
        serving(max_connection_age_s=0.2) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        await client.list_models()
        async with asyncio.timeout(10):
            await client.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        await client.list_models()


async def test_a_picture_over_the_limit_is_refused_by_its_header(tiny_bundle: Bundle) -> None:
    reader = ImageReader(tiny_bundle.manifest.preprocessing, max_pixels=400)
    assert (await reader.encoded("image", picture((20, 20)))).shape == (1, 1, 8, 8)
    with pytest.raises(InvalidArgument, match="at most 400 pixels, got 21 x 20"):
        await reader.encoded("image", picture((21, 20)))


def test_a_token_does_not_leave_the_machine_in_the_clear() -> None:
    with pytest.raises(ValueError, match="in the clear"):
        Credentials(token=USER).credentials("example.org:8001")
    assert Credentials(token=USER).credentials("127.0.0.1:8001") is None
    assert USER not in repr(Credentials(token=USER))
