"""One run: load at one address, and faults in all replicas behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
import numpy as np

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch_loadtest.faults.stops.health import Check, grpc_check, http_check, sample
from ladderstitch_loadtest.faults.stops.injector import Injector, Probe, plan_faults
from ladderstitch_loadtest.faults.stops.load import IMAGES, TEXT, Load, draw_images
from ladderstitch_loadtest.faults.stops.report import ALL_CLEAR_S, HealthSample, StopsReport
from ladderstitch_loadtest.servers.process_supervisor import SupervisedProcess, count_requests

WARM_UP_S = 1.0
"""Seconds of load before the first fault."""
PROBE_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """Replicas, and the gateway in front of them, if any."""

    name: str
    replicas: list[SupervisedProcess]
    gateway: SupervisedProcess | None = None


async def run_stops(
    deployment: Deployment, kills: int, stops: int, seed: int, advance: Callable[[], None]
) -> StopsReport:
    """Load the language model, learn the answers, run load and faults, and return the report.

    The replicas share the faults. `advance` is called after each of them.
    """
    started, count = time.monotonic(), len(deployment.replicas)
    report, rng = StopsReport(deployment.name), np.random.default_rng(seed)

    def now_s() -> float:
        return time.monotonic() - started

    front = deployment.gateway or deployment.replicas[0]
    load = Load(front.address, [r.http for r in deployment.replicas], seed, now_s)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(load.close)
        injectors = []
        for number, replica in enumerate(deployment.replicas):
            client = await stack.enter_async_context(AsyncClient(replica.address))
            await client.load_model(TEXT)
            probe = _make_probe(client)
            injectors.append(Injector(number, replica.pid, probe, rng, now_s, advance))
        await load.learn()
        await stack.enter_async_context(_sampling(deployment, report, now_s))
        calling = asyncio.create_task(load.run())
        await asyncio.sleep(WARM_UP_S)
        first_s = now_s()
        plans = [plan_faults(kills // count, stops // count, rng) for _ in injectors]
        await asyncio.gather(*(i.run(p) for i, p in zip(injectors, plans, strict=True)))
        await asyncio.sleep(ALL_CLEAR_S)
        report.seconds = now_s() - first_s
        load.stop()
        await calling
    report.ends = load.ends
    report.faults = sorted((f for i in injectors for f in i.faults), key=lambda f: f.at_s)
    for replica in deployment.replicas:
        report.left_over += await asyncio.to_thread(count_requests, replica.metrics)
    return report


def _make_probe(client: AsyncClient) -> Probe:
    """Return a probe that asks a replica directly, again and again until it answers."""
    image = draw_images(np.random.default_rng(0), 1)[0]

    async def ask(kind: str) -> None:
        if kind == "engine":
            await client.predict(image, model=IMAGES, timeout_s=PROBE_DEADLINE_S)
            return
        stream = client.generate("probe", model=TEXT, max_tokens=1, timeout_s=PROBE_DEADLINE_S)
        async for _ in stream:
            pass

    async def probe(kind: str) -> None:
        while True:
            try:
                await ask(kind)
            except RequestFailed:
                await asyncio.sleep(0.05)
            else:
                return

    return probe


@asynccontextmanager
async def _sampling(
    deployment: Deployment, report: StopsReport, now_s: Callable[[], float]
) -> AsyncIterator[None]:
    """Sample the health of all servers during the `async with` block."""
    async with AsyncExitStack() as stack:

        async def by_grpc(server: SupervisedProcess) -> Check:
            channel = grpc.aio.insecure_channel(
                server.address, options=[("grpc.use_local_subchannel_pool", 1)]
            )
            return grpc_check(await stack.enter_async_context(channel))

        checks: list[tuple[Check, list[HealthSample]]] = []
        for number, replica in enumerate(deployment.replicas):
            report.health[number, "gRPC"] = []
            report.health[number, "HTTP"] = []
            checks.append((await by_grpc(replica), report.health[number, "gRPC"]))
            checks.append((http_check(replica.http), report.health[number, "HTTP"]))
        if deployment.gateway is not None:
            checks.append((await by_grpc(deployment.gateway), report.gateway))
        tasks = [asyncio.create_task(sample(*check, now_s)) for check in checks]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
