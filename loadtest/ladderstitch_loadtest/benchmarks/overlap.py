"""Benchmark of the share of communication time that each residual scheme hides behind compute.

All schemes run on the same random weights, interleaved, and differ only in their residual stream.
The scheme `no_communication` does not communicate (its outputs are wrong), so the communication of
a step costs (standard - no_communication) seconds. The ladder hides
(standard - ladder) / (standard - no_communication) of that. The same is measured on routes through
two anchors of different width, whose stitching layer the ladder crosses with a reduction in flight.
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
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import LayerRange, Route
from ladderstitch.text.model.residual import ResidualScheme, Scheme
from ladderstitch_loadtest.benchmarks.delay_proxy import DelayProxy

SCHEMES: tuple[Scheme, ...] = ("standard", "ladder", "parallel", "no_communication")
ROUTES = ("up", "down")
"""Names of the routes of a family: first half narrow, second half wide, and the reverse."""
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model with random weights."""

    width: int = 1536
    ffn: int = 4096
    layers: int = 20
    heads: int = 12
    kv_heads: int = 12
    vocabulary: int = 4096

    def config(self, positions: int) -> DecoderConfig:
        """Return the configuration for sequences of at most `positions` tokens."""
        return DecoderConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            max_positions=positions,
        )


@dataclass(frozen=True, slots=True)
class OverlapPlan:
    """The measurement: decode steps after a prompt, for every latency of the link.

    `batch` sequences have a prompt of `prompt` tokens. Each of `rounds` rounds takes `steps` decode
    steps per scheme. `latencies_s` are one-way latencies, emulated or (`tcp`) real delays.
    `front_width` is the width of a narrower anchor; set: `ROUTES` are measured, not one anchor.
    """

    shape: ModelShape
    front_width: int | None = None
    ranks: int = 2
    batch: int = 1
    prompt: int = 64
    steps: int = 4
    rounds: int = 9
    dtype: str = "float32"
    latencies_s: tuple[float, ...] = (0.0, 0.00025, 0.0005, 0.001, 0.0025)
    tcp: bool = False

    @property
    def routes(self) -> tuple[str, ...]:
        """The names of the measured routes."""
        return ROUTES if self.front_width else ("one anchor",)

    def path(self, route: str, scheme: str) -> int:
        """Return the number of the path of a route with a scheme."""
        return self.routes.index(route) * len(SCHEMES) + SCHEMES.index(scheme)

    def _anchors(self) -> dict[str, object]:
        """Return the fields of a family of two anchors; none if there is no narrower one."""
        if self.front_width is None:
            return {}
        large = self.shape.config(self.prompt + 1)
        sizes = {
            "hidden_size": self.front_width,
            "intermediate_size": self.shape.ffn * self.front_width // self.shape.width,
        }
        half, last = self.shape.layers // 2, self.shape.layers - 1

        def route(front: int) -> Route:
            first = LayerRange(anchor=front, first=0, last=half - 1)
            return first, LayerRange(anchor=1 - front, first=half, last=last)

        routes = tuple(route(front) for front in range(len(ROUTES)) for _ in SCHEMES)
        return {"anchors": (large.model_copy(update=sizes),), "routes": routes}

    def rank_config(self) -> RankConfig:
        """Return the configuration of the ranks, with one path per route and scheme."""
        return RankConfig.model_validate(
            self._anchors()
            | {
                "model": self.shape.config(self.prompt + 1),
                "paths": tuple(ResidualScheme(scheme=scheme) for scheme in SCHEMES)
                * len(self.routes),
                "ranks": self.ranks,
                "dtype": self.dtype,
                "sequences": self.batch,
                "max_model_len": self.prompt + 1,
                "max_batched_tokens": self.batch * self.prompt,
            }
        )


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
    ladder_over_standard: float
    parallel_over_standard: float
    hidden: float | None
    bound: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields for the result file."""
        return asdict(self)


async def measure(plan: OverlapPlan, on_progress: ProgressCallback) -> list[OverlapRow]:
    """Return one row per latency and route; raises `EngineRestarting` if no ranks start."""
    group = RankGroup(plan.rank_config(), GroupOptions(link="tcp" if plan.tcp else "shared_memory"))
    steps = plan.rounds * len(SCHEMES) * len(plan.routes)
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
        before = number * plan.rounds * len(SCHEMES)
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
    await group.forward(prompt, 0, plan.path(route, SCHEMES[0]))
    rounds = []
    for number in range(-1, plan.rounds):
        turn = number % len(SCHEMES)
        seconds: dict[str, float] = {}
        for scheme in (*SCHEMES[turn:], *SCHEMES[:turn]):
            seconds[scheme] = await _step_seconds(group, plan, plan.path(route, scheme))
            on_progress(max(0, number) * len(SCHEMES) + len(seconds))
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
    step = {scheme: median(r[scheme] for r in rounds) for scheme in SCHEMES}
    return OverlapRow(
        link="tcp" if plan.tcp else "shared memory, emulated latency",
        route=route,
        latency_ms=1e3 * latency_s,
        transport_ms=round(1e3 * proxy.delay_median_s, 3) if proxy else None,
        step_ms={scheme: round(1e3 * s, 3) for scheme, s in step.items()},
        tokens_per_s={scheme: round(plan.batch / s, 1) for scheme, s in step.items()},
        ladder_over_standard=round(median(r["standard"] / r["ladder"] for r in rounds), 3),
        parallel_over_standard=round(median(r["standard"] / r["parallel"] for r in rounds), 3),
        hidden=_hidden_share(rounds),
        bound=round(median(r["standard"] / r["no_communication"] for r in rounds), 3),
    )


def _hidden_share(rounds: Sequence[dict[str, float]]) -> float | None:
    """Return the share of the communication that the ladder hides.

    Rounds whose communication takes at most 2 % of a step do not count: their ratio is noise over
    noise. The result is None if they are half of the rounds or more.
    """
    hidden = [
        (r["standard"] - r["ladder"]) / cost
        for r in rounds
        if (cost := r["standard"] - r["no_communication"]) > 0.02 * r["standard"]
    ]
    return round(median(hidden), 3) if len(hidden) > len(rounds) // 2 else None
