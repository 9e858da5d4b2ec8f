"""The policy laboratory: every policy on every trace, paired by seed, beside the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np
from scipy import stats

from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch_loadtest.simulation.oracle import oracle
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.scenarios import Scenario
from ladderstitch_loadtest.simulation.simulator import Machine, simulate

POLICIES = ("adaptive", "slackfit", "max_batch", "max_quality", "model_switching")
ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Figure:
    """One policy on one scenario: means over the seeds.

    `behind` is adaptive's effective quality less this policy's, in points, with the half width of
    its 95 % interval over the paired seeds.
    """

    policy: str
    attainment: float
    effective_quality: float
    by_class: dict[str, float]
    behind: float
    behind_half_width: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All policies on one scenario, the best first."""

    family: str
    scenario: str
    mixed: bool
    replicas: int
    seeds: int
    figures: list[Figure]

    def figure(self, policy: str) -> Figure:
        return next(figure for figure in self.figures if figure.policy == policy)

    @property
    def margin(self) -> float:
        """Points of effective quality that adaptive is ahead of the best other policy."""
        return min(f.behind for f in self.figures if f.policy not in ("adaptive", ORACLE))

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"margin": self.margin}


@dataclass(frozen=True, slots=True)
class SweepRun:
    """What one process does at a time; the result is (attainment, quality, by class)."""

    family: Family
    scenario: Scenario
    policy: str
    seed: int

    def __call__(self) -> tuple[float, float, dict[str, float]]:
        trace = self.scenario.trace(self.family, self.seed)
        if self.policy == ORACLE:
            best = oracle(self.family, trace)
            return best.attainment, best.effective_quality, {}
        machine = Machine(replicas=self.scenario.replicas, spread=self.scenario.spread)
        got = simulate(self.family, trace, settings_of(self.policy), machine, seed=self.seed)
        summary = got.summary()
        by_class = {c.name: c.attainment for c in summary.classes}
        return summary.attainment, summary.effective_quality, by_class


def settings_of(policy: str) -> SchedulerSettings:
    """`slackfit` and so on, or `fixed N`; nothing is reserved for writing answers."""
    name, _, variant = policy.partition(" ")
    fields = {"policy": name, "fixed_variant": int(variant) if variant else None, "overhead_s": 0.0}
    return SchedulerSettings.model_validate(fields | {"queue_limit_requests": 1_000_000})


def compare(
    pairs: Iterable[tuple[Family, Scenario]],
    seeds: int,
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[Comparison]:
    """One comparison after the other; `advance` is told how many runs each took."""
    with ProcessPoolExecutor(workers) as pool:
        waiting = []
        for family, scenario in pairs:
            names = [*POLICIES, *(f"fixed {variant}" for variant in family.frontier)]
            names += [ORACLE] if scenario.short else []
            runs = [
                SweepRun(family, scenario, name, seed) for name in names for seed in range(seeds)
            ]
            futures = [pool.submit(run) for run in runs]
            waiting.append((family, scenario, names, futures))
        for family, scenario, names, futures in waiting:
            results = [future.result() for future in futures]
            advance(len(results))
            by_name = {n: results[i * seeds : (i + 1) * seeds] for i, n in enumerate(names)}
            yield _comparison(family, scenario, by_name)


def runs_of(family: Family, scenario: Scenario, seeds: int) -> int:
    """How many runs a comparison takes."""
    return seeds * (len(POLICIES) + len(family.frontier) + scenario.short)


def _comparison(
    family: Family,
    scenario: Scenario,
    results: dict[str, list[tuple[float, float, dict[str, float]]]],
) -> Comparison:
    ours = np.array([quality for _, quality, _ in results["adaptive"]])
    figures = []
    for name, ends in results.items():
        gaps = 100 * (ours - np.array([quality for _, quality, _ in ends]))
        error = float(stats.sem(gaps)) if len(gaps) > 1 else 0.0
        figures.append(
            Figure(
                policy=name,
                attainment=round(fmean(end[0] for end in ends), 5),
                effective_quality=round(fmean(end[1] for end in ends), 5),
                by_class={c: round(fmean(e[2][c] for e in ends), 5) for c in ends[0][2]},
                behind=round(float(gaps.mean()), 3),
                behind_half_width=round(error * float(stats.t.ppf(0.975, len(gaps) - 1)), 3)
                if error
                else 0.0,
            )
        )
    figures.sort(key=lambda figure: -figure.effective_quality)
    seeds = len(ours)
    return Comparison(family.name, scenario.name, scenario.mixed, scenario.replicas, seeds, figures)
