"""A replica whose parts fail goes on, or reports it and ends; models leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.replica.replica import Replica
from tests.conftest import make_tiny_bundle
from tests.support.servers import pixels, start_server

LIMIT_S = 300.0
"""Guards against hanging only."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of fetched models: `tiny` and `other`, which has no profile of its own."""
    home = tmp_path / "home"
    for name in ("tiny", "other"):
        make_tiny_bundle(home / name)
        path = home / name / "model.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"name": name}))
    monkeypatch.setenv("LADDERSTITCH_HOME", str(home))
    return home


@contextlib.asynccontextmanager
async def running(
    home: Path, on_failure: Callable[[], None] = lambda: None, **fields: Any
) -> AsyncIterator[tuple[Replica, AsyncClient]]:
    """Yield a replica of `tiny` in this process, and a client of it."""
    config = ServerConfig(bundle=home / "tiny", port=0, metrics_port=0, **fields)
    replica = Replica(config, on_failure=on_failure)
    await replica.start()
    try:
        async with AsyncClient(f"127.0.0.1:{replica.port}") as client:
            yield replica, client
    finally:
        await replica.stop()


async def health(client: AsyncClient, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(client.channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(reply.status)


async def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.02)


async def test_record_on_a_full_disk_harms_no_request(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "record"
    folder.mkdir()
    (folder / f"tiny-{os.getpid()}.jsonl").symlink_to("/dev/full")
    async with running(home, record=folder) as (replica, client):
        for _ in range(20):
            assert (await client.predict(pixels())).label
        labels = {"model": "tiny"}
        name = "ladderstitch_telemetry_failures_total"
        assert replica.metrics.registry.get_sample_value(name, labels) == 1
        assert await health(client) == health_pb2.HealthCheckResponse.SERVING


async def test_input_that_overflows_fails_alone(home: Path) -> None:
    huge = np.full((1, 1, 8, 8), 3e38, np.float32)
    async with running(home) as (replica, client):
        calls = [client.predict(huge if n % 3 == 0 else pixels(seed=n)) for n in range(12)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        for number, end in enumerate(ends):
            if number % 3 == 0:
                assert isinstance(end, RequestFailed)
                assert end.reason == "NON_FINITE_OUTPUT"
            else:
                assert not isinstance(end, BaseException)
        name = "ladderstitch_non_finite_outputs_total"
        assert replica.metrics.registry.get_sample_value(name, {"model": "tiny"}) == 4


async def test_replica_with_a_dead_dispatch_task_reports_it(home: Path) -> None:
    failures: list[bool] = []
    async with running(home, lambda: failures.append(True)) as (replica, client):
        assert (await client.predict(pixels())).label
        dispatch = [t for t in asyncio.all_tasks() if t.get_name() == "dispatch"]
        for task in dispatch:
            task.cancel()
        with pytest.raises(RequestFailed) as failed:
            await client.predict(pixels())
        assert failed.value.reason == "ENGINE_RESTARTING"
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING

        async def is_reported() -> bool:
            return await health(client) == await health(client, "tiny") == not_serving

        await until(is_reported)
        await until(lambda: failures)
        assert replica.failed
        await asyncio.sleep(0.3)
    assert failures == [True]


FAULT = """
import threading, time
from pathlib import Path
def fail(*args):
    raise OSError(24, "Too many open files")
def watch():
    from ladderstitch.vision.scheduler.scheduler import Scheduler
    while not Path({flag!r}).exists():
        time.sleep(0.02)
    Scheduler._collect = fail
    Path({flag!r}).unlink()
threading.Thread(target=watch, daemon=True).start()
"""


async def test_serve_with_a_dispatch_loop_that_cannot_run_exits(home: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULT.format(flag=str(flag)))
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    server = await asyncio.to_thread(
        lambda: start_server(home / "tiny", tmp_path / "log", environment=environment)
    )
    try:
        async with AsyncClient(server.address) as client:
            assert (await client.predict(pixels())).label
            flag.touch()
            await until(lambda: not flag.exists())
            while server.process.poll() is None:
                with contextlib.suppress(RequestFailed):
                    await asyncio.wait_for(client.predict(pixels()), LIMIT_S)
        assert server.process.wait(LIMIT_S) == 1
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
    assert "the replica has to be replaced" in server.log.read_text()


HANG = """
import threading, time
from pathlib import Path
def hang(*args):
    Path({flag!r}).unlink()
    threading.Event().wait()
def watch():
    from ladderstitch.hosting import vision_runner
    from ladderstitch.vision.engine import compiled
    limits = vision_runner.HangLimits(floor_s=0.3, factor=0.0, interval_s=0.05)
    vision_runner.HangLimits = lambda: limits
    compiled.CLOSE_LIMIT_S = 0.1
    while not Path({flag!r}).exists():
        time.sleep(0.02)
    compiled.CompiledExecutor.__call__ = hang
threading.Thread(target=watch, daemon=True).start()
"""


async def first_failure(client: AsyncClient) -> RequestFailed:
    """Send requests until one fails."""
    while True:
        try:
            await client.predict(pixels())
        except RequestFailed as error:
            return error


async def test_serve_with_a_batch_that_hangs_exits(home: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HANG.format(flag=str(flag)))
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    flags = ("--inline-batch-limit-ms", "0")
    server = await asyncio.to_thread(
        lambda: start_server(home / "tiny", tmp_path / "log", *flags, environment=environment)
    )
    try:
        async with AsyncClient(server.address, retry_policy=None) as client:
            assert (await client.predict(pixels())).label
            flag.touch()
            failure = await asyncio.wait_for(first_failure(client), LIMIT_S)
            assert failure.code == grpc.StatusCode.UNAVAILABLE
        assert await asyncio.to_thread(server.process.wait, LIMIT_S) == 1
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
    assert "batch hangs requests=1" in server.log.read_text()


@dataclass(frozen=True)
class Footprint:
    """What this process holds: open descriptors, its child processes, the tasks of the loop."""

    descriptors: int
    children: frozenset[int]
    tasks: int

    @classmethod
    def now(cls) -> Footprint:
        descriptors = len(os.listdir("/proc/self/fd"))
        return cls(descriptors, frozenset(children()), len(asyncio.all_tasks()))

    def holds_no_more_than(self, before: Footprint) -> bool:
        """Return whether nothing was left behind.

        Less may be held: `before` counts also what was just about to end, such as the handler of
        the last call.
        """
        return (
            self.descriptors <= before.descriptors
            and self.children <= before.children
            and self.tasks <= before.tasks
        )


async def nothing_was_left(before: Footprint) -> None:
    """Wait until this process holds no more than before; fail with both footprints."""
    try:
        await until(lambda: Footprint.now().holds_no_more_than(before))
    except TimeoutError:
        pytest.fail(f"left behind: {before} became {Footprint.now()}")


def children() -> set[int]:
    """Return the processes that this one has started and that have not ended."""
    pids = [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    return {pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes()}


def series(replica: Replica) -> set[str]:
    """Return the models that metrics name."""
    return {
        sample.labels["model"]
        for family in replica.metrics.registry.collect()
        for sample in family.samples
        if "model" in sample.labels
    }


async def give_up(call: Any, after_s: float) -> None:
    """Cancel a call after some time, if it has not ended by then."""
    task = asyncio.ensure_future(call)
    await asyncio.wait([task], timeout=after_s)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, RequestFailed):
        await task


@pytest.mark.parametrize(("runtime", "cycles"), [("onnx", 9), ("torch", 3)])
async def test_loads_and_unloads_leave_nothing_behind(
    home: Path, runtime: str, cycles: int
) -> None:
    async with running(home, runtime=runtime) as (replica, client):
        await client.load_model("other")
        assert (await client.predict(pixels(), model="other")).label
        await client.unload_model("other")
        await until(lambda: not replica.models._ending)
        before = Footprint.now()
        for cycle in range(cycles):
            if cycle % 3 == 1:
                await give_up(client.load_model("other"), 0.05 * cycle)
            else:
                await client.load_model("other")
            if "other" in replica.models.runners:
                if cycle % 3 == 2:
                    await give_up(client.unload_model("other"), 0.05)
                else:
                    await client.unload_model("other")
            await until(lambda: not replica.models._ending and not replica.models._lock.locked())
            with contextlib.suppress(RequestFailed):  # a load that ended before it was given up
                await client.unload_model("other")
            assert series(replica) == {"tiny"}
        await nothing_was_left(before)
        assert (await client.predict(pixels(), model="tiny")).label


async def test_failed_loads_leave_nothing_behind(home: Path) -> None:
    async with running(home) as (replica, client):
        (home / "other" / "weights.safetensors").write_bytes(b"\0" * 100)
        with pytest.raises(RequestFailed):
            await client.load_model("other")
        before = Footprint.now()
        for _ in range(5):
            with pytest.raises(RequestFailed, match=r"weights\.safetensors"):
                await client.load_model("other")
        assert series(replica) == {"tiny"}
        await nothing_was_left(before)


async def test_load_model_of_a_bundle_that_explodes_is_refused(home: Path) -> None:
    lines = ["l0: &l0 [ha, ha]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    async with running(home) as (_, client):
        for text in ("\n".join(lines), "labels: " + "[" * 100_000, "format: " + "9" * 100_000):
            (home / "other" / "model.yaml").write_text(text)
            with pytest.raises(RequestFailed, match=r"model\.yaml") as failed:
                await asyncio.wait_for(client.load_model("other"), LIMIT_S)
            assert failed.value.reason == "INVALID_ARGUMENT"
        assert (await client.predict(pixels())).label


async def test_load_model_does_not_find_folders_of_the_working_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_bundle(tmp_path / "work" / "local")
    monkeypatch.chdir(tmp_path / "work")
    async with running(home) as (_, client):
        with pytest.raises(RequestFailed, match="expected a bundle, got 'local'"):
            await client.load_model("local")


def hold_the_loop(seconds: float) -> None:
    time.sleep(seconds)


async def test_event_loop_lag_is_a_metric(home: Path) -> None:
    async with running(home) as (replica, client):
        name = "ladderstitch_event_loop_lag_seconds"
        get = replica.metrics.registry.get_sample_value
        await until(lambda: (get(f"{name}_count") or 0) > 2)
        before = get(f"{name}_sum")
        hold_the_loop(0.5)
        await until(lambda: (get(f"{name}_sum") or 0) > (before or 0) + 0.3)
        address = f"http://127.0.0.1:{replica.metrics_port}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(address).read().decode())
        assert f"{name}_bucket" in page
        assert 'process_resident_memory_bytes{process="replica"}' in page
        assert (await client.predict(pixels())).label


async def test_load_model_checks_and_measures_off_the_event_loop(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "other" / "latency.json").unlink()  # so that all networks are measured
    async with running(home) as (replica, client):
        threads: list[threading.Thread] = []
        make = replica.models.make

        def recorded(config: ServerConfig) -> Any:
            threads.append(threading.current_thread())
            return make(config)

        async def no_rehearsal(twin: object) -> None:
            """Send no requests: small ones would be computed in the event loop."""

        monkeypatch.setattr(replica.models, "make", recorded)
        monkeypatch.setattr(replica.models, "_rehearse", no_rehearsal)
        monkeypatch.setenv("LADDERSTITCH_CACHE", str(home / "cache"))
        await client.load_model("other")
        assert len(threads) == 1
        assert threads[0] is not threading.main_thread()
        engine: Any = replica.registry.vision_models["other"].scheduler.engine
        assert engine.inline_batches == 0
        assert engine.inline_limit_s > 0
