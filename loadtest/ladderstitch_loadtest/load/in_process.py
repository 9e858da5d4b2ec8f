"""Image load from within this process, on any function that sends a request.

It suits faults and proxies that a benchmark puts between itself and the server, and rates of up to
some hundred requests/s. `image_load` sends more, from worker processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch_loadtest.load.pacing import SendCall, due_times, send_timed
from ladderstitch_loadtest.load.traces import BudgetClass

START_DELAY_S = 0.05
"""Time between the call and the start, from which the requests' times count."""

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
    """Return the arrival times of a Poisson process, in seconds from the start, ascending.

    The count is drawn first and then the times. `traces.poisson` draws gaps instead, so the two
    give different arrivals for the same seed.
    """
    count = rng.poisson(rate * seconds)
    return sorted((rng.random(count) * seconds).tolist())


async def send_open_loop(call: SendCall, requests: Sequence[PlannedRequest]) -> list[RequestSample]:
    """Send each request when it is due and return the samples in the same order."""
    planned = iter(requests)
    tasks = []
    async for due in due_times(time.monotonic() + START_DELAY_S, [at for at, *_ in requests]):
        _, budget_class, message = next(planned)
        tasks.append(asyncio.create_task(_send(call, due, budget_class, message)))
    return await asyncio.gather(*tasks)


async def _send(
    call: SendCall, due: float, budget_class: BudgetClass, message: bytes
) -> RequestSample:
    done = await send_timed(call, message, due, pb.InferResponse.FromString)
    name = budget_class.name
    if done.reply is None:
        return RequestSample(name, done.code, done.took_s, done.lag_s, False, 0.0, -1, 0)
    accounting = done.reply.accounting
    return RequestSample(
        name,
        done.code,
        done.took_s,
        done.lag_s,
        accounting.budget_met,
        accounting.quality,
        accounting.variant_id,
        accounting.batch_size,
    )
