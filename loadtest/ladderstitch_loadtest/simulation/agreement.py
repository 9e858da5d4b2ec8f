"""The agreement of the simulator with a real server, on the same policies and traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

import numpy as np

from ladderstitch.client import AsyncClient
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch_loadtest.benchmarks.mixed import rotate, set_policy
from ladderstitch_loadtest.load import traces
from ladderstitch_loadtest.load.image_load import LoadRun, measure
from ladderstitch_loadtest.load.targets import Target
from ladderstitch_loadtest.load.traces import BudgetClass, Times, Trace
from ladderstitch_loadtest.simulation.policy_sweep import policy_settings
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.simulator import Machine, simulate

MIXED = (BudgetClass("tight", 0.008, 0.3), BudgetClass("relaxed", 0.04, 0.7))
SHARED = (BudgetClass("shared", 0.02),)
CALIBRATION_SEED = 999


@dataclass(frozen=True, slots=True)
class AgreementPair:
    """The real server's figures and the simulator's on one trace: medians over the rounds."""

    trace: str
    policy: str
    attainment: float
    simulated_attainment: float
    effective_quality: float
    simulated_quality: float
    lag_p99_ms: float
    """How late the load generator sent requests, at the 99th percentile."""

    @property
    def attainment_error(self) -> float:
        """Simulated minus real attainment, in points."""
        return 100 * (self.simulated_attainment - self.attainment)

    @property
    def quality_error(self) -> float:
        """Simulated minus real effective quality, in points."""
        return 100 * (self.simulated_quality - self.effective_quality)


@dataclass(slots=True)
class Agreement:
    """All pairs, and the calibration of the simulator's machine."""

    rate: float
    """Mean requests per second."""
    rounds: int
    seconds: float
    """Length of each run."""
    slowdown: float
    """Seconds of the real server over the family's profile."""
    dispatch_overhead_ms: float
    pairs: list[AgreementPair] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Return the measurement as JSON values."""
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


def draw_traces(rate: float, seconds: float, seed: int) -> list[Trace]:
    """Return the traces of a seed; their names are the same for every seed."""
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
    """Return the figures of policies on a real server and in the simulator.

    The policies take turns on the same arrivals, in `rounds` rounds with new arrivals each. Before,
    a run on arrivals of its own calibrates the simulator's machine. `advance` is called with what
    runs next.
    """
    runs: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    async with AsyncClient(address) as client:
        await set_policy(client, "adaptive")
        advance("calibrating")
        trace = draw_traces(rate, seconds, CALIBRATION_SEED)[1]
        machine_family, machine = calibrate(family, measure(address, target, trace, cpus=cpus))
        for seed in range(rounds):
            for trace in draw_traces(rate, seconds, seed):
                for policy in rotate(policies, seed):
                    advance(f"{trace.name}, {policy}")
                    await set_policy(client, policy)
                    real = measure(address, target, trace, cpus=cpus)
                    simulated = _simulate(machine_family, machine, trace, policy, seed)
                    figures = _pair_figures(real, simulated)
                    runs.setdefault((trace.name, policy), []).append(figures)
        await set_policy(client, "adaptive")
    slowdown = machine_family.profile.alone_s(0) / family.profile.alone_s(0)
    overhead_ms = round(1e3 * machine.dispatch_overhead_s, 3)
    pairs = [_median_pair(*key, results) for key, results in runs.items()]
    return Agreement(rate, rounds, seconds, round(slowdown, 3), overhead_ms, pairs)


def _median_pair(trace: str, policy: str, results: list[tuple[float, ...]]) -> AgreementPair:
    medians = [round(median(column), 5) for column in zip(*results, strict=True)]
    return AgreementPair(trace, policy, *medians)


def calibrate(family: Family, run: LoadRun) -> tuple[Family, Machine]:
    """Return a family and a machine whose batches take as long as those of a real run."""
    outcome = run.outcome
    answered = [i for i, variant in enumerate(outcome.variant) if variant >= 0]
    ratios = [
        _profile_ratio(family, outcome.variant[i], outcome.batch_size[i], outcome.compute_s[i])
        for i in answered
    ]
    dispatch_overhead_s = median(
        outcome.total_s[i] - outcome.queue_s[i] - outcome.compute_s[i] for i in answered
    )
    return fit_machine(family, ratios, dispatch_overhead_s)


def fit_machine(
    family: Family, ratios: Sequence[float], dispatch_overhead_s: float
) -> tuple[Family, Machine]:
    """Return a family whose batches take `ratios` of its profile, and a machine for it."""
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


def _profile_ratio(family: Family, variant: int, batch_size: int, seconds: float) -> float:
    """Return the seconds of a batch over those of the profile."""
    profile = family.profile
    median_s = profile.variants[variant].median_s
    return seconds / float(np.interp(batch_size, profile.batch_sizes, median_s))


def _simulate(
    family: Family, machine: Machine, trace: Trace, policy: str, seed: int
) -> tuple[float, float]:
    """Return simulated attainment and effective quality."""
    settings = policy_settings(policy).model_copy(update={"overhead_s": 0.0005})
    summary = simulate(family, trace, settings, machine, seed=seed).summary()
    return summary.attainment, summary.effective_quality


def _pair_figures(real: LoadRun, simulated: tuple[float, float]) -> tuple[float, ...]:
    """Return the figures of an `AgreementPair` in its order."""
    summary = real.outcome.summary()
    return (
        summary.attainment,
        simulated[0],
        summary.effective_quality,
        simulated[1],
        1e3 * real.lag_p99_s,
    )
