"""Processes killed under load: who was answered, and how long the hole was."""

from __future__ import annotations

import asyncio
import itertools
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import grpc
import numpy as np

from ladderstitch.client import infer_request
from ladderstitch.client.channel import RETRY_POLICY, retry_options
from ladderstitch_loadtest.benchmarks.overhead import INFER, image_shape_of
from ladderstitch_loadtest.load.open_loop import BudgetClass, Sample, open_loop, poisson

CONNECTIONS = 8
"""Enough that each of two gateways on one port has some."""
KILL_AT = 0.25
"""Of the run."""


@dataclass(frozen=True, slots=True)
class Killing:
    """One run; `hole_s` is the longest time without any answer, `worst_s` the slowest answer."""

    killed: str
    requests: int
    answered: int
    codes: dict[str, int]
    hole_s: float
    worst_s: float
    p50_ms: float
    p99_ms: float
    rate: float
    deadline_s: float
    seconds: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Callers:
    """Several connections, taking turns, each with the documented client policy."""

    def __init__(self, address: str, deadline_s: float, retries: str | None = RETRY_POLICY) -> None:
        self.deadline_s = deadline_s
        options = [*retry_options(retries), ("grpc.use_local_subchannel_pool", 1)]
        self.channels = [
            grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)
        ]
        self._calls = itertools.cycle([c.unary_unary(INFER) for c in self.channels])

    async def call(self, message: bytes) -> bytes:
        answer: bytes = await next(self._calls)(message, timeout=self.deadline_s)
        return answer

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()


async def kill_under_load(
    address: str,
    name: str,
    kill: Callable[[], None],
    *,
    rate: float,
    seconds: float,
    deadline_s: float,
    seed: int = 1,
) -> Killing:
    """Poisson load on an address; `kill` is called a quarter into it."""
    callers = Callers(address, deadline_s)
    try:
        requests = await _requests(callers, rate, seconds, deadline_s, seed)
        for channel in callers.channels:
            await channel.channel_ready()
        load = asyncio.create_task(open_loop(callers.call, requests))
        await asyncio.sleep(KILL_AT * seconds)
        await asyncio.to_thread(kill)
        samples = await load
    finally:
        await callers.close()
    due = [at for at, *_ in requests]
    return _result(name, due, samples, rate, deadline_s, seconds)


async def _requests(
    callers: Callers, rate: float, seconds: float, deadline_s: float, seed: int
) -> list[tuple[float, BudgetClass, bytes]]:
    rng = np.random.default_rng(seed)
    shape = await image_shape_of(callers.channels[0])
    pixels = rng.integers(0, 256, (1, *shape), np.uint8)
    message = infer_request(pixels).SerializeToString()
    budget = BudgetClass("deadline", round(1e6 * deadline_s))
    return [(at, budget, message) for at in poisson(rate, seconds, rng)]


def _result(
    name: str,
    due: Sequence[float],
    samples: Sequence[Sample],
    rate: float,
    deadline_s: float,
    seconds: float,
) -> Killing:
    answered = [(at, s) for at, s in zip(due, samples, strict=True) if s.code == "OK"]
    ends = sorted(at + sample.latency_s for at, sample in answered)
    latencies = [sample.latency_s for _, sample in answered]
    return Killing(
        killed=name,
        requests=len(samples),
        answered=len(answered),
        codes=dict(Counter(sample.code for sample in samples)),
        hole_s=round(float(max(np.diff([0.0, *ends]))), 2),
        worst_s=round(max(latencies), 2),
        p50_ms=round(1e3 * float(np.median(latencies)), 2),
        p99_ms=round(1e3 * float(np.quantile(latencies, 0.99)), 2),
        rate=rate,
        deadline_s=deadline_s,
        seconds=seconds,
    )


def until_all_serve(metrics: Sequence[str], replicas: int, within_s: float = 600.0) -> None:
    """Wait until every gateway's metrics page counts so many; raises `TimeoutError`."""
    end = time.monotonic() + within_s
    while any(serving_at(page) != replicas for page in metrics):
        if time.monotonic() > end:
            pages = {page: serving_at(page) for page in metrics}
            raise TimeoutError(f"expected {replicas} replicas to serve, got {pages}")
        time.sleep(0.1)


def serving_at(page: str) -> int:
    """As a gateway's metrics page counts; 0 if it cannot be read."""
    try:
        with urllib.request.urlopen(f"{page}/metrics", timeout=5) as reply:
            text = reply.read().decode()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith('ladderstitch_gateway_replicas{state="serving"}'):
            return int(float(line.rpartition(" ")[2]))
    return 0
