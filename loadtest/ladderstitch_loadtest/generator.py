"""Open-loop load from several processes: requests leave when due, answered or not.

Latency counts from the time a request was due, so a stall of the generator shows in the figures
instead of hiding in them (coordinated omission); the generator says when it is the bottleneck.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
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

CONNECT_S = 30.0
READY = b"ready\n"

End = tuple[str, float, float, Answer | None]
"""Status, seconds from due to answer, seconds that it left late, what the server said."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One process's part: when each request is due, which message it sends; `cpu` to stay on."""

    address: str
    target: Target
    messages: list[bytes]
    due_s: list[float]
    picks: list[int]
    cpu: int | None


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
    messages = [target.message(c.budget_s) for c in trace.classes]
    workers = []
    for k in range(processes):
        due_s, picks = trace.arrivals_s[k::processes].tolist(), trace.picks[k::processes].tolist()
        cpu = None if cpus is None else cpus[k % len(cpus)]
        workers.append(_start(Plan(address, target, messages, due_s, picks, cpu)))
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != READY:
                raise RuntimeError(f"a generator did not reach {address}; its message is above")
        start = time.monotonic() + START_S
        ends: list[End | None] = [None] * len(trace)
        for worker in workers:
            _tell(worker, f"{start}\n".encode())
        for k, worker in enumerate(workers):
            assert worker.stdout is not None
            ends[k::processes] = pickle.load(worker.stdout)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return _measured(trace, [end for end in ends if end is not None])


def _start(plan: Plan) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ladderstitch_loadtest.generator"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _tell(worker, pickle.dumps(plan))
    return worker


def _tell(worker: subprocess.Popen[bytes], message: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(message)
    worker.stdin.flush()


async def send_all(plan: Plan, begin: Callable[[], float]) -> list[End]:
    """Connect, ask when to begin, send; the ends in order of the plan."""
    async with grpc.aio.insecure_channel(plan.address) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_S)
        call = channel.unary_unary(plan.target.method)

        async def one(due: float, message: bytes) -> End:
            lag = time.monotonic() - due
            try:
                answer = await call(message)
            except grpc.aio.AioRpcError as error:
                return error.code().name, time.monotonic() - due, lag, None
            took = time.monotonic() - due
            return "OK", took, lag, plan.target.read(answer)

        start, tasks = begin(), []
        for at, pick in zip(plan.due_s, plan.picks, strict=True):
            due = start + at
            while (delay := due - time.monotonic()) > 0:  # noqa: ASYNC110 # time is the event
                await asyncio.sleep(max(0.0, delay - SPIN_S))
            tasks.append(asyncio.create_task(one(due, plan.messages[pick])))
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


def main() -> None:
    """A worker: a plan on standard input, its ends on standard output."""
    plan: Plan = pickle.load(sys.stdin.buffer)
    if plan.cpu is not None:
        os.sched_setaffinity(0, {plan.cpu})
    gc.freeze()

    def begin() -> float:
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        return float(sys.stdin.buffer.readline())

    ends = asyncio.run(send_all(plan, begin))
    sys.stdout.buffer.write(pickle.dumps(ends))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    # Under its importable name, so that what is pickled here can be read by the one who asked.
    importlib.import_module("ladderstitch_loadtest.generator").main()
