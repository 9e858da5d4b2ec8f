"""Loading and unloading models while a replica runs, under load."""

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
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.model.residual import ResidualScheme
from tests.conftest import make_tiny_bundle
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, pixels, start_server, stop_server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of fetched models.

    `tiny` and `other` classify images, `text` generates, `broken` has no qualities, and the
    weights of `corrupt` end too early.
    """
    home = tmp_path_factory.mktemp("home")
    make_tiny_bundle(home / "tiny")
    make_tiny_bundle(home / "other")
    rewrite(home / "other", name="other")
    paths = (
        TextVariant(name="standard", residual=ResidualScheme()),
        TextVariant(name="ladder", residual=ResidualScheme(scheme="ladder")),
    )
    write_tiny(home / "text", paths=paths)
    rewrite(home / "text", name="text")
    make_tiny_bundle(home / "broken")
    rewrite(home / "broken", name="broken")
    (home / "broken" / "quality.json").unlink()
    write_tiny(home / "corrupt")
    rewrite(home / "corrupt", name="corrupt")
    for weights in (home / "corrupt").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    return home


def rewrite(bundle: Path, **fields: Any) -> None:
    """Change fields of the manifest of a bundle."""
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


async def test_load_model_serves_models_of_both_kinds(client: AsyncClient) -> None:
    assert await client.load_model("other") == "other"
    assert await client.load_model("text") == "text"
    for name in ("tiny", "other"):
        assert (await client.predict(pixels(), model=name)).label
    chunks = [chunk async for chunk in client.generate("a", model="text", max_tokens=3)]
    assert len(chunks) == 3
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    reply = await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING

    await client.unload_model("other")
    with pytest.raises(RequestFailed) as unloaded:
        await client.predict(pixels(), model="other")
    assert unloaded.value.reason == "MODEL_NOT_FOUND"
    reply = await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await client.unload_model("text")
    assert (await client.predict(pixels())).label


async def test_load_model_new_version_loses_no_request(client: AsyncClient, home: Path) -> None:
    versions: list[str] = []
    loaded = asyncio.Event()

    async def call_repeatedly(seed: int) -> None:
        """Call until ten answers after the new version was loaded."""
        later = 0
        while later < 10:
            later += loaded.is_set()
            response = await client.inference.Infer(infer_request(pixels(seed=seed)))
            versions.append(response.model_version)

    calls = [asyncio.create_task(call_repeatedly(seed)) for seed in range(8)]
    rewrite(home / "tiny", version="2")
    await client.load_model("tiny")
    loaded.set()
    await asyncio.gather(*calls)
    assert set(versions) == {"1", "2"}
    assert set(versions[-80:]) == {"2"}


async def test_unload_model_answers_accepted_requests(client: AsyncClient) -> None:
    await client.load_model("other")
    calls = [asyncio.create_task(client.predict(pixels(seed=n), model="other")) for n in range(20)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    await client.unload_model("other")
    ends = await asyncio.gather(*calls, return_exceptions=True)
    reasons = {end.reason for end in ends if isinstance(end, RequestFailed)}
    assert reasons <= {"MODEL_NOT_FOUND"}


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ("nowhere", "expected a bundle, got 'nowhere'"),
        ("../tiny", "expected the name of a fetched model"),
        ("/etc", "expected the name of a fetched model"),
        ("", "expected the name of a fetched model"),
        ("broken", "no quality.json"),
        ("corrupt", "model.safetensors"),
    ],
)
async def test_load_model_invalid_bundle_changes_nothing(
    client: AsyncClient, bundle: str, message: str
) -> None:
    with pytest.raises(RequestFailed, match=message) as failed:
        await client.load_model(bundle)
    assert failed.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert (await client.predict(pixels())).label


def child_processes(server: RunningServer) -> set[int]:
    """Return the process ids of the server's workers and ranks that have not ended."""
    tasks = Path(f"/proc/{server.process.pid}/task")
    pids = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return {pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes()}  # zombies have none


async def test_load_model_uses_the_active_settings(client: AsyncClient) -> None:
    await client.update_scheduling("tiny", pinned_variant=1)
    await client.load_model("text")
    try:
        chunks = [chunk async for chunk in client.generate("a", model="text", max_tokens=1)]
        assert chunks[-1].accounting is not None
        assert chunks[-1].accounting.variant_id == 1
    finally:
        await client.unload_model("text")
        await client.update_scheduling("tiny", unpin=True)


async def test_load_model_failed_start_leaves_no_process(
    client: AsyncClient, running: RunningServer
) -> None:
    await client.update_scheduling("tiny", pinned_variant=5)  # `text` has no variant 5
    before = child_processes(running)
    try:
        with pytest.raises(RequestFailed, match=r"scheduling\.pinned_variant"):
            await client.load_model("text")
    finally:
        await client.update_scheduling("tiny", unpin=True)
    assert child_processes(running) <= before


async def test_unload_model_unknown_name_is_not_found(client: AsyncClient) -> None:
    with pytest.raises(RequestFailed, match="this server has 'tiny'") as failed:
        await client.unload_model("no-such-model")
    assert failed.value.code == grpc.StatusCode.NOT_FOUND


async def test_oip_repository_calls_load_and_unload_models(client: AsyncClient) -> None:
    stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(client.channel)
    await stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="other"))
    index = await stub.RepositoryIndex(oip.RepositoryIndexRequest())
    assert {model.name for model in index.models} == {"tiny", "other"}
    await stub.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="other"))
    index = await stub.RepositoryIndex(oip.RepositoryIndexRequest())
    assert {model.name for model in index.models} == {"tiny"}
    unknown = oip.RepositoryModelLoadRequest(model_name="other")
    unknown.parameters["config"].string_param = "{}"
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.RepositoryModelLoad(unknown)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_load_and_unload_commands_print_the_result(running: RunningServer) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "ladderstitch", *arguments]
        command += ["--address", running.address]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        return done.stdout.strip() or done.stderr.strip()

    assert await asyncio.to_thread(run, "load", "other") == "loaded other"
    assert await asyncio.to_thread(run, "unload", "other") == "unloaded other"
    assert "MODEL_NOT_FOUND" in await asyncio.to_thread(run, "unload", "other")


async def begin_unload(client: AsyncClient, name: str) -> asyncio.Task[None]:
    """Return an unload that the server has received: it answers a later call first."""
    unload = asyncio.create_task(client.unload_model(name))
    await asyncio.sleep(0)
    await client.list_models()
    return unload


async def has_model(client: AsyncClient, name: str) -> bool:
    """Return whether the server has a model, once all changes of models have ended."""
    with pytest.raises(RequestFailed, match="no model 'never loaded'"):
        await client.unload_model("never loaded")
    return name in [model.name for model in (await client.list_models()).models]


async def test_changes_given_up_behind_a_load_go_on_or_are_undone(client: AsyncClient) -> None:
    """An unload goes on, and a load is undone."""
    await client.load_model("other")
    loading = asyncio.create_task(client.load_model("text"))
    unload = await begin_unload(client, "other")
    assert not loading.done()
    unload.cancel()
    with pytest.raises(RequestFailed, match="Deadline Exceeded"):
        await client.load_model("tiny", timeout_s=0.1)
    await loading
    assert not await has_model(client, "other")
    assert await client.health("other") == "NOT_SERVING"
    for name in ("tiny", "text"):
        assert await has_model(client, name)
        assert await client.health(name) == "SERVING"
    await client.unload_model("text")


async def test_unload_model_behind_its_reload_is_not_serving(client: AsyncClient) -> None:
    await client.load_model("other")
    loading = asyncio.create_task(client.load_model("other"))
    unload = await begin_unload(client, "other")
    await asyncio.gather(loading, unload)
    assert not await has_model(client, "other")
    assert await client.health("other") == "NOT_SERVING"
