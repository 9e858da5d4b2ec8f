"""Open-loop load: requests leave when their time has come, whether or not others were answered.

Latency counts from the time a request should have left, so a stall of the generator shows in the
figures instead of hiding in them (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from ladderstitch.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class BudgetClass:
    """Requests that share a budget, soft and counted by the server from their arrival there."""

    name: str
    budget_us: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One request's end; `code` is OK or the status, times in seconds."""

    budget_class: str
    code: str
    latency_s: float
    send_lag_s: float
    met: bool
    quality: float
    variant: int
    batch_size: int


def poisson(rate: float, seconds: float, rng: np.random.Generator) -> list[float]:
    """Times of arrival of a Poisson process, seconds from the start."""
    count = rng.poisson(rate * seconds)
    return sorted((rng.random(count) * seconds).tolist())


async def open_loop(
    call: Callable[[bytes], Awaitable[bytes]],
    requests: Sequence[tuple[float, BudgetClass, bytes]],
) -> list[Sample]:
    """Send each (time, class, message) at its time; the samples in the same order."""
    started = time.perf_counter() + 0.05
    tasks = []
    for at, budget_class, message in requests:
        delay = started + at - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(_send(call, started + at, budget_class, message)))
    return await asyncio.gather(*tasks)


async def _send(
    call: Callable[[bytes], Awaitable[bytes]], due: float, budget_class: BudgetClass, message: bytes
) -> Sample:
    lag = time.perf_counter() - due
    try:
        answer = pb.InferResponse.FromString(await call(message))
    except grpc.aio.AioRpcError as error:
        code = error.code().name
        return Sample(budget_class.name, code, time.perf_counter() - due, lag, False, 0.0, -1, 0)
    cost = answer.accounting
    return Sample(
        budget_class.name,
        "OK",
        time.perf_counter() - due,
        lag,
        cost.budget_met,
        cost.quality,
        cost.variant_id,
        cost.batch_size,
    )
