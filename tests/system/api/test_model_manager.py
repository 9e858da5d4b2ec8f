"""Models that come and go while a replica runs, under load."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.client import AsyncClient, RequestFailed, infer_request
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.oip import grpc_service_pb2_grpc
from tests.conftest import make_tiny_bundle
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, pixels, start_server, stop_server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where fetched models lie: `tiny`, `other`, a language model `text`, a broken one."""
    home = tmp_path_factory.mktemp("home")
    make_tiny_bundle(home / "tiny")
    make_tiny_bundle(home / "other")
    rewrite(home / "other", name="other")
    write_tiny(home / "text")
    rewrite(home / "text", name="text")
    make_tiny_bundle(home / "broken")
    rewrite(home / "broken", name="broken")
    (home / "broken" / "quality.json").unlink()
    return home


def rewrite(bundle: Path, **fields: Any) -> None:
    path = bundle / "model.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[RunningServer]:
    environment = {"LADDERSTITCH_HOME": str(home)}
    server = start_server(home / "tiny", home / "log", environment=environment)
    yield server
    assert stop_server(server) == 0


@pytest.fixture
async def client(running: RunningServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.address) as client:
        yield client


async def test_models_of_all_kinds_are_served_side_by_side(client: AsyncClient) -> None:
    assert await client.load_model("other") == "other"
    assert await client.load_model("text") == "text"
    for name in ("tiny", "other"):
        assert (await client.predict(pixels(), model=name)).label
    pieces = [piece async for piece in client.generate("a", model="text", max_tokens=3)]
    assert len(pieces) == 3
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    reply = await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING

    await client.unload_model("other")
    with pytest.raises(RequestFailed) as gone:
        await client.predict(pixels(), model="other")
    assert gone.value.reason == "MODEL_NOT_FOUND"
    reply = await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await client.unload_model("text")
    assert (await client.predict(pixels())).label


async def test_a_new_version_takes_over_without_a_lost_request(
    client: AsyncClient, home: Path
) -> None:
    versions: list[str] = []
    loaded = asyncio.Event()

    async def ask(seed: int) -> None:
        """Until some time after the new version has come."""
        later = 0
        while later < 10:
            later += loaded.is_set()
            response = await client.inference.Infer(infer_request(pixels(seed=seed)))
            versions.append(response.model_version)

    asking = [asyncio.create_task(ask(seed)) for seed in range(8)]
    rewrite(home / "tiny", version="2")
    await client.load_model("tiny")
    loaded.set()
    await asyncio.gather(*asking)
    assert set(versions) == {"1", "2"}
    assert set(versions[-80:]) == {"2"}


async def test_an_unloaded_model_answers_what_it_accepted(client: AsyncClient) -> None:
    await client.load_model("other")
    asking = [asyncio.create_task(client.predict(pixels(seed=n), model="other")) for n in range(20)]
    await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    await client.unload_model("other")
    ends = await asyncio.gather(*asking, return_exceptions=True)
    refused = {end.reason for end in ends if isinstance(end, RequestFailed)}
    assert refused <= {"MODEL_NOT_FOUND"}


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ("nowhere", "no bundle 'nowhere'"),
        ("../tiny", "expected the name of a fetched model"),
        ("/etc", "expected the name of a fetched model"),
        ("", "expected the name of a fetched model"),
        ("broken", "no quality.json"),
    ],
)
async def test_what_cannot_be_loaded_changes_nothing(
    client: AsyncClient, bundle: str, message: str
) -> None:
    with pytest.raises(RequestFailed, match=message) as refused:
        await client.load_model(bundle)
    assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert (await client.predict(pixels())).label


async def test_an_unknown_model_cannot_be_unloaded(client: AsyncClient) -> None:
    with pytest.raises(RequestFailed, match="this server has 'tiny'") as refused:
        await client.unload_model("nobody")
    assert refused.value.code == grpc.StatusCode.NOT_FOUND


async def test_existing_clients_load_and_unload_too(client: AsyncClient) -> None:
    stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(client.channel)
    await stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="other"))
    index = await stub.RepositoryIndex(oip.RepositoryIndexRequest())
    assert {model.name for model in index.models} == {"tiny", "other"}
    await stub.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="other"))
    index = await stub.RepositoryIndex(oip.RepositoryIndexRequest())
    assert {model.name for model in index.models} == {"tiny"}
    unknown = oip.RepositoryModelLoadRequest(model_name="other")
    unknown.parameters["config"].string_param = "{}"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.RepositoryModelLoad(unknown)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_from_the_command_line(running: RunningServer) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "ladderstitch", *arguments]
        command += ["--address", running.address]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        return done.stdout.strip() or done.stderr.strip()

    assert await asyncio.to_thread(run, "load", "other") == "other answers"
    assert await asyncio.to_thread(run, "unload", "other") == "other is gone"
    assert "MODEL_NOT_FOUND" in await asyncio.to_thread(run, "unload", "other")
