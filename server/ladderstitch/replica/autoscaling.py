"""How many replicas a load needs: quality is spent first, then replicas are added. Pure functions.

A request costs the seconds that a replica computes for it, less on a lesser variant. Fewer replicas
thus mean lesser variants, down to the quality goal; only what would go below it, or be late, is a
reason for another replica. A replica goes when the rest would keep the goal with room to spare.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["steady", "spending_quality", "adding_replicas", "removing_replicas"]


class ScalingGoals(BaseModel):
    """What replicas are for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quality: float | None = Field(
        None, ge=0, le=1, description="kept by adding replicas; unset: half-way down the frontier"
    )
    attainment: float = Field(0.97, gt=0, le=1, description="share of budgets to meet")
    busy: float = Field(0.7, gt=0, le=1, description="share of its time that a replica may compute")
    spare: float = Field(0.25, ge=0, description="more load that must fit before one is removed")


@dataclass(frozen=True, slots=True)
class VariantCost:
    """A variant of the frontier: seconds of computing that a request takes, and its quality."""

    seconds: float
    quality: float


@dataclass(frozen=True, slots=True)
class LoadSample:
    """What one replica saw of late; `demand_per_s` counts refused requests, too."""

    demand_per_s: float
    busy: float
    attainment: float
    offers: tuple[VariantCost, ...]  # fastest first, so quality rises

    def stats(self) -> dict[str, float]:
        """As the flat numbers that Ray Serve carries."""
        flat = {"demand_per_s": self.demand_per_s, "busy": self.busy, "attainment": self.attainment}
        for place, offer in enumerate(self.offers):
            flat[f"seconds.{place}"], flat[f"quality.{place}"] = offer.seconds, offer.quality
        return flat

    @classmethod
    def of(cls, stats: Mapping[str, float]) -> LoadSample:
        """Raises `KeyError` for what `stats` did not make."""
        places = sum(name.startswith("seconds.") for name in stats)
        offers = tuple(
            VariantCost(stats[f"seconds.{i}"], stats[f"quality.{i}"]) for i in range(places)
        )
        return cls(stats["demand_per_s"], stats["busy"], stats["attainment"], offers)


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many replicas there should be, and what is happening meanwhile."""

    replicas: int
    state: State


def decide(loads: Sequence[LoadSample], replicas: int, goals: ScalingGoals) -> ScalingDecision:
    """The verdict on so many running replicas; the load of one just born may be missing."""
    if not loads or not loads[0].offers:
        return ScalingDecision(replicas, "steady")
    offers = loads[0].offers
    demand = sum(load.demand_per_s for load in loads)
    goal_s = seconds_for(goal_quality(offers, goals), offers)
    needed = _replicas_for(demand, goal_s, goals)
    if needed > replicas:
        return ScalingDecision(needed, "adding_replicas")
    late = _attainment(loads) < goals.attainment
    busiest = max(load.busy for load in loads)
    if late and busiest > goals.busy / 2:  # an idle replica is late for its budgets' own sake
        return ScalingDecision(replicas + 1, "adding_replicas")
    roomy = _replicas_for(demand * (1 + goals.spare), goal_s, goals)
    if roomy < replicas and not late:
        return ScalingDecision(roomy, "removing_replicas")
    best = offers[-1]
    if demand * best.seconds / replicas > goals.busy:
        return ScalingDecision(replicas, "spending_quality")
    return ScalingDecision(replicas, "steady")


def goal_quality(offers: Sequence[VariantCost], goals: ScalingGoals) -> float:
    """Between what the fastest and the best variant give."""
    least, most = offers[0].quality, offers[-1].quality
    wanted = (least + most) / 2 if goals.quality is None else goals.quality
    return min(max(wanted, least), most)


def seconds_for(quality: float, offers: Sequence[VariantCost]) -> float:
    """Seconds a request takes when variants are mixed to a mean quality."""
    for lesser, better in itertools.pairwise(offers):
        if quality <= better.quality:
            share = (quality - lesser.quality) / (better.quality - lesser.quality)
            return lesser.seconds + share * (better.seconds - lesser.seconds)
    return offers[-1].seconds


def _replicas_for(demand_per_s: float, seconds: float, goals: ScalingGoals) -> int:
    return max(1, math.ceil(demand_per_s * seconds / goals.busy))


def _attainment(loads: Sequence[LoadSample]) -> float:
    demand = sum(load.demand_per_s for load in loads)
    if demand == 0:
        return 1.0
    return sum(load.attainment * load.demand_per_s for load in loads) / demand
