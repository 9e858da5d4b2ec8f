"""Streams of real replicas behind a gateway go on when one replica is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_pool import Discovery
from ladderstitch.v1.generation_pb2 import GenerateRequest, GenerateResponse
from tests.support.servers import RunningServer, start_server, stop_server
from tests.system.api.openai_model import write_tool_bundle

GENERATE = "/ladderstitch.v1.GenerationService/Generate"
NUM_TOKENS = 400
REQUEST = GenerateRequest(
    text="a prompt of bytes",
    max_tokens=NUM_TOKENS,
    temperature=1.0,
    seed=7,
    frequency_penalty=0.2,
    ignore_end_tokens=True,
)


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[RunningServer]]:
    bundle = write_tool_bundle(tmp_path / "tiny")
    servers = [start_server(bundle, tmp_path / f"log{number}") for number in range(2)]
    yield servers
    for server in servers:
        if server.process.poll() is None:
            assert stop_server(server) == 0
        elif server.process.stdout is not None:
            server.process.stdout.close()


async def ask(address: str, started: asyncio.Event | None = None) -> list[GenerateResponse]:
    """Return all responses; set `started` after a few."""
    found = []
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(GENERATE)(REQUEST.SerializeToString(), timeout=300)
        async for message in call:
            found.append(GenerateResponse.FromString(message))
            if started is not None and len(found) == 5:
                started.set()
    return found


async def test_killed_replica_loses_and_repeats_no_token(replicas: list[RunningServer]) -> None:
    async def discover() -> Discovery:
        yield frozenset(server.address for server in replicas)

    expected = await ask(replicas[1].address)
    front = Gateway(GatewayConfig(port=0, metrics_port=0, drain_announce_s=0.0), discover())
    await front.start()
    try:
        async with asyncio.timeout(60):
            while len(front.pool.serving) < 2:
                await front.pool.wait_for_change(0.1)
        events = [asyncio.Event() for _ in range(4)]
        address = f"127.0.0.1:{front.port}"
        streams = [asyncio.create_task(ask(address, event)) for event in events]
        for event in events:
            await event.wait()
        replicas[0].process.kill()
        answers = await asyncio.gather(*streams)
    finally:
        await front.stop()
    continued = 0
    for answer in answers:
        assert [r.index for r in answer] == list(range(NUM_TOKENS))
        assert [r.token_id for r in answer] == [r.token_id for r in expected]
        assert "".join(r.text for r in answer) == "".join(r.text for r in expected)
        accounting = answer[-1].accounting
        assert accounting.generated_tokens == NUM_TOKENS
        assert 0 < accounting.first_token_us < accounting.total_us
        continued += sum(span.tokens for span in accounting.spans) < NUM_TOKENS
    assert continued, "no stream was at the replica that was killed"
