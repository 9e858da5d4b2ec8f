"""A tenfold burst of load: quality should drop instead of attainment, and recover afterwards."""

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
from ladderstitch_loadtest.benchmarks.mixed import rotate, set_policy
from ladderstitch_loadtest.load import traces
from ladderstitch_loadtest.load.image_load import LoadRun, measure
from ladderstitch_loadtest.load.paired import paired_difference
from ladderstitch_loadtest.load.targets import Target
from ladderstitch_loadtest.load.traces import BudgetClass, Trace
from ladderstitch_loadtest.servers.processes import StartedServer, histogram_quantile

BEFORE_S, BURST_S, AFTER_S = 4.0, 2.0, 6.0
BURST_END_S = BEFORE_S + BURST_S
FACTOR = 10.0
CAPACITY_SHARE = 0.6
"""The rate in the burst, as a share of the server's capacity."""
RECOVERY_S = 1.0
"""Time after the burst from which quality counts as recovered."""
CALLERS = 32
EFFECTIVE_QUALITY = 2
"""Position of the effective quality in the figures of one run."""


@dataclass(frozen=True, slots=True)
class BurstRow:
    """One policy: medians over the rounds; a phase's quality is the mean over its answers.

    `behind` is adaptive's effective quality minus this one's in points, the mean over the rounds,
    and `behind_half_width` the half width of its 95 % interval.
    """

    policy: str
    attainment_burst: float
    attainment_all: float
    effective_quality: float
    quality_before: float
    quality_burst: float
    quality_recovered: float
    lag_p99_ms: float
    behind: float
    behind_half_width: float


@dataclass(slots=True)
class BurstResult:
    """The measurement of all policies.

    `capacity_rps` is the rate of answers of the fastest variant to 32 callers in a closed loop.
    `dispatch_p99_ms` is the p99, over the whole run, of the time from a free engine to its next
    batch while requests wait: the upper edge of the histogram's bucket.
    """

    capacity_rps: float
    base_rps: float
    budget_ms: float
    rounds: int
    dispatch_p99_ms: float
    rows: list[BurstRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


async def measure_burst(
    server: StartedServer,
    target: Target,
    *,
    policies: Sequence[str],
    budget_s: float,
    rounds: int,
    cpus: Sequence[int] | None,
    advance: Callable[[str], None],
) -> BurstResult:
    """Measure policies and all fixed frontier variants; they take turns on the same arrivals.

    `cpus` are the CPUs of the generator, and `advance` gets the name of the current step.
    """
    address = server.address
    async with AsyncClient(address) as client:
        model = await client.get_model()
        contenders = [*policies, *(f"fixed {variant}" for variant in model.frontier)]
        runs: dict[str, list[tuple[float, ...]]] = {policy: [] for policy in contenders}
        await set_policy(client, f"fixed {model.frontier[0]}")
        advance("capacity")
        capacity = await _measure_capacity(address, target, budget_s=10.0)
        base = CAPACITY_SHARE * capacity / FACTOR
        for seed in range(rounds):
            trace = _draw_trace(base, budget_s, seed)
            for policy in rotate(contenders, seed):
                advance(policy)
                await set_policy(client, policy)
                runs[policy].append(_figures(measure(address, target, trace, cpus=cpus)))
        await set_policy(client, "adaptive")
    dispatch_s = histogram_quantile(server.read_metrics(), "ladderstitch_turnaround_seconds", 0.99)
    found = BurstResult(round(capacity), round(base, 1), 1e3 * budget_s, rounds, 1e3 * dispatch_s)
    ours = [figures[EFFECTIVE_QUALITY] for figures in runs["adaptive"]]
    for policy, rows in runs.items():
        medians = [round(median(column), 5) for column in zip(*rows, strict=True)]
        behind = paired_difference(ours, [figures[EFFECTIVE_QUALITY] for figures in rows])
        points = (round(100 * value, 3) for value in behind)
        found.rows.append(BurstRow(policy, *medians, *points))
    return found


def _draw_trace(base_rps: float, budget_s: float, seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    times = traces.step(
        base_rps, FACTOR * base_rps, BEFORE_S, BURST_END_S, BURST_END_S + AFTER_S, rng
    )
    return Trace.draw("burst", times, [BudgetClass("burst", budget_s)], rng)


def _figures(run: LoadRun) -> tuple[float, ...]:
    """Return the fields of a `BurstRow` between its policy and the differences."""
    outcome = run.outcome
    at, met, value = outcome.trace.arrivals_s, outcome.met, outcome.value
    quality = np.array(outcome.quality)
    burst = (at >= BEFORE_S) & (at < BURST_END_S)

    def mean_quality(phase: NDArray[np.bool_]) -> float:
        return float(quality[phase & (quality > 0)].mean())

    return (
        float(met[burst].mean()),
        float(met.mean()),
        float(value.mean()),
        mean_quality(at < BEFORE_S),
        mean_quality(burst),
        mean_quality(at >= BURST_END_S + RECOVERY_S),
        1e3 * run.lag_p99_s,
    )


async def _measure_capacity(
    address: str, target: Target, budget_s: float, seconds: float = 2.0
) -> float:
    """Return the answers/s to 32 callers that each have one call in flight."""
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
