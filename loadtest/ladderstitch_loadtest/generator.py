"""Open-loop load from several processes: requests leave when due, answered or not.

Latency counts from the time a request was due, so a stall of the generator shows in the figures
instead of hiding in them (coordinated omission); the generator says when it is the bottleneck.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.outcome import Outcome
from ladderstitch_loadtest.targets import Answer, Target
from ladderstitch_loadtest.traces import Trace

START_S = 0.5
"""Time for the processes to connect before the first request is due."""
SPIN_S = 0.0012
"""The event loop sleeps in whole milliseconds; the rest of a wait is spent turning it."""
LATE_SHARE = 0.1
"""Part of the shortest budget that the generator may be late by at its 99th percentile."""

End = tuple[str, float, float, Answer | None]
"""Status, seconds from due to answer, seconds that it left late, what the server said."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A real run: the outcome by the server's clock, and what the generator saw, [N] each.

    A server that does not say how long it took is judged by the caller's clock.
    """

    outcome: Outcome
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
    context = multiprocessing.get_context("forkserver")
    messages = [target.message(c.budget_s) for c in trace.classes]
    start = context.Value("d", 0.0)
    ready = context.Barrier(processes + 1)
    parts = []
    for k in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        plan = (trace.arrivals_s[k::processes].tolist(), trace.picks[k::processes].tolist())
        cpu = None if cpus is None else cpus[k % len(cpus)]
        process = context.Process(
            target=_work, args=(theirs, ready, start, address, target, messages, plan, cpu)
        )
        process.start()
        theirs.close()
        parts.append((process, ours))
    ready.wait(timeout=60)
    start.value = time.monotonic() + START_S
    ready.wait(timeout=60)
    ends: list[End | None] = [None] * len(trace)
    for k, (process, pipe) in enumerate(parts):
        ends[k::processes] = pipe.recv()
        process.join()
    return _measured(trace, [end for end in ends if end is not None])


def _work(pipe, ready, start, address, target, messages, plan, cpu) -> None:  # type: ignore[no-untyped-def] # what multiprocessing hands over has no public types
    """One process: connect, wait for the others, send, report."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    gc.freeze()
    pipe.send(asyncio.run(_send_all(ready, start, address, target, messages, plan)))
    pipe.close()


async def _send_all(ready, start, address, target, messages, plan) -> list[End]:  # type: ignore[no-untyped-def] # as above
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        call = channel.unary_unary(target.method)

        async def one(due: float, message: bytes) -> End:
            lag = time.monotonic() - due
            try:
                answer = await call(message)
            except grpc.aio.AioRpcError as error:
                return error.code().name, time.monotonic() - due, lag, None
            took = time.monotonic() - due
            return "OK", took, lag, target.read(answer)

        ready.wait(timeout=60)
        ready.wait(timeout=60)
        begin, tasks = start.value, []
        for at, pick in zip(*plan, strict=True):
            due = begin + at
            while (delay := due - time.monotonic()) > 0:  # noqa: ASYNC110 # time is the event
                await asyncio.sleep(max(0.0, delay - SPIN_S))
            tasks.append(asyncio.create_task(one(due, messages[pick])))
        return await asyncio.gather(*tasks)


def _measured(trace: Trace, ends: list[End]) -> Measured:
    outcome = Outcome.unanswered(trace)
    for i, (_, client_s, _, answer) in enumerate(ends):
        if answer is None:
            continue
        outcome.total_s[i] = client_s if np.isnan(answer.total_s) else answer.total_s
        outcome.queue_s[i], outcome.compute_s[i] = answer.queue_s, answer.compute_s
        outcome.stitch[i], outcome.quality[i] = answer.stitch, answer.quality
        outcome.rows[i] = answer.rows
    columns = [np.array([end[k] for end in ends], np.float64) for k in (1, 2)]
    return Measured(outcome, tuple(end[0] for end in ends), columns[0], columns[1])
