"""The policy sweep: every policy on every scenario, paired by seed and compared with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import fmean

from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch_loadtest.load.paired import paired_difference
from ladderstitch_loadtest.simulation.oracle import oracle
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.scenarios import Scenario
from ladderstitch_loadtest.simulation.simulator import Machine, simulate

POLICIES = ("adaptive", "slackfit", "max_batch", "max_quality", "model_switching")
ORACLE = "oracle"

RunResult = tuple[float, float, dict[str, float]]
"""Attainment, effective quality, attainment by budget class."""


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """The figures of one policy on one scenario: means over the seeds."""

    policy: str
    attainment: float
    effective_quality: float
    by_class: dict[str, float]
    """Attainment by budget class."""
    behind: float
    """Effective quality of `adaptive` minus that of this policy, in points."""
    behind_half_width: float
    """Half width of the 95 % interval of `behind` over the paired seeds."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All policies on one scenario, the best policy first."""

    family: str
    scenario: str
    mixed: bool
    replicas: int
    seeds: int
    figures: list[PolicyFigures]

    def figures_of(self, policy: str) -> PolicyFigures:
        """Return the figures of one policy."""
        return next(figures for figures in self.figures if figures.policy == policy)

    @property
    def margin(self) -> float:
        """Points of effective quality by which `adaptive` is ahead of the best other policy."""
        return min(f.behind for f in self.figures if f.policy not in ("adaptive", ORACLE))

    def to_dict(self) -> dict[str, object]:
        """Return the comparison as JSON values."""
        return asdict(self) | {"margin": self.margin}


@dataclass(frozen=True, slots=True)
class SweepRun:
    """The unit of work of one process: one policy on one scenario with one seed."""

    family: Family
    scenario: Scenario
    policy: str
    seed: int

    def __call__(self) -> RunResult:
        """Return the result of the run."""
        trace = self.scenario.trace(self.family, self.seed)
        if self.policy == ORACLE:
            best = oracle(self.family, trace)
            return best.attainment, best.effective_quality, {}
        machine = Machine(replicas=self.scenario.replicas, spread=self.scenario.spread)
        settings = policy_settings(self.policy)
        summary = simulate(self.family, trace, settings, machine, seed=self.seed).summary()
        by_class = {c.name: c.attainment for c in summary.classes}
        return summary.attainment, summary.effective_quality, by_class


def policy_settings(policy: str) -> SchedulerSettings:
    """Return settings for a policy's name or `fixed N`, without overhead and queue limits."""
    name, _, variant = policy.partition(" ")
    fields = {"policy": name, "fixed_variant": int(variant) if variant else None, "overhead_s": 0.0}
    return SchedulerSettings.model_validate(fields | {"queue_limit_requests": 1_000_000})


def sweep_policies(
    pairs: Iterable[tuple[Family, Scenario]],
    seeds: int,
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[Comparison]:
    """Yield the comparison of each pair in order.

    The runs are spread over `workers` processes. `advance` is called with the number of runs of
    each comparison.
    """
    with ProcessPoolExecutor(workers) as pool:
        waiting = [
            (family, scenario, _submit_runs(pool, family, scenario, seeds))
            for family, scenario in pairs
        ]
        for family, scenario, futures in waiting:
            results = {name: [run.result() for run in runs] for name, runs in futures.items()}
            advance(seeds * len(results))
            yield _compare(family, scenario, results)


def _submit_runs(
    pool: ProcessPoolExecutor, family: Family, scenario: Scenario, seeds: int
) -> dict[str, list[Future[RunResult]]]:
    """Return the runs of each contender, one for each seed."""
    return {
        name: [pool.submit(SweepRun(family, scenario, name, seed)) for seed in range(seeds)]
        for name in _contenders(family, scenario)
    }


def count_runs(family: Family, scenario: Scenario, seeds: int) -> int:
    """Return the number of runs of one comparison."""
    return seeds * len(_contenders(family, scenario))


def _contenders(family: Family, scenario: Scenario) -> list[str]:
    """Return all policies, every fixed variant on the frontier, and for short traces the oracle."""
    names = [*POLICIES, *(f"fixed {variant}" for variant in family.frontier)]
    return [*names, ORACLE] if scenario.short else names


def _compare(family: Family, scenario: Scenario, results: dict[str, list[RunResult]]) -> Comparison:
    ours = [quality for _, quality, _ in results["adaptive"]]
    figures = [_policy_figures(name, ends, ours) for name, ends in results.items()]
    figures.sort(key=lambda one: -one.effective_quality)
    seeds = len(ours)
    return Comparison(family.name, scenario.name, scenario.mixed, scenario.replicas, seeds, figures)


def _policy_figures(policy: str, results: list[RunResult], ours: Sequence[float]) -> PolicyFigures:
    behind, half_width = paired_difference(ours, [quality for _, quality, _ in results])
    return PolicyFigures(
        policy=policy,
        attainment=round(fmean(result[0] for result in results), 5),
        effective_quality=round(fmean(result[1] for result in results), 5),
        by_class={c: round(fmean(r[2][c] for r in results), 5) for c in results[0][2]},
        behind=round(100 * behind, 3),
        behind_half_width=round(100 * half_width, 3),
    )
