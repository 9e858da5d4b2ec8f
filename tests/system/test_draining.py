"""A replica that is taken out of service: what it still does, and what it no longer does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.replica.replica import Replica
from ladderstitch.vision.bundle import Bundle
from tests.conftest import make_tiny_bundle
from tests.support.servers import pixels, start_server

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def replica(tiny_bundle: Bundle) -> AsyncIterator[Replica]:
    replica = Replica(ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0))
    await replica.start()
    yield replica
    await replica.stop()


@pytest.fixture
async def client(replica: Replica) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{replica.port}", retries=None) as client:
        yield client


async def test_all_that_is_in_flight_is_answered(client: AsyncClient) -> None:
    asking = [asyncio.create_task(client.predict(pixels(seed=n))) for n in range(50)]
    await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    assert await client.drain()
    ends = await asyncio.gather(*asking, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, RequestFailed)]
    assert {end.reason for end in refused} <= {"DRAINING"}
    with pytest.raises(RequestFailed) as late:
        await client.predict(pixels())
    assert late.value.code == grpc.StatusCode.UNAVAILABLE
    assert late.value.reason == "DRAINING"


async def test_while_it_is_announced_requests_are_accepted(client: AsyncClient) -> None:
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
    await watch.read()
    draining = asyncio.create_task(client.drain(announce_s=1.0))
    assert (await watch.read()).status == NOT_SERVING
    assert (await client.predict(pixels())).label
    assert not any(model.ready for model in (await client.list_models()).models)
    assert not draining.done()
    assert await draining
    watch.cancel()


async def test_draining_twice_is_draining_once(client: AsyncClient) -> None:
    assert await asyncio.gather(client.drain(), client.drain()) == [True, True]


@pytest.mark.parametrize("seconds", [-1.0, 3601.0])
async def test_an_absurd_announcement_is_refused(client: AsyncClient, seconds: float) -> None:
    with pytest.raises(RequestFailed) as refused:
        await client.drain(announce_s=seconds)
    assert list(refused.value.violations) == ["announce"]
    assert (await client.predict(pixels())).label


async def test_sigterm_with_20_requests_in_flight_gives_20_answers(tmp_path: Path) -> None:
    """As a container is stopped: the command line's drain first, then the signal."""
    running = start_server(make_tiny_bundle(tmp_path / "tiny").path, tmp_path / "log")
    async with AsyncClient(running.address) as client:
        asking = [asyncio.create_task(client.predict(pixels(seed=n))) for n in range(20)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        running.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*asking)
    assert len(answers) == 20
    assert await asyncio.to_thread(running.process.wait, 30) == 0
    assert running.process.stdout is not None
    running.process.stdout.close()


async def test_the_command_line_drains_and_says_so(replica: Replica, client: AsyncClient) -> None:
    command = [sys.executable, "-m", "ladderstitch", "drain"]
    command += ["--address", f"127.0.0.1:{replica.port}"]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    assert (done.returncode, done.stderr.strip()) == (0, "drained")
    with pytest.raises(RequestFailed, match="DRAINING"):
        await client.predict(pixels())


async def test_the_command_line_asks_for_health(replica: Replica) -> None:
    def ask() -> tuple[int, str]:
        command = [sys.executable, "-m", "ladderstitch", "health"]
        command += ["--address", f"127.0.0.1:{replica.port}"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.strip()

    assert await asyncio.to_thread(ask) == (0, "SERVING")
    await replica.drain()
    assert await asyncio.to_thread(ask) == (1, "NOT_SERVING")
