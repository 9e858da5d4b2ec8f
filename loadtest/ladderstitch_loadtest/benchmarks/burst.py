"""A tenfold burst: quality is to give way instead of attainment, and to come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

import grpc
import numpy as np
from numpy.typing import NDArray

from ladderstitch.client import AsyncClient
from ladderstitch_loadtest.benchmarks.mixed import choose
from ladderstitch_loadtest.load import traces
from ladderstitch_loadtest.load.generator import Measured, measure
from ladderstitch_loadtest.load.targets import Target
from ladderstitch_loadtest.load.traces import BudgetClass, Trace
from ladderstitch_loadtest.servers.processes import Served, histogram_quantile

BEFORE_S, BURST_S, AFTER_S = 2.0, 2.0, 3.0
FACTOR = 10.0
SHARE = 0.8
"""Of capacity, in the burst."""
RECOVERY_S = 1.0
CALLERS = 32


@dataclass(frozen=True, slots=True)
class BurstRow:
    """One policy, medians over the rounds; quality is the mean of answers in a phase."""

    policy: str
    attainment_burst: float
    attainment_all: float
    effective_quality: float
    quality_before: float
    quality_burst: float
    quality_recovered: float
    lag_p99_ms: float


@dataclass(slots=True)
class Burst:
    """`capacity_rps` is what the server answers on its fastest variant to 32 callers.

    `dispatch_p99_ms`: from a free engine to its next batch while requests wait, over the whole run;
    the upper edge of the histogram's bucket.
    """

    capacity_rps: float
    base_rps: float
    budget_ms: float
    rounds: int
    dispatch_p99_ms: float
    rows: list[BurstRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


async def measure_burst(
    server: Served,
    target: Target,
    *,
    policies: Sequence[str],
    budget_s: float,
    rounds: int,
    cpus: Sequence[int] | None,
    advance: Callable[[str], None],
) -> Burst:
    """Policies take turns on the same arrivals."""
    address = server.address
    runs: dict[str, list[tuple[float, ...]]] = {policy: [] for policy in policies}
    budget = BudgetClass("burst", budget_s)
    async with AsyncClient(address) as client:
        model = await client.get_model()
        await choose(client, f"fixed {model.frontier[0]}")
        advance("capacity")
        capacity = await _capacity(address, target, budget_s=10.0)
        base = SHARE * capacity / FACTOR
        for seed in range(rounds):
            rng = np.random.default_rng(seed)
            end = BEFORE_S + BURST_S
            times = traces.step(base, FACTOR * base, BEFORE_S, end, end + AFTER_S, rng)
            trace = Trace.draw("burst", times, [budget], rng)
            for policy in policies:
                advance(policy)
                await choose(client, policy)
                runs[policy].append(_figures(measure(address, target, trace, cpus=cpus)))
        await choose(client, "adaptive")
    dispatch_s = histogram_quantile(server.page(), "ladderstitch_turnaround_seconds", 0.99)
    found = Burst(round(capacity), round(base, 1), 1e3 * budget_s, rounds, 1e3 * dispatch_s)
    for policy, rows in runs.items():
        middles = [round(median(column), 5) for column in zip(*rows, strict=True)]
        found.rows.append(BurstRow(policy, *middles))
    return found


def _figures(run: Measured) -> tuple[float, ...]:
    outcome = run.outcome
    at, met, value = outcome.trace.arrivals_s, outcome.met, outcome.value
    quality = np.array(outcome.quality)
    answered = quality > 0
    end = BEFORE_S + BURST_S
    burst = (at >= BEFORE_S) & (at < end)

    def mean_quality(phase: NDArray[np.bool_]) -> float:
        return float(quality[phase & answered].mean())

    return (
        float(met[burst].mean()),
        float(met.mean()),
        float(value.mean()),
        mean_quality(at < BEFORE_S),
        mean_quality(burst),
        mean_quality(at >= end + RECOVERY_S),
        1e3 * run.lag_p99_s,
    )


async def _capacity(address: str, target: Target, budget_s: float, seconds: float = 2.0) -> float:
    """Answers a second to callers that each wait for their answer."""
    message, done = target.message(budget_s), 0
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(target.method)
        stop = time.monotonic() + seconds

        async def caller() -> None:
            nonlocal done
            while time.monotonic() < stop:
                await call(message)
                done += 1

        started = time.monotonic()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return done / (time.monotonic() - started)
