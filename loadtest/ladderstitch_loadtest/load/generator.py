"""Open-loop load of images from several processes: requests leave when due, answered or not.

Latency counts from the time a request was due, so a stall of the generator shows in the figures
instead of hiding in them (coordinated omission); the generator says when it is the bottleneck.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.load.outcome import LoadOutcome
from ladderstitch_loadtest.load.sending import Begin, connected, send_parts, when_due
from ladderstitch_loadtest.load.targets import Target, TargetAnswer
from ladderstitch_loadtest.load.traces import Trace

LATE_SHARE = 0.1
"""Part of the shortest budget that the generator may be late by at its 99th percentile."""

End = tuple[str, float, float, TargetAnswer | None]
"""Status, seconds from due to answer, seconds that it left late, what the server said."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One process's part: when each request is due, which message it sends; `cpu` to stay on."""

    address: str
    target: Target
    messages: list[bytes]
    due_s: list[float]
    picks: list[int]
    cpu: int | None

    async def send(self, begin: Begin) -> list[End]:
        """Connect, ask when to begin, send; the ends in order of the plan."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            await connected(channel)
            call = channel.unary_unary(self.target.method)

            async def one(due: float, message: bytes) -> End:
                lag = time.monotonic() - due
                try:
                    answer = await call(message)
                except grpc.aio.AioRpcError as error:
                    return error.code().name, time.monotonic() - due, lag, None
                took = time.monotonic() - due
                return "OK", took, lag, self.target.read(answer)

            messages = (self.messages[pick] for pick in self.picks)
            tasks = [
                asyncio.create_task(one(due, next(messages)))
                async for due in when_due(begin(), self.due_s)
            ]
            return await asyncio.gather(*tasks)


@dataclass(frozen=True, slots=True)
class Measured:
    """A real run: the outcome by the server's clock, and what the generator saw, [N] each.

    A server that does not say how long it took is judged by the caller's clock.
    """

    outcome: LoadOutcome
    codes: tuple[str, ...]
    client_s: NDArray[np.float64]
    lag_s: NDArray[np.float64]

    @property
    def late(self) -> bool:
        """Whether the generator was the bottleneck."""
        return self.lag_p99_s > LATE_SHARE * min(c.budget_s for c in self.outcome.trace.classes)

    @property
    def lag_p99_s(self) -> float:
        return float(np.quantile(self.lag_s, 0.99))

    def statuses(self) -> dict[str, int]:
        return dict(Counter(self.codes))


def measure(
    address: str,
    target: Target,
    trace: Trace,
    *,
    processes: int = 1,
    cpus: Sequence[int] | None = None,
) -> Measured:
    """Send a trace; requests go to the processes in turn. `cpus` pins them."""
    messages = [target.message(c.budget_s) for c in trace.classes]
    plans = []
    for k in range(processes):
        due_s, picks = trace.arrivals_s[k::processes].tolist(), trace.picks[k::processes].tolist()
        cpu = None if cpus is None else cpus[k % len(cpus)]
        plans.append(LoadPlan(address, target, messages, due_s, picks, cpu))
    ends: list[End | None] = [None] * len(trace)
    for k, mine in enumerate(send_parts(plans)):
        ends[k::processes] = mine
    return _measured(trace, [end for end in ends if end is not None])


def _measured(trace: Trace, ends: list[End]) -> Measured:
    outcome = LoadOutcome.unanswered(trace)
    for i, (_, client_s, _, answer) in enumerate(ends):
        if answer is None:
            continue
        outcome.total_s[i] = client_s if np.isnan(answer.total_s) else answer.total_s
        outcome.queue_s[i], outcome.compute_s[i] = answer.queue_s, answer.compute_s
        outcome.variant[i], outcome.quality[i] = answer.variant, answer.quality
        outcome.rows[i] = answer.rows
    columns = [np.array([end[k] for end in ends], np.float64) for k in (1, 2)]
    return Measured(outcome, tuple(end[0] for end in ends), columns[0], columns[1])
