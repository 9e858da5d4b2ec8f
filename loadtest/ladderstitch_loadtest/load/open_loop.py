"""Open-loop load within this process: each request is sent when it is due.

Latency counts from the time at which a request was due, so a stall of the generator shows in the
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
from ladderstitch_loadtest.load.traces import BudgetClass

PlannedRequest = tuple[float, BudgetClass, bytes]
"""Seconds from the start at which the request is due, its class, and its serialised message."""


@dataclass(frozen=True, slots=True)
class RequestSample:
    """The result of one request: status (`OK` or the gRPC code), seconds, and what it got.

    `met` is whether the server counts the budget as met, from the request's arrival there.
    """

    budget_class: str
    code: str
    latency_s: float
    send_lag_s: float
    met: bool
    quality: float
    variant: int
    batch_size: int


def poisson(rate: float, seconds: float, rng: np.random.Generator) -> list[float]:
    """Return the arrival times of a Poisson process, in seconds from the start, ascending."""
    count = rng.poisson(rate * seconds)
    return sorted((rng.random(count) * seconds).tolist())


async def open_loop(
    call: Callable[[bytes], Awaitable[bytes]], requests: Sequence[PlannedRequest]
) -> list[RequestSample]:
    """Send each request when it is due and return the samples in the same order."""
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
) -> RequestSample:
    name, lag = budget_class.name, time.perf_counter() - due
    try:
        reply = pb.InferResponse.FromString(await call(message))
    except grpc.aio.AioRpcError as error:
        took = time.perf_counter() - due
        return RequestSample(name, error.code().name, took, lag, False, 0.0, -1, 0)
    accounting = reply.accounting
    return RequestSample(
        name,
        "OK",
        time.perf_counter() - due,
        lag,
        accounting.budget_met,
        accounting.quality,
        accounting.variant_id,
        accounting.batch_size,
    )
