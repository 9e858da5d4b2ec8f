"""Samples of the health that a server reports, by gRPC and by HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch_loadtest.faults.stops.report import HealthSample

INTERVAL_S = 0.05
CHECK_LIMIT_S = 5.0
"""Seconds in which a check must be answered."""
Check = Callable[[], Awaitable[bool | None]]
"""Returns whether the server is serving; None if it does not say."""


async def sample(check: Check, samples: list[HealthSample], now_s: Callable[[], float]) -> None:
    """Append a sample every 50 ms until the task is cancelled; its time is that of the answer."""
    while True:
        serving = await check()
        samples.append(HealthSample(now_s(), serving))
        await asyncio.sleep(INTERVAL_S)


def grpc_check(channel: grpc.aio.Channel) -> Check:
    """Return a check by `grpc.health.v1`."""
    stub: Any = health_pb2_grpc.HealthStub(channel)

    async def check() -> bool | None:
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=CHECK_LIMIT_S)
        except grpc.aio.AioRpcError:
            return None
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    return check


def http_check(address: str) -> Check:
    """Return a check by `GET /health`, which answers 503 while the server is not serving."""

    def get() -> bool | None:
        try:
            with urlopen(f"http://{address}/health", timeout=CHECK_LIMIT_S) as reply:
                return bool(reply.status == 200)
        except HTTPError as error:
            with error:
                return False if error.code == 503 else None
        except OSError:
            return None

    return lambda: asyncio.to_thread(get)
