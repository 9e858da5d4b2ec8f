"""Tests of servers whose start is cancelled, as by a signal while a model is loaded."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from ladderstitch.api.listener import start_servers


@pytest.mark.parametrize("turns", range(1, 6))
async def test_servers_whose_start_is_cancelled_can_be_stopped(turns: int) -> None:
    """The cancellation arrives after each number of turns of the loop."""
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    servers = [grpc.aio.server() for _ in range(4)]
    for server in servers:
        server.add_insecure_port("127.0.0.1:0")
    starting = asyncio.create_task(start_servers(servers))
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await asyncio.gather(*(server.stop(0) for server in servers))
    assert unhandled == []
