"""Policies on the real server, and whether the simulator says the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TypeVar

import numpy as np

from ladderstitch.client import AsyncClient
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch_loadtest.benchmarks.mixed import choose
from ladderstitch_loadtest.load import traces
from ladderstitch_loadtest.load.generator import Measured, measure
from ladderstitch_loadtest.load.targets import Target
from ladderstitch_loadtest.load.traces import BudgetClass, Times, Trace
from ladderstitch_loadtest.simulation.policy_sweep import settings_of
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.simulator import Machine, simulate

MIXED = (BudgetClass("tight", 0.008, 0.3), BudgetClass("relaxed", 0.04, 0.7))
SHARED = (BudgetClass("shared", 0.02),)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pair:
    """Medians over the rounds: the real server's figure and the simulator's."""

    trace: str
    policy: str
    attainment: float
    simulated_attainment: float
    effective_quality: float
    simulated_quality: float
    lag_p99_ms: float

    @property
    def attainment_error(self) -> float:
        """In points."""
        return 100 * (self.simulated_attainment - self.attainment)

    @property
    def quality_error(self) -> float:
        """In points."""
        return 100 * (self.simulated_quality - self.effective_quality)


@dataclass(slots=True)
class Agreement:
    """The whole measurement; `slowdown`, `transit_ms` and `spread` are the simulator's machine."""

    rate: float
    rounds: int
    seconds: float
    slowdown: float
    transit_ms: float
    pairs: list[Pair] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {
            "errors": [
                {
                    "trace": p.trace,
                    "policy": p.policy,
                    "attainment": round(p.attainment_error, 2),
                    "quality": round(p.quality_error, 2),
                }
                for p in self.pairs
            ]
        }


def plans(rate: float, seconds: float, seed: int) -> list[Trace]:
    """The traces, by name the same for every seed."""
    rng = np.random.default_rng(seed)
    named: list[tuple[str, Times, Sequence[BudgetClass]]] = [
        ("Poisson, shared", traces.poisson(rate, seconds, rng), SHARED),
        ("Poisson, mixed", traces.poisson(rate, seconds, rng), MIXED),
        ("CV² 4, mixed", traces.gamma(rate, 4.0, seconds, rng), MIXED),
        ("ramp, mixed", traces.ramp(rate / 4, 7 * rate / 4, seconds, rng), MIXED),
        (
            "step, shared",
            traces.step(rate / 2, 2 * rate, seconds / 3, 2 * seconds / 3, seconds, rng),
            SHARED,
        ),
    ]
    return [Trace.draw(name, times, classes, rng) for name, times, classes in named]


async def compare_with_simulator(
    address: str,
    target: Target,
    family: Family,
    *,
    policies: Sequence[str],
    rate: float,
    seconds: float,
    rounds: int,
    cpus: Sequence[int] | None,
    advance: Callable[[str], None],
) -> Agreement:
    """Policies take turns on the same arrivals, `rounds` times, each round on fresh ones.

    The simulator's machine is calibrated by one run before, on arrivals of its own.
    """
    async with AsyncClient(address) as client:
        await choose(client, "adaptive")
        advance("calibrating")
        before = measure(address, target, plans(rate, seconds, seed=999)[1], cpus=cpus)
        machine_family, machine = calibrate(family, before)
        slowdown = machine_family.profile.alone_s(0) / family.profile.alone_s(0)
        found = Agreement(
            rate, rounds, seconds, round(slowdown, 3), round(1e3 * machine.dispatch_overhead_s, 3)
        )
        runs: dict[tuple[str, str], list[tuple[float, float, float, float, float]]] = {}
        for seed in range(rounds):
            for trace in plans(rate, seconds, seed):
                for policy in _rotated(policies, seed):
                    advance(f"{trace.name}, {policy}")
                    await choose(client, policy)
                    real = measure(address, target, trace, cpus=cpus)
                    mine, theirs = (
                        real.outcome.summary(),
                        _simulated(machine_family, machine, trace, policy, seed),
                    )
                    runs.setdefault((trace.name, policy), []).append(
                        (
                            mine.attainment,
                            theirs[0],
                            mine.effective_quality,
                            theirs[1],
                            1e3 * real.lag_p99_s,
                        )
                    )
        await choose(client, "adaptive")
    for (name, policy), ends in runs.items():
        middles = [round(median(column), 5) for column in zip(*ends, strict=True)]
        found.pairs.append(Pair(name, policy, *middles))
    return found


def calibrate(family: Family, run: Measured) -> tuple[Family, Machine]:
    """A family and machine whose batches take as long as a real run's did."""
    outcome = run.outcome
    answered = [i for i, variant in enumerate(outcome.variant) if variant >= 0]
    ratios = [
        _ratio(family, outcome.variant[i], outcome.rows[i], outcome.compute_s[i]) for i in answered
    ]
    transit = median(
        outcome.total_s[i] - outcome.queue_s[i] - outcome.compute_s[i] for i in answered
    )
    return fitted(family, ratios, transit)


def fitted(
    family: Family, ratios: Sequence[float], dispatch_overhead_s: float
) -> tuple[Family, Machine]:
    """A family that takes `ratios` of its profile, and a machine with so much besides."""
    middle, high = np.quantile(ratios, [0.5, 0.99]).tolist()
    variants = {
        variant: Latency(
            median_s=tuple(s * middle for s in latency.median_s),
            p99_s=tuple(s * high for s in latency.median_s),
        )
        for variant, latency in family.profile.variants.items()
    }
    profile: LatencyProfile = family.profile.model_copy(update={"variants": variants})
    return Family(family.name, family.quality, profile), Machine(
        dispatch_overhead_s=dispatch_overhead_s
    )


def _ratio(family: Family, variant: int, rows: int, seconds: float) -> float:
    profile = family.profile
    return seconds / float(np.interp(rows, profile.batch_sizes, profile.variants[variant].median_s))


def _simulated(
    family: Family, machine: Machine, trace: Trace, policy: str, seed: int
) -> tuple[float, float]:
    settings = settings_of(policy).model_copy(update={"overhead_s": 0.0005})
    summary = simulate(family, trace, settings, machine, seed=seed).summary()
    return summary.attainment, summary.effective_quality


def _rotated(names: Sequence[T], turn: int) -> list[T]:
    cut = turn % len(names)
    return [*names[cut:], *names[:cut]]
