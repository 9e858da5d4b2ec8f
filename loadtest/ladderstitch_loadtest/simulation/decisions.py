"""The time that a policy takes to decide, by the length of the queue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random

import numpy as np

from ladderstitch.scheduling.requests import Deadlines, Request
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision
from ladderstitch_loadtest.simulation.policy_sweep import policy_settings
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.simulator import ONE_IMAGE

QUEUE_LENGTHS = (1, 10, 100, 1000)
BUDGETS_S = (0.008, 0.036, 0.1)
RATE = 2000.0
"""Requests per second of the forecast."""
HISTORY_REQUESTS = 1000
"""Requests before the queue that the forecast is based on."""
CONFIDENCES = (0.0, 0.8, 0.9, 0.95, 0.99)
"""Minimum confidences of the requests, in turn, where cascades are measured, too."""
CASCADES = "adaptive, cascades"
"""Name of the policy with the choice of a cascade for its batch."""
REPEATS = 3
"""Times that each decision is taken. The shortest counts, to exclude other work of the machine."""


@dataclass(frozen=True, slots=True)
class DecisionTimes:
    """The quantiles of one policy's decision times at one queue length, in microseconds."""

    family: str
    policy: str
    queue: int
    p50_us: float
    p99_us: float

    def to_dict(self) -> dict[str, object]:
        """Return the figures as JSON values."""
        return asdict(self)


def measure(family: Family, policy: str, decisions: int, seed: int) -> list[DecisionTimes]:
    """Return the decision times for each queue length.

    Budgets are mixed, deadlines are spread at random, and the forecast is based on
    `HISTORY_REQUESTS` requests. Taking the batch out of the queue does not count. The policy
    `CASCADES` needs a family that has some.
    """
    times = []
    name, confidences = (policy, (0.0,)) if policy != CASCADES else ("adaptive", CONFIDENCES)
    for length in QUEUE_LENGTHS:
        rng = Random(seed)
        planner = Planner(
            family.quality, family.profile, policy_settings(name), cascades=family.cascades
        )
        now = _fill_planner(planner, length, confidences, rng)
        instants = [now + rng.uniform(-0.001, 0.002) for _ in range(decisions)]
        seconds = [min(_time_decision(planner, at) for _ in range(REPEATS)) for at in instants]
        p50, p99 = np.quantile(seconds, [0.5, 0.99]).tolist()
        times.append(
            DecisionTimes(family.name, policy, length, round(1e6 * p50, 1), round(1e6 * p99, 1))
        )
    return times


def _fill_planner(
    planner: Planner, length: int, confidences: Sequence[float], rng: Random
) -> float:
    """Give a planner its history and a queue of `length` requests; return the time afterwards."""
    now = 0.0
    for _ in range(HISTORY_REQUESTS):
        now += rng.expovariate(RATE)
        request = _make_request(now, rng.choice(BUDGETS_S))
        planner.add(request)
        planner.queue.remove(request)
    for i in range(length):
        confidence = confidences[i % len(confidences)]
        request = _make_request(now, rng.uniform(0.002, 0.1 + length / RATE), confidence)
        planner.queue.add(request)
        planner.chooser.prepare(request)
    return now


def _time_decision(planner: Planner, at: float) -> float:
    started = time.perf_counter()
    decision = planner.policy(planner.queue.view, planner.latency.view, at)
    if isinstance(decision, Decision):
        planner.chooser.choose(decision, planner.queue.view, planner.latency.view, at)
    return time.perf_counter() - started


def _make_request(arrival: float, budget_s: float, min_confidence: float = 0.0) -> Request:
    deadlines = Deadlines(arrival + budget_s, float("inf"), "synthetic", "none")
    return Request("", ONE_IMAGE, arrival, deadlines, min_confidence=min_confidence)
