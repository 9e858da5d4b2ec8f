"""How long a policy takes to decide, by the length of the queue."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from random import Random

import numpy as np

from ladderstitch.scheduling.requests import Deadlines, Request
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch_loadtest.simulation.policy_sweep import settings_of
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.simulator import ONE_IMAGE

LENGTHS = (1, 10, 100, 1000)
BUDGETS_S = (0.008, 0.036, 0.1)
RATE = 2000.0
HISTORY = 1000
REPEATS = 3
"""Every decision is taken so often and its shortest time counts: what the policy takes, without
what else the machine does meanwhile."""


@dataclass(frozen=True, slots=True)
class DecisionRow:
    family: str
    policy: str
    queue: int
    p50_us: float
    p99_us: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def measure(family: Family, policy: str, decisions: int, seed: int) -> list[DecisionRow]:
    """Mixed budgets, a forecast from a thousand requests before, deadlines spread at random."""
    rows = []
    for length in LENGTHS:
        rng = Random(seed)
        planner = Planner(family.quality, family.profile, settings_of(policy))
        now = 0.0
        for _ in range(HISTORY):
            now += rng.expovariate(RATE)
            request = _request(now, rng.choice(BUDGETS_S))
            planner.add(request)
            planner.queue.remove(request)
        for _ in range(length):
            planner.queue.add(_request(now, rng.uniform(0.002, 0.1 + length / RATE)))
        moments = [now + rng.uniform(-0.001, 0.002) for _ in range(decisions)]
        seconds = [min(_seconds(planner, at) for _ in range(REPEATS)) for at in moments]
        p50, p99 = np.quantile(seconds, [0.5, 0.99]).tolist()
        rows.append(
            DecisionRow(family.name, policy, length, round(1e6 * p50, 1), round(1e6 * p99, 1))
        )
    return rows


def _seconds(planner: Planner, at: float) -> float:
    started = time.perf_counter()
    planner.policy(planner.queue.view, planner.latency.view, at)
    return time.perf_counter() - started


def _request(arrival: float, budget_s: float) -> Request:
    deadlines = Deadlines(arrival + budget_s, float("inf"), "made up", "none")
    return Request("", ONE_IMAGE, arrival, deadlines)
