"""The scaling decision: on its own, and over minutes of simulated demand in bursts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.replica.autoscaling import (
    LoadSample,
    ScalingDecision,
    ScalingGoals,
    VariantCost,
    decide,
    seconds_for,
)
from ladderstitch.replica.load_sampler import LoadSampler
from ladderstitch.replica.replica import Replica
from ladderstitch.vision.bundle import Bundle
from tests.support.servers import pixels

OFFERS = (VariantCost(0.002, 0.80), VariantCost(0.005, 0.90), VariantCost(0.011, 0.94))
GOALS = ScalingGoals(quality=0.90, attainment=0.97, busy=0.7, spare=0.25)
GOAL_S = 0.005
CAPACITY = GOALS.busy / GOAL_S
"""Requests a second that one replica answers at the quality goal: 140."""


def load(demand: float, attainment: float = 1.0, busy: float = 0.5) -> LoadSample:
    return LoadSample(demand, busy, attainment, OFFERS)


@pytest.mark.parametrize(
    ("demand", "replicas", "wanted"),
    [
        (20.0, 1, ScalingDecision(1, "steady")),  # the best variant for all: 0.22 of the time
        (
            100.0,
            1,
            ScalingDecision(1, "spending_quality"),
        ),  # 1.1 with the best one, 0.5 with the goal's
        (150.0, 1, ScalingDecision(2, "adding_replicas")),  # 1.07 of what the goal takes
        (900.0, 1, ScalingDecision(7, "adding_replicas")),  # all that are missing at once
        (100.0, 4, ScalingDecision(1, "removing_replicas")),
        (115.0, 2, ScalingDecision(2, "steady")),  # one could do it, but without room to spare
    ],
)
def test_quality_is_spent_before_replicas_are_added(
    demand: float, replicas: int, wanted: ScalingDecision
) -> None:
    assert decide([load(demand / replicas)] * replicas, replicas, GOALS) == wanted


def test_lateness_adds_one_where_work_is_its_reason() -> None:
    assert decide([load(30, attainment=0.9)], 1, GOALS) == ScalingDecision(2, "adding_replicas")
    idle = load(5, attainment=0.5, busy=0.05)  # budgets that no replica could meet
    assert decide([idle], 1, GOALS) == ScalingDecision(1, "steady")


def test_a_late_deployment_is_not_made_smaller() -> None:
    loads = [load(10, attainment=0.9, busy=0.3)] * 3
    assert decide(loads, 3, GOALS).replicas >= 3


def test_nothing_known_changes_nothing() -> None:
    assert decide([], 3, GOALS) == ScalingDecision(3, "steady")
    assert decide([LoadSample(50.0, 0.2, 1.0, ())], 2, GOALS) == ScalingDecision(2, "steady")


@given(
    st.floats(0, 1e4),
    st.integers(1, 50),
    st.floats(0, 1),
    st.floats(0, 1),
    st.none() | st.floats(0, 1),
)
def test_the_goal_is_kept_at_whatever_size_is_chosen(
    demand: float, replicas: int, attainment: float, busy: float, quality: float | None
) -> None:
    goals = GOALS.model_copy(update={"quality": quality})
    verdict = decide([load(demand / replicas, attainment, busy)] * replicas, replicas, goals)
    assert verdict.replicas >= 1
    wanted = 0.87 if quality is None else min(max(quality, 0.80), 0.94)
    per_replica = demand * seconds_for(wanted, OFFERS) / verdict.replicas
    assert per_replica <= goals.busy * (1 + 1e-9)


@given(st.floats(0.80, 0.94))
def test_mixing_stitches_gives_the_quality_between_them(quality: float) -> None:
    points = np.interp(quality, [o.quality for o in OFFERS], [o.seconds for o in OFFERS])
    assert seconds_for(quality, OFFERS) == pytest.approx(points)


def test_stats_travel_as_flat_numbers() -> None:
    before = load(12.5, 0.75, 0.25)
    assert LoadSample.of(before.stats()) == before
    assert all(isinstance(value, float) for value in before.stats().values())


@dataclass
class Simulation:
    """A deployment under demand, a second a step, with Serve's delays around the decision."""

    replicas: int = 1
    look_back_s: int = 10
    up_delay_s: int = 5
    down_delay_s: int = 120
    warm_up_s: int = 12
    changes: list[int] = field(default_factory=list)
    qualities: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    _coming: deque[int] = field(default_factory=deque)
    _wish: tuple[int, int] = (0, 0)

    def run(self, demand: np.ndarray) -> None:
        recent: deque[float] = deque(maxlen=self.look_back_s)
        for second, arrived in enumerate(demand):
            while self._coming and self._coming[0] <= second:
                self._coming.popleft()
                self.replicas += 1
            recent.append(float(arrived))
            self.qualities.append(self._served(float(arrived)))
            self._scale(second, float(np.mean(recent)))

    def _served(self, arrived: float) -> float:
        """The mean quality that fits this second's work, as a good scheduler mixes variants."""
        allowed = self.replicas / max(arrived, 1e-9)
        return float(np.interp(allowed, [o.seconds for o in OFFERS], [o.quality for o in OFFERS]))

    def _scale(self, second: int, demand: float) -> None:
        target = self.replicas + len(self._coming)
        busy = min(1.0, demand * GOAL_S / self.replicas)
        loads = [load(demand / self.replicas, busy=busy)] * self.replicas
        verdict = decide(loads, self.replicas, GOALS)
        self.states.append(verdict.state)
        wish = verdict.replicas
        if verdict.state in ("steady", "spending_quality"):
            wish = target
        direction = int(np.sign(wish - target))
        since = self._wish[1] if self._wish[0] == direction else second
        self._wish = (direction, since)
        delay = self.up_delay_s if direction > 0 else self.down_delay_s
        if direction == 0 or second - since < delay:
            return
        self._wish = (0, second)
        self.changes.append(wish - target)
        if wish > target:
            self._coming.extend([second + self.warm_up_s] * (wish - target))
        else:
            self.replicas = max(wish, self.replicas - (target - wish))


def bursts(rate: float, seconds: int, seed: int, squared_variation: float = 8.0) -> np.ndarray:
    """Arrivals in each second of a renewal process with gamma gaps of that CV^2."""
    rng = np.random.default_rng(seed)
    shape = 1 / squared_variation
    gaps = rng.gamma(shape, 1 / (rate * shape), int(rate * seconds * 1.5) + 1000)
    times = np.cumsum(gaps)
    assert times[-1] > seconds
    return np.bincount(times[times < seconds].astype(int), minlength=seconds)


def test_load_rises_and_falls_and_replicas_follow() -> None:
    simulation = Simulation()
    demand = [bursts(40, 300, 1), bursts(600, 600, 2), bursts(40, 600, 3)]
    simulation.run(np.concatenate(demand))
    assert simulation.replicas == 1
    quality, states = simulation.qualities, simulation.states
    assert max(quality[:300]) == 0.94
    assert states[302] == "adding_replicas"
    assert np.mean(quality[360:900]) > GOALS.quality
    assert sum(change for change in simulation.changes if change > 0) <= 6
    assert len(simulation.changes) <= 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [90, 140, 280, 700])
def test_bursts_do_not_make_it_flap(rate: float, seed: int) -> None:
    """Half an hour of steady demand at CV^2 = 8: it settles and stays, even at a boundary."""
    simulation = Simulation()
    simulation.run(bursts(rate, 1800, seed))
    downs = [change for change in simulation.changes if change < 0]
    assert len(downs) <= 1
    assert len(simulation.changes) <= 5
    assert np.mean(simulation.qualities[120:]) > GOALS.quality


def test_moderate_load_spends_quality_and_adds_nothing() -> None:
    simulation = Simulation()
    simulation.run(bursts(100, 600, 4, squared_variation=1.0))
    assert simulation.changes == []
    assert simulation.states.count("spending_quality") > 550


async def test_a_replicas_pressure_is_what_it_did(tiny_bundle: Bundle) -> None:
    now = [100.0]
    replica = Replica(ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0))
    await replica.start()
    pressure = LoadSampler(replica.registry, replica.metrics, lambda: now[0])
    async with AsyncClient(f"127.0.0.1:{replica.port}") as client:
        for n in range(6):
            await client.predict(pixels(2, n), budget_s=5.0)
        with pytest.raises(RequestFailed):
            await client.predict(b"broken")  # the caller's fault is no demand
        with pytest.raises(RequestFailed):
            await client.predict(pixels(), budget_s=1e-6, hard=True)
        await client.predict(pixels(), budget_s=1e-6)
    now[0] += 4.0
    seen = pressure.sample()
    now[0] += 4.0
    idle = pressure.sample()
    await replica.stop()
    candidates = next(iter(replica.registry.vision_models.values())).scheduler.candidates
    assert seen.demand_per_s == pytest.approx(2.0)
    assert seen.attainment == pytest.approx(6 / 8)
    assert 0 < seen.busy < 1
    assert [offer.quality for offer in seen.offers] == [
        candidates.quality[s] for s in candidates.frontier
    ]
    seconds = [offer.seconds for offer in seen.offers]
    assert seconds == sorted(seconds)
    assert (idle.demand_per_s, idle.busy, idle.attainment) == (0.0, 0.0, 1.0)
