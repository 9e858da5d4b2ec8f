"""Processes killed under load: which requests were answered, and the longest gap in answers."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import grpc
import numpy as np

from ladderstitch.client import infer_request
from ladderstitch.client.channel import RETRY_POLICY, retry_options
from ladderstitch_loadtest.benchmarks.overhead import INFER, get_image_shape
from ladderstitch_loadtest.load.in_process import (
    PlannedRequest,
    RequestSample,
    poisson,
    send_open_loop,
)
from ladderstitch_loadtest.load.traces import BudgetClass

CONNECTIONS = 8
"""Enough connections that each of two gateways on one port gets some."""
KILL_AT_SHARE = 0.25
"""When the fault is injected, as a share of the run."""


@dataclass(frozen=True, slots=True)
class FaultResult:
    """One run under load with one fault.

    `longest_gap_s` is the longest time without any answer, `slowest_s` the slowest answer.
    """

    killed: str
    requests: int
    answered: int
    codes: dict[str, int]
    longest_gap_s: float
    slowest_s: float
    p50_ms: float
    p99_ms: float
    rate: float
    deadline_s: float
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


class CallerPool:
    """Eight connections that take turns, each with the documented retry policy of clients."""

    def __init__(self, address: str, deadline_s: float, retries: str | None = RETRY_POLICY) -> None:
        self.deadline_s = deadline_s
        options = [*retry_options(retries), ("grpc.use_local_subchannel_pool", 1)]
        self.channels = [
            grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)
        ]
        self._calls = itertools.cycle([c.unary_unary(INFER) for c in self.channels])

    async def call(self, message: bytes) -> bytes:
        """Send a serialised request on the next connection and return the reply.

        Raises `grpc.aio.AioRpcError`.
        """
        reply: bytes = await next(self._calls)(message, timeout=self.deadline_s)
        return reply

    async def close(self) -> None:
        """Close all connections."""
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
) -> FaultResult:
    """Send Poisson load to an address, and call `kill` after a quarter of the run."""
    callers = CallerPool(address, deadline_s)
    try:
        requests = await _draw_requests(callers, rate, seconds, seed)
        for channel in callers.channels:
            await channel.channel_ready()
        load = asyncio.create_task(send_open_loop(callers.call, requests))
        await asyncio.sleep(KILL_AT_SHARE * seconds)
        await asyncio.to_thread(kill)
        samples = await load
    finally:
        await callers.close()
    due = [at for at, *_ in requests]
    return _summarise(name, due, samples, rate, deadline_s, seconds)


async def _draw_requests(
    callers: CallerPool, rate: float, seconds: float, seed: int
) -> list[PlannedRequest]:
    rng = np.random.default_rng(seed)
    shape = await get_image_shape(callers.channels[0])
    pixels = rng.integers(0, 256, (1, *shape), np.uint8)
    message = infer_request(pixels).SerializeToString()
    budget = BudgetClass("deadline", callers.deadline_s)
    return [(at, budget, message) for at in poisson(rate, seconds, rng)]


def _summarise(
    name: str,
    due: Sequence[float],
    samples: Sequence[RequestSample],
    rate: float,
    deadline_s: float,
    seconds: float,
) -> FaultResult:
    answered = [(at, s) for at, s in zip(due, samples, strict=True) if s.code == "OK"]
    ends = sorted(at + sample.latency_s for at, sample in answered)
    latencies = [sample.latency_s for _, sample in answered]
    return FaultResult(
        killed=name,
        requests=len(samples),
        answered=len(answered),
        codes=dict(Counter(sample.code for sample in samples)),
        longest_gap_s=round(float(max(np.diff([0.0, *ends]))), 2),
        slowest_s=round(max(latencies), 2),
        p50_ms=round(1e3 * float(np.median(latencies)), 2),
        p99_ms=round(1e3 * float(np.quantile(latencies, 0.99)), 2),
        rate=rate,
        deadline_s=deadline_s,
        seconds=seconds,
    )
