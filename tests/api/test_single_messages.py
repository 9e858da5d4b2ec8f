"""Calls that take one message, of clients that send another number of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from ladderstitch.api.server import Server
from ladderstitch.client import Credentials
from ladderstitch.oip import grpc_service_pb2
from ladderstitch.v1 import inference_pb2
from tests.api.test_auth import USER, call_status, serving
from tests.support.fake_replicas import GENERATE, INFER, FakeReplica, StartGateway, start_gateway

__all__ = ["start_gateway"]

UNARY = (
    "/ladderstitch.v1.InferenceService/ListModels",
    "/ladderstitch.v1.InferenceService/Infer",
    "/ladderstitch.v1.AdminService/GetScheduling",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ModelInfer",
    "/grpc.health.v1.Health/Check",
)
STREAMED = (
    "/ladderstitch.v1.GenerationService/Generate",
    "/ladderstitch.v1.ReplicaService/WatchLoad",
    "/grpc.health.v1.Health/Watch",
)
METADATA = (("authorization", f"Bearer {USER}"),)
LIMIT_S = 300.0
Code = grpc.StatusCode


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    path.write_text(f"tokens:\n  - {{name: user, token: {USER}, scopes: [inference, admin]}}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
async def server(token_file: Path) -> AsyncIterator[Server]:
    async with serving(token_file=token_file) as server:
        yield server


async def status_of(
    channel: grpc.aio.Channel, method: str, messages: Iterable[bytes]
) -> tuple[Code, str]:
    """Send messages as a stream; return the status of the call and its details."""
    call: Any = channel.stream_stream(method)(iter(messages), metadata=METADATA, timeout=LIMIT_S)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return Code.OK, ""


@pytest.mark.parametrize("second", [b"", b"\x0a\x01x", b"\xff" * 1000])
@pytest.mark.parametrize("method", UNARY + STREAMED)
async def test_second_message_is_rejected(server: Server, method: str, second: bytes) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        status, details = await status_of(channel, method, [b"", second])
        assert status == Code.INVALID_ARGUMENT
        assert "message: expected one, got more" in details
        assert await call_status(server.port, Credentials(token=USER)) == Code.OK


@pytest.mark.parametrize("method", UNARY + STREAMED)
async def test_call_without_a_message_is_rejected(server: Server, method: str) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        status, details = await status_of(channel, method, [])
        assert status == Code.INVALID_ARGUMENT
        assert "message: expected one, got none" in details


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        (UNARY[0], inference_pb2.ListModelsRequest()),
        (UNARY[3], grpc_service_pb2.ServerLiveRequest()),
        (UNARY[5], b""),
    ],
)
async def test_single_message_of_a_stream_is_answered(
    server: Server, method: str, request_: Any
) -> None:
    message = request_ if isinstance(request_, bytes) else request_.SerializeToString()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await status_of(channel, method, [message]) == (Code.OK, "")


@pytest.mark.parametrize("method", [UNARY[0], UNARY[5]])
async def test_messages_that_do_not_end_are_rejected_in_time(token_file: Path, method: str) -> None:
    async with (
        serving(token_file=token_file, message_timeout_s=0.2) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call: Any = channel.stream_unary(method)(metadata=METADATA, timeout=LIMIT_S)
        await call.write(b"")
        with pytest.raises(grpc.aio.AioRpcError, match=r"within 0.2 s") as failed:
            await call
        assert failed.value.code() == Code.INVALID_ARGUMENT


@pytest.mark.parametrize("method", [INFER, GENERATE])
async def test_gateway_forwards_no_call_with_two_messages(
    start_gateway: StartGateway, method: str
) -> None:
    replica = FakeReplica("r0")
    async with asyncio.timeout(LIMIT_S), start_gateway([replica]) as running:
        status, details = await status_of(running.channel, method, [b"a", b"b"])
        assert status == Code.INVALID_ARGUMENT
        assert "message: expected one, got more" in details
        assert running.counts == [0]
        assert await running.infer(b"!") == b"r0!"
