"""Benchmark of the share of communication time that each residual scheme hides or saves.

All schemes run on the same random weights, interleaved, and differ only in their residual stream.
The scheme `no_communication` does not communicate (its outputs are wrong), so the communication of
a step costs (standard - no_communication) seconds. A scheme hides or saves
(standard - scheme) / (standard - no_communication) of that. Groups are pairs of all layers, and
desync reduces after each MLP only. The same is measured on routes through two anchors of different
width, whose stitching layer the ladder crosses with a reduction in flight, and on the paths of a
bundle with their own weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median

import numpy as np

from ladderstitch.text.comm.base import CommSpec
from ladderstitch.text.engine.rank_config import (
    Address,
    CommRegion,
    CreateCommSpec,
    GroupOptions,
    RankConfig,
    create_comm_spec,
)
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch_loadtest.benchmarks.delay_proxy import DelayProxy
from ladderstitch_loadtest.benchmarks.overlap_plan import OverlapPlan

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class OverlapRow:
    """The measurements at one latency of the link.

    Milliseconds are medians of a step over all rounds. Ratios are computed per round, because a
    disturbance affects all schemes of a round, and their median is reported.
    """

    link: str
    route: str
    latency_ms: float
    transport_ms: float | None
    step_ms: dict[str, float]
    tokens_per_s: dict[str, float]
    reductions: dict[str, int]
    over_standard: dict[str, float]
    """Speed by scheme, in multiples of the standard one's; no communication is the bound."""
    hidden: dict[str, float | None]
    """Share of the communication that a scheme hides or saves."""

    def to_dict(self) -> dict[str, object]:
        """Return the fields for the result file."""
        return asdict(self)


async def measure(plan: OverlapPlan, on_progress: ProgressCallback) -> list[OverlapRow]:
    """Return one row per latency and route; raises `EngineRestarting` if no ranks start."""
    group = RankGroup(plan.rank_config(), GroupOptions(link="tcp" if plan.tcp else "shared_memory"))
    steps = plan.rounds * len(plan.schemes) * len(plan.routes)
    total = len(plan.latencies_s) * steps

    def report(before: int, done: int) -> None:
        on_progress(before + done, total)

    try:
        await group.start()
        return [
            row
            for number, latency_s in enumerate(plan.latencies_s)
            for row in await _measure_latency(
                group, plan, latency_s, partial(report, number * steps)
            )
        ]
    finally:
        await group.close()


async def _measure_latency(
    group: RankGroup, plan: OverlapPlan, latency_s: float, on_progress: Callable[[int], None]
) -> list[OverlapRow]:
    """Give the link of a started group this latency and measure all rounds of every route."""
    proxy = DelayProxy(latency_s) if plan.tcp and latency_s else None
    options = replace(group.options, latency_s=0.0 if plan.tcp else latency_s)
    await group.change_comm(options, _route_through(proxy) if proxy else create_comm_spec)
    rows = []

    def report(before: int, done: int) -> None:
        on_progress(before + done)

    for number, route in enumerate(plan.routes):
        before = number * plan.rounds * len(plan.schemes)
        rounds = await _measure_rounds(group, plan, route, partial(report, before))
        rows.append(_summarise(plan, route, latency_s, proxy, rounds))
    if proxy:
        proxy.close()
    return rows


def _route_through(proxy: DelayProxy) -> CreateCommSpec:
    """Return a function that creates communicators whose connections go through the proxy."""

    def create_spec(
        rank_config: RankConfig, options: GroupOptions, addresses: Sequence[Address]
    ) -> tuple[CommSpec, CommRegion | None]:
        return create_comm_spec(rank_config, options, proxy.route(addresses))

    return create_spec


async def _measure_rounds(
    group: RankGroup, plan: OverlapPlan, route: str, on_progress: Callable[[int], None]
) -> list[dict[str, float]]:
    """Return each round's median seconds of a step of a route by scheme.

    Each round begins with another scheme.
    """
    prompt = np.ones((plan.batch, plan.prompt), np.int64)
    schemes = plan.schemes
    await group.forward(prompt, 0, plan.path(route, schemes[0]))
    rounds = []
    for number in range(-1, plan.rounds):
        turn = number % len(schemes)
        seconds: dict[str, float] = {}
        for scheme in (*schemes[turn:], *schemes[:turn]):
            seconds[scheme] = await _step_seconds(group, plan, plan.path(route, scheme))
            on_progress(max(0, number) * len(schemes) + len(seconds))
        if number >= 0:  # the first round warms up
            rounds.append(seconds)
    return rounds


async def _step_seconds(group: RankGroup, plan: OverlapPlan, path: int) -> float:
    token = np.ones((plan.batch, 1), np.int64)
    seconds = []
    for _ in range(plan.steps):
        started = time.perf_counter()
        await group.forward(token, plan.prompt, path)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def _summarise(
    plan: OverlapPlan,
    route: str,
    latency_s: float,
    proxy: DelayProxy | None,
    rounds: Sequence[dict[str, float]],
) -> OverlapRow:
    step = {scheme: median(r[scheme] for r in rounds) for scheme in plan.schemes}
    return OverlapRow(
        link="tcp" if plan.tcp else "shared memory, emulated latency",
        route=route,
        latency_ms=1e3 * latency_s,
        transport_ms=round(1e3 * proxy.delay_median_s, 3) if proxy else None,
        step_ms={scheme: round(1e3 * s, 3) for scheme, s in step.items()},
        tokens_per_s={scheme: round(plan.batch / s, 1) for scheme, s in step.items()},
        reductions=plan.reductions(),
        over_standard={
            scheme: round(median(r["standard"] / r[scheme] for r in rounds), 3) for scheme in step
        },
        hidden={scheme: _hidden_share(rounds, scheme) for scheme in step},
    )


def _hidden_share(rounds: Sequence[dict[str, float]], scheme: str) -> float | None:
    """Return the share of the communication that a scheme hides or saves.

    Rounds whose communication takes at most 2 % of a step do not count: their ratio is noise over
    noise. The result is None if they are half of the rounds or more.
    """
    hidden = [
        (r["standard"] - r[scheme]) / cost
        for r in rounds
        if (cost := r["standard"] - r["no_communication"]) > 0.02 * r["standard"]
    ]
    return round(median(hidden), 3) if len(hidden) > len(rounds) // 2 else None
