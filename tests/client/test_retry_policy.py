"""The client's retry policy: the documented one is the one that clients use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import grpc

from ladderstitch.client import RETRY_POLICY, AsyncClient
from ladderstitch.client.channel import RETRY_BUFFER_BYTES
from tests.support.fake_replicas import INFER, Context, FakeReplica

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gateway.md"


def test_retry_policy_equals_the_documented_one() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert json.loads(shown) == json.loads(RETRY_POLICY)


async def test_client_retries_a_large_request_after_unavailable() -> None:
    calls: list[int] = []

    async def fail_once(request: bytes, context: Context) -> bytes:
        calls.append(len(request))
        if len(calls) == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "once")
        return b""

    replica = await FakeReplica("r").start()
    replica.answers[INFER] = fail_once
    async with AsyncClient(replica.address) as client:
        call = client.channel.unary_unary(INFER)
        assert await call(bytes(1 << 20), timeout=300) == b""
    await replica.stop()
    assert calls == [1 << 20] * 2
    assert RETRY_BUFFER_BYTES > 1 << 20
