"""A replica that is taken out of service: it ends accepted requests and rejects new ones."""

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
from ladderstitch.vision.bundle import VisionBundle
from tests.conftest import make_tiny_bundle
from tests.support.servers import pixels, start_server

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def replica(tiny_bundle: VisionBundle) -> AsyncIterator[Replica]:
    replica = Replica(ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0))
    await replica.start()
    yield replica
    await replica.stop()


@pytest.fixture
async def client(replica: Replica) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{replica.port}", retry_policy=None) as client:
        yield client


async def test_drain_answers_requests_in_flight_and_rejects_later(client: AsyncClient) -> None:
    calls = [asyncio.create_task(client.predict(pixels(seed=n))) for n in range(50)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert await client.drain()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    rejected = [end for end in ends if isinstance(end, RequestFailed)]
    assert {end.reason for end in rejected} <= {"DRAINING"}
    with pytest.raises(RequestFailed) as late:
        await client.predict(pixels())
    assert late.value.code == grpc.StatusCode.UNAVAILABLE
    assert late.value.reason == "DRAINING"


async def test_drain_announced_still_accepts_requests(client: AsyncClient) -> None:
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


async def test_drain_twice_reports_success_twice(client: AsyncClient) -> None:
    assert await asyncio.gather(client.drain(), client.drain()) == [True, True]


@pytest.mark.parametrize("seconds", [-1.0, 3601.0])
async def test_drain_announcement_out_of_range_is_rejected(
    client: AsyncClient, seconds: float
) -> None:
    with pytest.raises(RequestFailed) as failed:
        await client.drain(announce_s=seconds)
    assert list(failed.value.violations) == ["announce"]
    assert (await client.predict(pixels())).label


async def test_sigterm_with_20_requests_in_flight_answers_all(tmp_path: Path) -> None:
    running = start_server(make_tiny_bundle(tmp_path / "tiny").path, tmp_path / "log")
    async with AsyncClient(running.address) as client:
        calls = [asyncio.create_task(client.predict(pixels(seed=n))) for n in range(20)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        running.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*calls)
    assert len(answers) == 20
    assert await asyncio.to_thread(running.process.wait, 300) == 0
    assert running.process.stdout is not None
    running.process.stdout.close()


async def test_drain_command_prints_drained_and_exits_with_0(
    replica: Replica, client: AsyncClient
) -> None:
    command = [sys.executable, "-m", "ladderstitch", "drain"]
    command += ["--address", f"127.0.0.1:{replica.port}"]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    assert (done.returncode, done.stderr.strip()) == (0, "drained")
    with pytest.raises(RequestFailed, match="DRAINING"):
        await client.predict(pixels())


async def test_health_command_prints_state_and_sets_exit_status(replica: Replica) -> None:
    def run_health() -> tuple[int, str]:
        command = [sys.executable, "-m", "ladderstitch", "health"]
        command += ["--address", f"127.0.0.1:{replica.port}"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.strip()

    assert await asyncio.to_thread(run_health) == (0, "SERVING")
    await replica.drain()
    assert await asyncio.to_thread(run_health) == (1, "NOT_SERVING")
