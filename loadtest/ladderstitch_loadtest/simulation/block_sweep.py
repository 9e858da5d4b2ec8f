"""What mixed batches, late binding and preemption gain over one variant for a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import fmean

from ladderstitch.scheduling.requests import Deadlines, Request
from ladderstitch_loadtest.load.paired import paired_difference
from ladderstitch_loadtest.simulation.block_routes import BlockRoutes
from ladderstitch_loadtest.simulation.block_simulator import BlockOptions, BlockSimulation
from ladderstitch_loadtest.simulation.policy_sweep import policy_settings
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.scenarios import Scenario
from ladderstitch_loadtest.simulation.simulator import ONE_IMAGE

OPTIONS = {
    "whole batches": BlockOptions(),
    "mixed": BlockOptions(mixed=True),
    "late binding": BlockOptions(late_binding=True),
    "preemption": BlockOptions(preemption=True),
    "all three": BlockOptions(mixed=True, late_binding=True, preemption=True),
}
"""The engines that are compared; the first one is what the server has."""
LOADS = (0.3, 0.75, 1.0)
CV2_VALUES = (1.0, 8.0)


@dataclass(frozen=True, slots=True)
class BlockGain:
    """The figures of one engine on one scenario; gains are in points, over whole batches."""

    family: str
    scenario: str
    engine: str
    seeds: int
    effective_quality: float
    attainment: float
    quality_gain: float
    quality_half_width: float
    attainment_gain: float
    attainment_half_width: float

    def to_dict(self) -> dict[str, object]:
        """Return the figures as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BlockRun:
    """The unit of work of one process: one engine on one scenario with one seed."""

    family: Family
    routes: BlockRoutes
    scenario: Scenario
    options: BlockOptions
    seed: int

    def __call__(self) -> tuple[float, float]:
        """Return effective quality and attainment."""
        trace = self.scenario.trace(self.family, self.seed)
        settings = policy_settings("adaptive")
        simulation = BlockSimulation(self.family, self.routes, settings, self.options)
        image = Request("", ONE_IMAGE, 0.0, Deadlines())
        summary = simulation.run(trace, image).summary()
        return summary.effective_quality, summary.attainment


def block_scenarios(requests: int) -> list[Scenario]:
    """Return the scenarios with mixed budgets, each of `requests` requests on one engine."""
    return [
        Scenario("gamma", load, cv2, mixed=True, spread=0.0, requests=requests)
        for load in LOADS
        for cv2 in CV2_VALUES
    ]


def sweep_blocks(
    pairs: Sequence[tuple[Family, BlockRoutes]],
    scenarios: Sequence[Scenario],
    seeds: int,
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[BlockGain]:
    """Yield the figures of each engine for each family and scenario, paired by seed."""
    with ProcessPoolExecutor(workers) as pool:
        waiting: list[tuple[Family, Scenario, dict[str, list[Future[tuple[float, float]]]]]] = [
            (
                family,
                scenario,
                {
                    name: [
                        pool.submit(BlockRun(family, routes, scenario, options, seed))
                        for seed in range(seeds)
                    ]
                    for name, options in OPTIONS.items()
                },
            )
            for family, routes in pairs
            for scenario in scenarios
        ]
        for family, scenario, futures in waiting:
            results = {name: [run.result() for run in runs] for name, runs in futures.items()}
            advance(seeds * len(results))
            base = next(iter(results.values()))
            for name, ends in results.items():
                yield _gain(family, scenario, name, ends, base)


def _gain(
    family: Family,
    scenario: Scenario,
    engine: str,
    ends: Sequence[tuple[float, float]],
    base: Sequence[tuple[float, float]],
) -> BlockGain:
    quality, met = ([end[i] for end in ends] for i in (0, 1))
    gains = [
        round(100 * figure, 3)
        for i, values in enumerate((quality, met))
        for figure in paired_difference(values, [end[i] for end in base])
    ]
    return BlockGain(
        family.name,
        scenario.name,
        engine,
        len(ends),
        round(fmean(quality), 5),
        round(fmean(met), 5),
        *gains,
    )
