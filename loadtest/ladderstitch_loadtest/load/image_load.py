"""Image load from several worker processes, and the outcome of every request.

Any server of a `Target` can be loaded, at rates that one process could not send. A run reports
whether the generator was the bottleneck.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.load.outcome import LoadOutcome
from ladderstitch_loadtest.load.pacing import TimedReply, due_times, send_timed
from ladderstitch_loadtest.load.targets import Target, TargetReply
from ladderstitch_loadtest.load.traces import Trace
from ladderstitch_loadtest.load.workers import (
    SPIN_S,
    WaitForStart,
    merge_in_turn,
    run_workers,
    wait_until_connected,
)

MAX_LAG_SHARE = 0.1
"""Lag of the generator at p99, as a share of the shortest budget, above which a run is late."""

RequestResult = TimedReply[TargetReply]


@dataclass(frozen=True, slots=True)
class ImageLoad:
    """One worker's images: when each is due, and which of the messages it sends.

    `due_s` counts from the start; `picks` are indices of `messages`; `cpu` is the CPU to stay on.
    """

    address: str
    target: Target
    messages: list[bytes]
    due_s: list[float]
    picks: list[int]
    cpu: int | None

    async def send(self, wait_for_start: WaitForStart) -> list[RequestResult]:
        """Connect, wait for the start, send, and return the results in order of the plan."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            await wait_until_connected(channel)
            call = channel.unary_unary(self.target.method)
            messages = (self.messages[pick] for pick in self.picks)
            tasks = [
                asyncio.create_task(send_timed(call, next(messages), due, self.target.parse))
                async for due in due_times(wait_for_start(), self.due_s, spin_s=SPIN_S)
            ]
            return await asyncio.gather(*tasks)


@dataclass(frozen=True, slots=True)
class LoadRun:
    """A run on a real server: the outcome by the server's clock, and the generator's view, [N].

    A server that does not report how long it took is judged by the caller's clock.
    """

    outcome: LoadOutcome
    codes: tuple[str, ...]
    client_s: NDArray[np.float64]
    lag_s: NDArray[np.float64]

    @property
    def late(self) -> bool:
        """Whether the generator was the bottleneck."""
        shortest_s = min(one.budget_s for one in self.outcome.trace.classes)
        return self.lag_p99_s > MAX_LAG_SHARE * shortest_s

    @property
    def late_s(self) -> float | None:
        """The lag at p99 in seconds if the generator was the bottleneck; None if it was not."""
        return self.lag_p99_s if self.late else None

    @property
    def lag_p99_s(self) -> float:
        """The p99 of the seconds by which requests were sent late."""
        return float(np.quantile(self.lag_s, 0.99))

    def statuses(self) -> dict[str, int]:
        """Return the number of requests that ended with each status."""
        return dict(Counter(self.codes))


def measure(
    address: str,
    target: Target,
    trace: Trace,
    *,
    processes: int = 1,
    cpus: Sequence[int] | None = None,
) -> LoadRun:
    """Send a trace to a server, its requests dealt to `processes` workers in turn.

    `cpus` are the CPUs that the workers stay on; None: any. Raises `RuntimeError` if a worker does
    not connect.
    """
    messages = [target.message(one.budget_s) for one in trace.classes]
    loads = []
    for k in range(processes):
        due_s, picks = trace.arrivals_s[k::processes].tolist(), trace.picks[k::processes].tolist()
        cpu = None if cpus is None else cpus[k % len(cpus)]
        loads.append(ImageLoad(address, target, messages, due_s, picks, cpu))
    return _combine(trace, merge_in_turn(run_workers(loads)))


def _combine(trace: Trace, results: list[RequestResult]) -> LoadRun:
    outcome = LoadOutcome.unanswered(trace)
    for i, result in enumerate(results):
        reply = result.reply
        if reply is None:
            continue
        outcome.total_s[i] = result.took_s if np.isnan(reply.total_s) else reply.total_s
        outcome.queue_s[i], outcome.compute_s[i] = reply.queue_s, reply.compute_s
        outcome.variant[i], outcome.quality[i] = reply.variant, reply.quality
        outcome.batch_size[i] = reply.batch_size
    client_s = np.array([result.took_s for result in results], np.float64)
    lag_s = np.array([result.lag_s for result in results], np.float64)
    return LoadRun(outcome, tuple(result.code for result in results), client_s, lag_s)
