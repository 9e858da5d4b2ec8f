"""One caller's fault by the front door: the other streams of a real server go on."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file, save_file

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.text.bundle import TextBundle
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, start_server, stop_server
from tests.system.api.test_generation import rank_pids

BAD = "M"
"""A character whose embedding is NaN."""
LIMIT_S = 300.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = write_tiny(tmp_path_factory.mktemp("models") / "tiny")
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    (bad,) = TextBundle.load(path).tokenizer().encode(BAD)
    embedding[bad] = torch.nan
    # never the likeliest token, so that no good answer contains it
    tensors["lm_head.weight"][bad] = 0.5 * tensors["lm_head.weight"][bad - 1]
    manifest = path / "model.yaml"
    manifest.write_text(manifest.read_text().replace("tied_head: true", "tied_head: false"))
    save_file(tensors, path / "model.safetensors")
    log = tmp_path_factory.mktemp("log") / "server.log"
    running = start_server(path, log, "--tensor-parallel-size", "2")
    yield running
    assert stop_server(running) == 0


async def answer(client: AsyncClient, prompt: str, **options: object) -> list[int]:
    async with asyncio.timeout(LIMIT_S):
        return [c.token async for c in client.generate(prompt, max_tokens=40, **options)]  # type: ignore[arg-type] # by name


def metric(server: RunningServer, name: str) -> float:
    with urllib.request.urlopen(server.metrics, timeout=LIMIT_S) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"ladderstitch_{name}"))


@pytest.mark.parametrize("temperature", [1e-308, 5e-324])
async def test_streams_next_to_a_fault_are_those_of_a_quiet_server(
    server: RunningServer, temperature: float
) -> None:
    good = ("a prompt", "another one", "x")
    async with AsyncClient(server.address) as client:
        quiet = [await answer(client, prompt) for prompt in good]
        *got, tiny, bad = await asyncio.gather(
            *(answer(client, prompt) for prompt in good),
            answer(client, "tiny", temperature=temperature),
            answer(client, f"a prompt {BAD}", temperature=1.0),
            return_exceptions=True,
        )
        assert got == quiet
        assert tiny == await answer(client, "tiny")
        assert isinstance(bad, RequestFailed)
        assert "infinite or NaN" in str(bad)
    assert metric(server, "non_finite_outputs_total") >= 1
    for gauge in ("running_requests", "queue_requests", "kv_cache_usage_ratio"):
        assert metric(server, gauge) == 0


async def test_stopped_rank_is_replaced_and_health_tells(server: RunningServer) -> None:
    """The default limits hold; an answer in progress is complete and the same."""
    async with AsyncClient(server.address) as client:
        quiet = await answer(client, "a long answer")
        stopped = rank_pids(server)[-1]
        os.kill(stopped, signal.SIGSTOP)
        running = asyncio.create_task(answer(client, "a long answer"))
        async with grpc.aio.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            seen = []
            async with asyncio.timeout(LIMIT_S):
                async for response in watch:
                    if not seen or seen[-1] != response.status:
                        seen.append(response.status)
                    if len(seen) > 1 and seen[-1] == health_pb2.HealthCheckResponse.SERVING:
                        break
        assert health_pb2.HealthCheckResponse.NOT_SERVING in seen
        assert await running == quiet
    assert stopped not in rank_pids(server)
    assert metric(server, "engine_restarts_total") >= 1
