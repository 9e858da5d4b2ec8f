"""A gateway's limits for strangers, and of tokens for the requests of streams."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.oip import grpc_service_pb2 as pb
from tests.api.http2 import HEADERS, RawConnection
from tests.support.fake_replicas import INFER, REFLECT, STREAM, FakeReplica, StartGateway

SECRET = "user-secret-0123456789"
METADATA = (("authorization", f"Bearer {SECRET}"),)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    path.write_text(f"tokens:\n  - {{name: user, token: {SECRET}, requests_per_s: 0.01}}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("method", [INFER, STREAM, REFLECT])
async def test_stranger_is_rejected_by_headers(
    start_gateway: StartGateway, token_file: Path, method: str
) -> None:
    async with start_gateway(1, token_file=token_file) as running:
        raw = await RawConnection.open(running.gateway.port)
        raw.start_call(method)
        async with asyncio.timeout(300):
            assert b"grpc-status\x0216" in await raw.read_until(HEADERS)
        await raw.close()
        assert running.counts == [0]


async def test_unfinished_message_is_not_forwarded(start_gateway: StartGateway) -> None:
    async with start_gateway(1, message_timeout_s=0.2) as running:
        raw = await RawConnection.open(running.gateway.port)
        raw.start_call(INFER)
        raw.send_message(b"x" * 100, declared=1000)
        async with asyncio.timeout(300):
            assert b"within 0.2 s" in await raw.read_until(HEADERS)
        await raw.close()
        assert running.counts == [0]
        assert await running.infer(b"!") == b"r0!"


async def test_requests_of_a_stream_count_one_by_one(
    start_gateway: StartGateway, token_file: Path
) -> None:
    async with start_gateway(1, token_file=token_file) as running:
        call = running.channel.stream_stream(STREAM)(metadata=METADATA, timeout=300)
        for number in range(10):
            await call.write(pb.ModelInferRequest(id=str(number)).SerializeToString())
        await call.done_writing()
        answers = [answer async for answer in call]
    forwarded = [answer for answer in answers if answer.startswith(b"r0")]
    refused = [
        pb.ModelStreamInferResponse.FromString(answer)
        for answer in answers
        if not answer.startswith(b"r0")
    ]
    assert len(forwarded) == 1
    assert {answer.infer_response.id for answer in refused} == {str(n) for n in range(1, 10)}
    assert {answer.error_message.partition(":")[0] for answer in refused} == {"RATE_LIMITED"}


async def test_other_stream_ends_at_the_first_request_above_the_limit(
    start_gateway: StartGateway, token_file: Path
) -> None:
    async with start_gateway(1, token_file=token_file) as running:
        call = running.channel.stream_stream(REFLECT)(metadata=METADATA, timeout=300)
        await call.write(b"x")
        assert await call.read() == b"r0x"
        await call.write(b"y")
        with pytest.raises(grpc.aio.AioRpcError, match="RATE_LIMITED") as failed:
            await call.read()
        assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_watchers_all_hear_of_a_drain_though_one_left(
    start_gateway: StartGateway,
) -> None:
    replica = FakeReplica("r0")
    async with start_gateway([replica]) as running:
        health: Any = health_pb2_grpc.HealthStub(running.channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            await watch.read()
        watches.pop(1).cancel()
        async with asyncio.timeout(300):
            while running.gateway._health.num_watchers > 2:  # noqa: ASYNC110 # no event says so
                await asyncio.sleep(0.01)
            await running.gateway.drain(0)
            for watch in watches:
                assert (await watch.read()).status == NOT_SERVING
                watch.cancel()
