"""The client's retry policy: what the documentation shows is what our clients do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import grpc

from ladderstitch.client import RETRY_POLICY, AsyncClient
from ladderstitch.client.channel import BUFFER_BYTES
from tests.support.fake_replicas import INFER, Context, FakeReplica

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gateway.md"


def test_the_documentation_shows_it() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert json.loads(shown) == json.loads(RETRY_POLICY)


async def test_unavailable_is_tried_anew_large_requests_too() -> None:
    calls: list[int] = []

    async def once(request: bytes, context: Context) -> bytes:
        calls.append(len(request))
        if len(calls) == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "once")
        return b""

    replica = await FakeReplica("r").start()
    replica.answers[INFER] = once
    async with AsyncClient(replica.address) as client:
        call = client.channel.unary_unary(INFER)
        assert await call(bytes(1 << 20), timeout=10) == b""
    await replica.stop()
    assert calls == [1 << 20] * 2
    assert BUFFER_BYTES > 1 << 20
